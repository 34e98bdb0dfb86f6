"""The functions of the PTX machine's library, as csrc/ptx/api.h declares them."""

import ctypes
from functools import cache

from kernels.native.library import NativeError, load

ABI_VERSION = 2  # of csrc/ptx/api.h


class PtxError(Exception):
    """PTX that the machine does not read, a launch that does not fit it, or a machine that is not there."""


class Request(ctypes.Structure):
    """One launch, as csrc/ptx/api.cpp declares it."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint64),  # bytes
        ("limit", ctypes.c_uint64),  # instructions of a warp
        *((name, ctypes.c_uint32) for name in ("late", "reverse", "check", "n_args", "n_ranges", "padding")),
        ("args", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
    )


@cache
def load_library() -> ctypes.CDLL:
    """Return the library with the types of its functions declared.

    Raises PtxError if it cannot be built or is of another version.
    """
    try:
        library = load("ptx_machine", ABI_VERSION)
    except NativeError as error:
        raise PtxError(f"PTX machine: {error}; only running compiled kernels without a GPU needs it") from error
    text, pointer = ctypes.c_char_p, ctypes.c_void_p
    library.ptx_load.argtypes, library.ptx_load.restype = [text, ctypes.POINTER(pointer)], pointer
    library.ptx_kernels.argtypes, library.ptx_kernels.restype = [pointer], pointer
    library.ptx_run.argtypes, library.ptx_run.restype = [pointer, text, ctypes.POINTER(Request)], pointer
    library.ptx_unload.argtypes, library.ptx_unload.restype = [pointer], None
    library.ptx_free.argtypes, library.ptx_free.restype = [pointer], None
    return library


def take_text(pointer: int) -> str:
    """Return a string that the library allocated, and free it."""
    value = ctypes.string_at(pointer).decode()
    load_library().ptx_free(pointer)
    return value
