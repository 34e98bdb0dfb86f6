// Attention over packed documents, forward and backward, in fp32.
//
// Queries that begin at one key and read one prefix are a run: the queries of one document. A task is a run and a key
// head. Its keys (the prefix's, then its own) are packed once; its queries go in tiles of QUERIES positions of all heads
// that share the key head, so that every product is one of small matrices, and a tile multiplies no key behind its last.
//
// A prefix is read by many runs, so backward gives the runs in parts to the threads. A part adds the gradients of
// prefixes to a buffer of its own; the parts are added up in order. So the result does not depend on the threads.
#include "../training.h"

#include <cmath>
#include <cstdlib>

#include "exponential.h"

namespace {

constexpr int64_t WIDE = 2 * LANES;  // columns of a tile of registers
constexpr int ROWS = VECTOR_BYTES == 64 ? 12 : 6;
constexpr int64_t QUERIES = 32;
constexpr int64_t MOST_PARTS = 8, MOST_BYTES = 64 << 20;  // of the parts' buffers

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Strided {  // a matrix whose element (i, k) is at[i * row + k * column]
    const float* at;
    int64_t row, column;
};

template <int N, bool ADD>
void multiply_rows(int64_t depth, Strided a, const float* b, int64_t b_row, float* c, int64_t c_row) {
    vf total[N][2] = {};
    for (int64_t k = 0; k < depth; k++, b += b_row) {
        const vf b0 = load<vf>(b), b1 = load<vf>(b + LANES);
        for (int i = 0; i < N; i++) {
            const float x = a.at[i * a.row + k * a.column];
            total[i][0] += x * b0;
            total[i][1] += x * b1;
        }
    }
    for (int i = 0; i < N; i++, c += c_row) {
        store(c, ADD ? load<vf>(c) + total[i][0] : total[i][0]);
        store(c + LANES, ADD ? load<vf>(c + LANES) + total[i][1] : total[i][1]);
    }
}

template <bool ADD, int N = ROWS>
void multiply_last_rows(int64_t n, int64_t depth, Strided a, const float* b, int64_t b_row, float* c, int64_t c_row) {
    if constexpr (N > 0) {
        if (n == N) multiply_rows<N, ADD>(depth, a, b, b_row, c, c_row);
        else multiply_last_rows<ADD, N - 1>(n, depth, a, b, b_row, c, c_row);
    }
}

// c (n, m) = a (n, depth) b (depth, m), or c += a b. m is a multiple of WIDE.
template <bool ADD = false>
void multiply(int64_t n, int64_t m, int64_t depth, Strided a, const float* b, int64_t b_row, float* c, int64_t c_row) {
    for (int64_t j = 0; j < m; j += WIDE)
        for (int64_t i = 0; i < n; i += ROWS)
            multiply_last_rows<ADD>(n - i < ROWS ? n - i : ROWS, depth, {a.at + i * a.row, a.row, a.column}, b + j, b_row,
                                    c + i * c_row + j, c_row);
}

struct Run {  // queries first to last of one document, and the keys they see: a prefix, then their own
    int64_t first, last, own, prefix, prefix_end, keys;
};

// The next run from query `at` on. Queries of no document see no key: all their limits are 0, and they are runs too.
Run find_run(const Attention& a, int64_t at) {
    const int32_t *own = a.limits, *end = own + a.queries, *prefix = end + a.queries, *prefix_end = prefix + a.queries;
    const auto belongs = [&](int64_t i) {
        return own[i] == own[at] && prefix[i] == prefix[at] && prefix_end[i] == prefix_end[at] && end[i] >= end[i - 1];
    };
    int64_t last = at + 1;
    while (last < a.queries && belongs(last)) last++;
    return {at, last, own[at], prefix[at], prefix_end[at], prefix_end[at] - prefix[at] + end[last - 1] - own[at]};
}

int64_t row_of(const Run& run, int64_t key) {
    const int64_t n = run.prefix_end - run.prefix;
    return key < n ? run.prefix + key : run.own + key - n;
}

template <class T>
struct Task {  // a run and a key head, in packed pieces of one workspace
    const Attention& a;
    const Run run;
    const int64_t head, group, dim, wide, keys;  // wide: head_dim in whole tiles; keys: of the run, in whole tiles
    const float scale;

