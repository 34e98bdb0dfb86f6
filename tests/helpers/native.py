"""csrc/cpu for tests: one library for each instruction set that runs here, and one built with sanitizers."""

import ctypes
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from kernels.native import library, toolchain
from kernels.native.cpu import declare, load_cpu

CXX = shutil.which("g++") or shutil.which("clang++")
BESIDE = {
    "few_rows": ("decode",),
    "training": ("rows", "attention", "nf4"),
}  # sources that are built with those of a name
SANITIZERS = "-O0 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
needs_cxx = pytest.mark.skipif(not CXX, reason="the CPU library is compiled by g++, which is missing")


def find_missing_nvcc() -> str:
    """Return why kernels of csrc/cuda cannot run on the PTX machine, "" where nvcc is there."""
    try:
        toolchain.find_nvcc()
    except toolchain.MissingCompiler as missing:
        return f"the PTX machine runs what nvcc makes: {missing}"
    return ""


needs_nvcc = pytest.mark.skipif(bool(find_missing_nvcc()), reason=find_missing_nvcc())


def load_instruction_sets(folder: Path) -> dict[str, ctypes.CDLL]:
    """Return the library as each instruction set up to this processor's runs it.

    The library chooses once, when it is first asked; so each one is a copy of its own.
    """
    load_cpu()
    libraries = {}
    before = os.environ.get("CRIA_INSTRUCTION_SET")
    for name in toolchain.instruction_sets():
        copy = shutil.copy(library.path_of("cpu"), folder / f"{name}.so")
        os.environ["CRIA_INSTRUCTION_SET"] = name
        loaded = ctypes.CDLL(str(copy))
        declare(loaded)
        if loaded.cria_instruction_set().decode() == name:
            libraries[name] = loaded
    del os.environ["CRIA_INSTRUCTION_SET"]
    if before is not None:
        os.environ["CRIA_INSTRUCTION_SET"] = before
    return libraries


@cache
def build_sanitized(folder: Path, name: str) -> Path:
    """Return a library of csrc/cpu's sources of one name and those beside it, built with the sanitizers."""
    os.environ["CXXFLAGS"] = SANITIZERS
    try:
        jobs, link = toolchain.plan_cxx("cpu", library.ROOT / "csrc", toolchain.has_openmp([CXX], folder))
    finally:
        del os.environ["CXXFLAGS"]
    objects = []
    for job in jobs:
        if job.source.stem in (name, *BESIDE.get(name, ()), "instruction_set"):
            objects.append(str(folder / f"{job.name}.o"))
            subprocess.run([*job.command, "-o", objects[-1]], check=True)
    target = folder / f"lib{name}.so"
    subprocess.run([*link, *objects, "-o", str(target)], check=True)
    return target


def run_sanitized(folder: Path, name: str, *arguments: str) -> str:
    """Return what tests/helpers/sanitized_NAME.py prints, which imports no torch and gets the library of that name.

    Fails with the sanitizer's report if it ends with anything but 0.
    """
    runtime = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    filled = f"max_malloc_fill_size={1 << 30}"  # new memory holds -0.37 (0xbebebebe), so reading it unwritten shows
    environment = os.environ | {
        "LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": f"detect_leaks=0:{filled}",
        "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    driver = Path(__file__).with_name(f"sanitized_{name}.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(build_sanitized(folder, name)), *arguments],
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout
