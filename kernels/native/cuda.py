"""The CUDA library of csrc/cuda: launches of its kernels, and its functions as ctypes declares them.

A launch is described once, as a CudaLaunch. On a GPU the library's host function takes it; the PTX machine runs the
same kernel with the same arguments (kernels/compiled/cuda_simulation.py).
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from kernels.native.library import NativeError, check, load

ABI_VERSION = 2  # of csrc/cuda/api.cuh


@dataclass(frozen=True)
class TileMap:
    """A tensor of 16 bits whose tiles a kernel copies at once (TMA), 128 bytes a row, swizzled."""

    tensor: torch.Tensor  # four axes, the last contiguous
    box: tuple[int, int, int, int]  # of a tile: elements of each axis


class MapRequest(ctypes.Structure):
    """A TileMap as csrc/cuda/hopper_attention.cu takes it: the last axis first, strides in bytes."""

    _fields_ = [
        ("address", ctypes.c_uint64), ("sizes", ctypes.c_uint64 * 4), ("strides", ctypes.c_uint64 * 3),
        ("box", ctypes.c_uint32 * 4),
    ]  # fmt: skip


Argument = torch.Tensor | TileMap | float | int | None  # a tensor's address, a map of it, fp32, int64, a null pointer


@dataclass(frozen=True)
class CudaLaunch:
    """One launch: a kernel of csrc/cuda, and what it is given."""

    source: str  # of csrc/cuda
    function: str  # of the library: takes the arguments, the choices and the stream
    kernel: str  # a part of the kernel's name in PTX that no other kernel of the source has
    arguments: Sequence[Argument]  # the kernel's
    choices: Sequence[int] = ()  # that the host function makes the kernel from
    grid: tuple[int, ...] = (1,)  # blocks, where the host function does not decide by the device
    threads: int = 32  # a block
    shared_bytes: int = 0
    reached: Sequence[torch.Tensor] = field(default=(), repr=False)  # tensors whose addresses lie in a table


@cache
def load_cuda() -> ctypes.CDLL:
    """Return the library with the types of its functions declared. Raises NativeError if it cannot be had.

    It loads without a GPU too; calls then return CUDA's error.
    """
    library = load("cuda", ABI_VERSION)
    library.cria_cuda_error.argtypes, library.cria_cuda_error.restype = [ctypes.c_int], ctypes.c_char_p
    return library


def _as_ctypes(argument: Argument) -> Any:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, TileMap):
        t, box = argument.tensor, (ctypes.c_uint32 * 4)(*argument.box[::-1])
        sizes = (ctypes.c_uint64 * 4)(*t.shape[::-1])
        strides = (ctypes.c_uint64 * 3)(*(stride * t.element_size() for stride in t.stride()[-2::-1]))
        return ctypes.byref(MapRequest(t.data_ptr(), sizes, strides, box))
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def run_on_gpu(launch: CudaLaunch) -> None:
    """Launch on the current stream of the tensors' device. Raises NativeError if the library refuses it or has none."""
    device = next(a.device for a in launch.arguments if isinstance(a, torch.Tensor))
    if device.type != "cuda":
        raise NativeError(f"{launch.function}: tensors on {device}, wanted a CUDA device; pass impl='auto'")
    library = load_cuda()
    choices = [ctypes.c_int(choice) for choice in launch.choices]
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = getattr(library, launch.function)(*map(_as_ctypes, launch.arguments), *choices, stream)
    check(code, launch.function, library.cria_cuda_error)


runner: Callable[[CudaLaunch], None] = run_on_gpu  # set by the PTX machine, which runs CPU tensors


def run(launch: CudaLaunch) -> None:
    """Run a launch: on the GPU of its tensors, or on the PTX machine inside of its context."""
    runner(launch)