    Task(const Attention& a, const Run& run, int64_t head)
        : a(a), run(run), head(head), group(a.heads / a.kv_heads), dim(a.head_dim), wide(round_up(a.head_dim, WIDE)),
          keys(round_up(run.keys, WIDE)), scale(1 / std::sqrt((float)a.head_dim)) {}

    int64_t seen_by(int64_t query) const {
        return run.prefix_end - run.prefix + a.limits[a.queries + query] - run.own;
    }

    // Rows of k or v as they are, (run.keys, wide), or turned, (wide, keys). What is beyond is zero.
    void pack(const void* from, int64_t row, int64_t head_stride, float* rows, float* turned) const {
        if (turned) std::memset(turned, 0, wide * keys * sizeof(float));
        for (int64_t key = 0; key < run.keys; key++) {
            const T* x = (const T*)from + row_of(run, key) * row + head * head_stride;
            float part[LANES];
            for_vectors(dim, [&](int64_t at, auto read, auto) {
                const vf value = read(x + at);
                if (rows) store(rows + key * wide + at, value);
                store(part, value);
                for (int64_t i = 0; turned && i < LANES && at + i < dim; i++) turned[(at + i) * keys + key] = part[i];
            });
            if (rows)
                for (int64_t i = dim; i < wide; i++) rows[key * wide + i] = 0;
        }
    }

    // Rows of q, o or do of queries first to last, (group (last - first), wide), times factor.
    void pack_queries(const void* from, int64_t row, int64_t head_stride, int64_t first, int64_t last, float factor,
                      float* to) const {
        for (int64_t g = 0; g < group; g++)
            for (int64_t i = first; i < last; i++, to += wide) {
                const T* x = (const T*)from + i * row + (head * group + g) * head_stride;
                for_vectors(dim, [&](int64_t at, auto read, auto) { store(to + at, read(x + at) * factor); });
                for (int64_t j = dim; j < wide; j++) to[j] = 0;
            }
    }

    void unpack_queries(const float* from, void* out, int64_t row, int64_t head_stride, int64_t first, int64_t last) const {
        for (int64_t g = 0; g < group; g++)
            for (int64_t i = first; i < last; i++, from += wide) {
                T* x = (T*)out + i * row + (head * group + g) * head_stride;
                for_vectors(dim, [&](int64_t at, auto read, auto write) { write(x + at, read(from + at)); });
            }
    }

    float* lse_of(int64_t g, int64_t query) const { return a.lse + (head * group + g) * a.queries + query; }

    static int64_t forward_numbers(int64_t group, int64_t keys, int64_t wide) {
        return 2 * keys * wide + QUERIES * group * (2 * wide + keys) + WIDE;
    }

    void forward(float* work) const {
        float *k = work, *v = k + keys * wide, *q = v + keys * wide, *o = q + QUERIES * group * wide;
        float* s = o + QUERIES * group * wide;
        pack(a.k, a.k_row, a.k_head, nullptr, k);
        pack(a.v, a.v_row, a.v_head, v, nullptr);
        for (int64_t first = run.first; first < run.last; first += QUERIES) {
            const int64_t last = first + QUERIES < run.last ? first + QUERIES : run.last, n = (last - first) * group;
            pack_queries(a.q, a.q_row, a.q_head, first, last, scale, q);
            const int64_t most = seen_by(last - 1), m = round_up(most, WIDE);  // limits rise within a run
            multiply(n, m, dim, {q, wide, 1}, k, keys, s, keys);
            for (int64_t r = 0; r < n; r++) {
                const int64_t query = first + r % (last - first), seen = seen_by(query);
                float* row = s + r * keys;
                vf peaks = fill(-__builtin_inff());
                const int64_t whole = seen / LANES * LANES;
                for (int64_t at = 0; at < whole; at += LANES) peaks = maximum(peaks, load<vf>(row + at));
                if (whole < seen) peaks = maximum(peaks, read_part(row + whole, seen - whole, -__builtin_inff()));
                const float peak = largest(peaks);
                vf totals{};
                for_vectors(seen, [&](int64_t at, auto read, auto write) {
                    vf e = exponential(read(row + at) - peak);
                    if (seen - at < LANES) e = keep(e, seen - at, 0);
                    totals += e;
                    write(row + at, e);
                });
                for (int64_t at = seen; at < m; at++) row[at] = 0;
                const float total = sum(totals);
                *lse_of(r / (last - first), query) = seen ? (peak + std::log(total)) * 1.44269504f : __builtin_inff();
                const float factor = seen ? 1 / total : 0;
                for_vectors(seen, [&](int64_t at, auto read, auto write) { write(row + at, read(row + at) * factor); });
            }
            multiply(n, wide, most, {s, keys, 1}, v, wide, o, wide);
            unpack_queries(o, a.out, a.o_row, a.o_head, first, last);
        }
    }

