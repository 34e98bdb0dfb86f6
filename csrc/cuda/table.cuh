// Many tensors in one launch: a table in device memory, a row a tensor, and chunks of elements numbered through them.
#pragma once

#include <cstdint>

namespace cria {

// The row of the tensor that a chunk lies in, found by a whole warp. Row::first_chunk rises from 0.
template <class Row> __device__ inline const Row& find_tensor(const Row* table, int64_t n, int64_t chunk) {
    const int lane = int(threadIdx.x) % 32;
    int found = -1;
    for (int i = 0; i < int(n); i += 32)
        found += __popc(__ballot_sync(~0u, i + lane < int(n) && table[min(i + lane, int(n) - 1)].first_chunk <= chunk));
    return table[found];
}

}  // namespace cria
