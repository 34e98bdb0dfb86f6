"""Builds csrc/ptx, the PTX machine, into kernels/compiled/ptx_machine.so. Metadata is in pyproject.toml.

The library is plain C++17 with a C ABI, loaded by ctypes: it depends on no version of Python, and the wheel on none.
Without a C++ compiler everything else is installed, and kernels.compiled.ptx says what is missing when it is used.
CXX names another compiler than g++, CXXFLAGS further flags.
"""

import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

MACHINE = "kernels.compiled.ptx_machine"
# No contraction: an addition and a multiplication of PTX round one by one. No -march: a wheel runs on every processor,
# and the one loop that gains by newer instructions chooses among them itself (csrc/ptx/product.cpp).
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


class BuildMachine(build_ext):
    """Compile an extension's sources, those whose contents have changed and as many at a time as there are cores."""

    def get_ext_filename(self, fullname):
        """Return the library's path without a version of Python in its name."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext):
        """Compile each source and link them. Raises CompileError if the compiler is missing or complains."""
        library = Path(self.get_ext_fullpath(ext.name))
        compiler = [os.environ.get("CXX", "g++"), *FLAGS, *os.environ.get("CXXFLAGS", "").split()]
        objects = Path(self.build_temp) / ext.name
        for folder in (library.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        headers = zlib.crc32(
            b"".join(Path(path).read_bytes() for path in ext.depends), zlib.crc32(repr(compiler).encode())
        )

        def compile_source(source):
            contents = zlib.crc32(Path(source).read_bytes(), headers)
            target = objects / f"{Path(source).stem}-{contents:08x}.o"
            if not target.exists():
                for old in objects.glob(f"{Path(source).stem}-*"):
                    old.unlink()
                draft = target.with_suffix(".draft")
                run_compiler([*compiler, "-c", source, "-o", str(draft)])
                draft.replace(target)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compile_source, ext.sources))
        draft = library.with_suffix(f".{os.getpid()}.draft")  # whoever has loaded the old library keeps it
        run_compiler([*compiler, "-shared", *made, "-o", str(draft)])
        draft.replace(library)


def run_compiler(command):
    """Run one command. Raises CompileError with what it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)


class AnyPython(bdist_wheel):
    """Name the wheel after the platform alone."""

    def get_tag(self):
        """Return py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


sources = sorted(str(path) for path in Path("csrc/ptx").glob("*.cpp"))
headers = sorted(str(path) for path in Path("csrc/ptx").glob("*.h"))
setup(
    ext_modules=[Extension(MACHINE, sources, depends=headers, optional=True)],
    cmdclass={"build_ext": BuildMachine, "bdist_wheel": AnyPython},
)