    static int64_t backward_numbers(int64_t group, int64_t keys, int64_t wide) {
        return 5 * keys * wide + QUERIES * group * (4 * wide + 2 * keys) + WIDE;
    }

    // Leaves dk and dv (run.keys, wide) in the first pieces of work.
    void backward(float* work) const {
        const int64_t tile = QUERIES * group;
        float *dk = work, *dv = dk + keys * wide, *k = dv + keys * wide, *k_turned = k + keys * wide;
        float *v_turned = k_turned + keys * wide, *q = v_turned + keys * wide, *o = q + tile * wide, *d_o = o + tile * wide;
        float *dq = d_o + tile * wide, *p = dq + tile * wide, *ds = p + tile * keys;
        std::memset(dk, 0, 2 * keys * wide * sizeof(float));
        pack(a.k, a.k_row, a.k_head, k, k_turned);
        pack(a.v, a.v_row, a.v_head, nullptr, v_turned);
        for (int64_t first = run.first; first < run.last; first += QUERIES) {
            const int64_t last = first + QUERIES < run.last ? first + QUERIES : run.last, n = (last - first) * group;
            pack_queries(a.q, a.q_row, a.q_head, first, last, scale, q);
            pack_queries(a.o, a.o_row, a.o_head, first, last, 1, o);
            pack_queries(a.d_o, a.d_o_row, a.d_o_head, first, last, 1, d_o);
            const int64_t most = seen_by(last - 1), m = round_up(most, WIDE);
            multiply(n, m, dim, {q, wide, 1}, k_turned, keys, p, keys);
            multiply(n, m, dim, {d_o, wide, 1}, v_turned, keys, ds, keys);
            for (int64_t r = 0; r < n; r++) {
                const int64_t query = first + r % (last - first), seen = seen_by(query);
                const float lse = *lse_of(r / (last - first), query) * 0.693147181f;
                vf products{};
                for (int64_t at = 0; at < wide; at += LANES)
                    products += load<vf>(o + r * wide + at) * load<vf>(d_o + r * wide + at);
                const float delta = sum(products);
                float *p_row = p + r * keys, *ds_row = ds + r * keys;
                for_vectors(seen, [&](int64_t at, auto read, auto write) {
                    const vf weight = exponential(read(p_row + at) - lse);
                    write(ds_row + at, weight * (read(ds_row + at) - delta));
                    write(p_row + at, weight);
                });
                for (int64_t at = seen; at < m; at++) p_row[at] = ds_row[at] = 0;
            }
            multiply<true>(most, wide, n, {p, 1, keys}, d_o, wide, dv, wide);
            multiply<true>(most, wide, n, {ds, 1, keys}, q, wide, dk, wide);
            multiply(n, wide, most, {ds, keys, 1}, k, wide, dq, wide);
            for (int64_t i = 0; i < n * wide; i += LANES) store(dq + i, load<vf>(dq + i) * scale);
            unpack_queries(dq, a.dq, a.dq_row, a.dq_head, first, last);
        }
    }
};

struct Memory {  // malloc, freed at the end of a block
    void* at;
    explicit Memory(int64_t bytes) : at(std::malloc(bytes ? bytes : 1)) {}
    ~Memory() { std::free(at); }
    Memory(const Memory&) = delete;
};

struct Runs {
    Run* at;
    int64_t n, most_keys;
};

Runs find_runs(const Attention& a, Run* at) {
    Runs runs{at, 0, 0};
    for (int64_t query = 0; query < a.queries; query = at[runs.n++].last) {
        at[runs.n] = find_run(a, query);
        runs.most_keys = at[runs.n].keys > runs.most_keys ? at[runs.n].keys : runs.most_keys;
    }
    return runs;
}

template <class T>
int forward_all(const Attention& a) {
    Memory list(a.queries * sizeof(Run));
    if (!list.at) return NO_MEMORY;
    const Runs runs = find_runs(a, (Run*)list.at);
    const int64_t wide = round_up(a.head_dim, WIDE), group = a.heads / a.kv_heads;
    const int64_t numbers = Task<T>::forward_numbers(group, round_up(runs.most_keys, WIDE), wide);
    int code = OK;
#pragma omp parallel num_threads(a.threads)
    {
        Memory work(numbers * sizeof(float));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < runs.n * a.kv_heads; i++) {
            if (work.at) Task<T>(a, runs.at[i / a.kv_heads], i % a.kv_heads).forward((float*)work.at);
            else {
#pragma omp atomic write
                code = NO_MEMORY;
            }
        }
    }
    return code;
}

