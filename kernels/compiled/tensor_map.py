"""Tensor maps of the PTX machine: what a bulk copy of a tile needs to know of a tensor, as 128 bytes.

NVIDIA's own 128 bytes are opaque; these are laid out as csrc/ptx/tensor_map.h says.
"""

import struct
from collections.abc import Sequence

import torch

TYPES = {  # as tensormap.replace numbers them
    torch.uint8: 0,
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
    torch.float8_e5m2: 0,
    torch.int16: 1,
    torch.int32: 3,
    torch.int64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 9,
    torch.bfloat16: 10,
}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes -> code


def encode_tensor_map(
    tensor: torch.Tensor, box: Sequence[int], swizzle_bytes: int = 0, nan_outside: bool = False
) -> bytes:
    """Return the map of a tensor whose tiles have the shape of `box`.

    tensor: one to five axes, the last contiguous. box: elements of each axis, in the tensor's order. swizzle_bytes: 0,
    32, 64 or 128. nan_outside: places of a tile outside of the tensor become NaN, not 0.
    Raises ValueError for what no map can describe.
    """
    rank = tensor.dim()
    if not 1 <= rank <= 5 or len(box) != rank or tensor.stride(-1) != 1 or swizzle_bytes not in SWIZZLES:
        raise ValueError(
            f"tensor map: shape {tuple(tensor.shape)}, strides {tensor.stride()}, box {tuple(box)}, swizzle "
            f"{swizzle_bytes}; wanted one to five axes, the last contiguous, a box of as many, and 0, 32, 64 or 128"
        )

    def axes(values: Sequence[int], filler: int, n: int = 5) -> list[int]:  # the last axis first
        return [*reversed(values), *[filler] * (n - len(values))]

    strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    head = (rank - 1, TYPES[tensor.dtype], 0, SWIZZLES[swizzle_bytes], int(nan_outside))
    packed = struct.pack("<Q5B3x", tensor.data_ptr(), *head)
    packed += struct.pack("<15I4x", *axes(box, 1), *axes(tensor.shape, 1), *[1] * 5)
    return packed + struct.pack("<4Q16x", *axes(strides, 0, 4))
