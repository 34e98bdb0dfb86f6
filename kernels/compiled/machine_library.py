"""The PTX machine's shared library: found beside this file, built when a checkout's sources are newer, and loaded.

setup.py compiles csrc/ptx into it. An installed package carries it; a checkout builds it here on first use.
"""

import ctypes
import fcntl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).with_name("ptx_machine.so")
ROOT = Path(__file__).parents[2]  # of a checkout; an installed package has no csrc there
ABI_VERSION = 2  # of csrc/ptx/api.h
REMEDY = "install g++ and run pip install again; only running compiled kernels without a GPU needs it"


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


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_stale(library: Path, sources: list[Path]) -> bool:
    return not library.exists() or any(path.stat().st_mtime > library.stat().st_mtime for path in sources)


def build_if_stale(root: Path = ROOT, library: Path = LIBRARY) -> None:
    """Build the library if a checkout's sources are newer than it, once for all processes.

    Raises PtxError if there is no library afterwards, or if the compiler complains.
    """
    sources = [*(root / "csrc" / "ptx").glob("*.cpp"), *(root / "csrc" / "ptx").glob("*.h")]
    if not _is_stale(library, sources):
        return
    if not sources:
        raise PtxError(f"PTX machine: {library} is not there, wanted what setup.py builds from csrc/ptx; {REMEDY}")
    (root / "build").mkdir(exist_ok=True)
    with _locked(root / "build" / "ptx_machine.lock"):
        if not _is_stale(library, sources):  # another process was first
            return
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=root, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if _is_stale(library, sources):
        raise PtxError(f"PTX machine: csrc/ptx could not be compiled; {REMEDY}\n{(done.stdout + done.stderr)[-4000:]}")


@cache
def load_library() -> ctypes.CDLL:
    """Return the library with the types of its functions declared.

    Raises PtxError if it cannot be built or is of another version.
    """
    build_if_stale()
    library = ctypes.CDLL(str(LIBRARY))
    found = library.ptx_abi_version()
    if found != ABI_VERSION:
        raise PtxError(f"PTX machine: {LIBRARY} has ABI {found}, wanted {ABI_VERSION}; delete it and install again")
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
