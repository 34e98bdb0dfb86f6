"""The CPU library of csrc/cpu: whether it is in use, and its functions as ctypes declares them.

CRIA_NATIVE=off leaves it alone: torch's own operators then run in its place, and give the same results more slowly.
CRIA_INSTRUCTION_SET=plain (avx2, avx512) chooses a lesser instruction set than the processor has.
"""

import ctypes
import os
import sys
from functools import cache

from kernels.native.arguments import AdamWArguments
from kernels.native.library import NativeError, load

ABI_VERSION = 4  # of csrc/cpu/api.h


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the types of the library's functions."""
    library.cria_instruction_set.restype = ctypes.c_char_p
    library.cria_adamw.argtypes = [ctypes.POINTER(AdamWArguments)]
    library.cria_decode_workspace.restype = ctypes.c_int64
    library.cria_decode_workspace.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3]


@cache
def load_cpu() -> ctypes.CDLL:
    """Return the library with the types of its functions declared. Raises NativeError if it cannot be had."""
    library = load("cpu", ABI_VERSION)
    declare(library)
    named, used = os.environ.get("CRIA_INSTRUCTION_SET"), library.cria_instruction_set().decode()
    if named and named != used:
        raise NativeError(f"CRIA_INSTRUCTION_SET is {named!r}, this processor runs plain up to {used!r}; unset it")
    return library


@cache
def find_cpu() -> ctypes.CDLL | None:
    """Return the library, or None where it is switched off or missing; the latter is said once, on stderr."""
    switch = os.environ.get("CRIA_NATIVE", "on")
    if switch not in ("on", "off"):
        raise NativeError(f"CRIA_NATIVE is {switch!r}, wanted on or off")
    if switch == "off":
        return None
    try:
        return load_cpu()
    except NativeError as error:
        if "CRIA_INSTRUCTION_SET" in str(error):
            raise
        print(f"{error}\n(torch's own operators run in its place: the same results, more slowly)", file=sys.stderr)
        return None