template <class T>
int backward_all(const Attention& a) {
    const int64_t dim = a.head_dim, wide = round_up(dim, WIDE), group = a.heads / a.kv_heads, width = a.kv_heads * 2 * dim;
    Memory list(a.queries * sizeof(Run)), places(a.keys * sizeof(int32_t)), sums(a.keys * width * sizeof(float));
    if (!list.at || !places.at || !sums.at) return NO_MEMORY;
    const Runs runs = find_runs(a, (Run*)list.at);
    int32_t* place = (int32_t*)places.at;  // of each key in a part's buffer, or -1 if it is in no prefix
    std::memset(place, -1, a.keys * sizeof(int32_t));
    int64_t n_shared = 0;
    for (int64_t i = 0; i < runs.n; i++)
        for (int64_t key = runs.at[i].prefix; key < runs.at[i].prefix_end; key++)
            if (place[key] < 0) place[key] = n_shared++;
    const int64_t bytes = n_shared * width * sizeof(float);
    int64_t parts = bytes ? MOST_BYTES / bytes : MOST_PARTS;
    parts = parts < 1 ? 1 : parts > MOST_PARTS ? MOST_PARTS : parts;
    Memory shared(parts * bytes);
    if (!shared.at) return NO_MEMORY;
    std::memset(sums.at, 0, a.keys * width * sizeof(float));
    std::memset(shared.at, 0, parts * bytes);
    const int64_t keys = round_up(runs.most_keys, WIDE), numbers = Task<T>::backward_numbers(group, keys, wide);
    int code = OK;
#pragma omp parallel num_threads(a.threads)
    {
        Memory work(numbers * sizeof(float));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < parts * a.kv_heads; i++) {
            const int64_t part = i / a.kv_heads, head = i % a.kv_heads;
            if (!work.at) {
#pragma omp atomic write
                code = NO_MEMORY;
                continue;
            }
            for (int64_t j = part; j < runs.n; j += parts) {  // every eighth run: equal shares
                const Run& run = runs.at[j];
                const Task<T> task(a, run, head);
                task.backward((float*)work.at);
                const int64_t n_prefix = run.prefix_end - run.prefix;
                for (int64_t key = 0; key < run.keys; key++) {
                    float* to = (float*)sums.at + row_of(run, key) * width;
                    if (key < n_prefix) to = (float*)shared.at + (part * n_shared + place[run.prefix + key]) * width;
                    to += head * 2 * dim;
                    const float *dk = (float*)work.at + key * wide, *dv = dk + task.keys * wide;
                    for (int64_t d = 0; d < dim; d++) to[d] += dk[d], to[dim + d] += dv[d];
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t key = 0; key < a.keys; key++) {
            float* total = (float*)sums.at + key * width;
            if (place[key] >= 0)
                for (int64_t part = 0; part < parts; part++) {
                    const float* more = (float*)shared.at + (part * n_shared + place[key]) * width;
                    for (int64_t i = 0; i < width; i++) total[i] += more[i];
                }
            for (int64_t head = 0; head < a.kv_heads; head++, total += 2 * dim) {
                T *dk = (T*)a.dk + key * a.dk_row + head * a.dk_head, *dv = (T*)a.dv + key * a.dv_row + head * a.dv_head;
                for_vectors(dim, [&](int64_t at, auto read, auto write) {
                    write(dk + at, read((const float*)total + at));
                    write(dv + at, read((const float*)total + dim + at));
                });
            }
        }
    }
    return code;
}

}  // namespace

namespace ISA {

int attention_forward(const Attention& a) { return a.is_bf16 ? forward_all<bf16>(a) : forward_all<float>(a); }
int attention_backward(const Attention& a) { return a.is_bf16 ? backward_all<bf16>(a) : backward_all<float>(a); }

}  // namespace ISA
