"""The compiled libraries: found beside this file, built anew when a checkout's sources are newer, loaded and called.

setup.py compiles csrc into them. An installed package carries what could be built there; a checkout builds
on first use.
"""

import ctypes
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from kernels.native import toolchain

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]  # of a checkout; an installed package has no csrc there
WANTED = {"ptx_machine": "g++", "cpu": "g++", "cuda": "nvcc (CUDA's toolkit)"}  # what builds each library
ABI_FUNCTIONS = {"ptx_machine": "ptx_abi_version"}  # the others': cria_abi_version
CODES = {
    1: "a size it does not take",
    2: "a pointer that is not aligned",
    3: "a mode or type it does not know",
    4: "too little memory for its workspace",
}
CUDA_ERROR = 1000  # of csrc/cuda/api.cuh: this plus cudaError_t


class NativeError(Exception):
    """A compiled library that is not there or is of another version, or a call that it refused."""


def path_of(name: str) -> Path:
    """Return where a library lies."""
    return FOLDER / f"lib{name}.so"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_stale(library: Path, sources: list[Path]) -> bool:
    return not library.exists() or any(path.stat().st_mtime > library.stat().st_mtime for path in sources)


def why_missing(name: str, folder: Path = FOLDER) -> str:
    """Return why a library is not there, as the build recorded it, and what to do."""
    record = folder / "build.json"
    why = json.loads(record.read_text()).get(name, {}).get("why") if record.exists() else None
    return f"{why or 'setup.py has not built it'}; install {WANTED[name]} and run pip install again"


def build_if_stale(name: str, root: Path = ROOT, folder: Path = FOLDER) -> None:
    """Build a library if a checkout's sources are newer than it, once for all processes.

    Raises NativeError if there is no library afterwards, or if the compiler complains.
    """
    library, csrc = folder / f"lib{name}.so", root / "csrc"
    sources = [*toolchain.list_sources(name, csrc), *toolchain.list_headers(name, csrc)]
    if not _is_stale(library, sources):
        return
    if not sources:
        raise NativeError(f"kernels: the library {name} is not there: {why_missing(name, folder)}")
    try:
        (toolchain.find_nvcc if name == "cuda" else toolchain.find_cxx)()
    except toolchain.MissingCompiler as error:
        raise NativeError(f"kernels: the library {name} is not there: {error}") from error
    (root / "build").mkdir(exist_ok=True)
    with _locked(root / "build" / "csrc.lock"):
        if not _is_stale(library, sources):  # another process was first
            return
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=root, capture_output=True, text=True, check=False, env=os.environ | {"CRIA_BUILD": name},
        )  # fmt: skip
    if _is_stale(library, sources):
        told = (done.stdout + done.stderr)[-4000:]
        raise NativeError(
            f"kernels: the library {name} could not be built from csrc; {why_missing(name, folder)}\n{told}"
        )


@cache
def load(name: str, abi_version: int) -> ctypes.CDLL:
    """Return a library. Raises NativeError if it cannot be built or is of another version than abi_version."""
    build_if_stale(name)
    library = ctypes.CDLL(str(path_of(name)))
    found = getattr(library, ABI_FUNCTIONS.get(name, "cria_abi_version"))()
    if found != abi_version:
        raise NativeError(
            f"kernels: {path_of(name)} has ABI {found}, wanted {abi_version}; delete it and run pip install again"
        )
    return library


def check(code: int, what: str, tell_cuda: Callable[[int], bytes] | None = None) -> None:
    """Raise NativeError for a code other than 0 that a function of a library returned.

    what: the call, for the message. tell_cuda: cria_cuda_error, which gives the words of CUDA's own errors.
    """
    if code >= CUDA_ERROR and tell_cuda is not None:
        raise NativeError(f"{what}: CUDA says {tell_cuda(code - CUDA_ERROR).decode()!r} (error {code - CUDA_ERROR})")
    if code:
        raise NativeError(f"{what}: the compiled function was given {CODES.get(code, f'what it answers with {code}')}")
