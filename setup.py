"""Builds csrc into three libraries, each where its compiler is there. Metadata is in pyproject.toml.

kernels/native/toolchain.py tells what is compiled from what and how. The libraries are plain C ABI, loaded by ctypes:
they depend on no version of Python or torch, and the wheel on none. What is not built is left out, with the reason in
kernels/native/build.json, which `python -m kernels.info` prints.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
LIBRARIES = {name: f"kernels.native.lib{name}" for name in ("ptx_machine", "cpu", "cuda")}
spec = importlib.util.spec_from_file_location("toolchain", "kernels/native/toolchain.py")
toolchain = importlib.util.module_from_spec(spec)
sys.modules["toolchain"] = toolchain  # dataclasses look their module up
spec.loader.exec_module(toolchain)


class BuildLibraries(build_ext):
    """Compile what has changed of each library, on all cores, and record the outcome."""

    def get_ext_filename(self, fullname):
        """Return the library's path without a version of Python in its name."""
        return fullname.replace(".", os.sep) + ".so"

    def get_outputs(self):
        """Return the files that were made: what could not be built is none."""
        return [path for path in [*super().get_outputs(), str(self.record_path())] if Path(path).exists()]

    def record_path(self):
        """Return where the outcome of each library is written."""
        return Path(self.get_ext_fullpath(LIBRARIES["cpu"])).with_name("build.json")

    def run(self):
        """Build every library, and say for each whether it was built. Those built before keep their line."""
        path = self.record_path()
        self.outcome = json.loads(path.read_text()) if path.exists() else {}
        only = os.environ.get("CRIA_BUILD")  # a checkout that misses one library builds that one
        self.extensions = [ext for ext in self.extensions if only in (None, ext.name.rpartition(".lib")[2])]
        super().run()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.outcome, indent=1) + "\n")

    def build_extension(self, ext):
        """Build one library, or record and print why it is not there."""
        name = ext.name.rpartition(".lib")[2]
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            told = self.build_library(name, library)
        except (CompileError, toolchain.MissingCompiler) as error:
            library.unlink(missing_ok=True)
            self.outcome[name] = {"built": False, "why": str(error)}
            print(f"csrc: {name} is not built: {error}", file=sys.stderr)
        else:
            self.outcome[name] = {"built": True, "why": told}
            print(f"csrc: {name} is built: {told}", file=sys.stderr)

    def build_library(self, name, library):
        """Compile and link one library. Return what with. Raises CompileError and MissingCompiler."""
        objects = Path(self.build_temp) / name
        for folder in (library.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        told = ""
        if name == "cuda":
            jobs, link = toolchain.plan_cuda(CSRC)
            told = ", " + " ".join(f"sm_{chip}" for chip in toolchain.CUDA_CHIPS)
        else:
            with tempfile.TemporaryDirectory() as folder:
                openmp = name == "cpu" and toolchain.has_openmp(toolchain.find_cxx(), Path(folder))
            jobs, link = toolchain.plan_cxx(name, CSRC, openmp)
            if name == "cpu":
                told = f", {' '.join(toolchain.instruction_sets())}, {'' if openmp else 'no '}OpenMP"
        headers = zlib.crc32(b"".join(path.read_bytes() for path in toolchain.list_headers(name, CSRC)))

        def compile_source(job):
            contents = zlib.crc32(job.source.read_bytes(), zlib.crc32(repr(job.command).encode(), headers))
            target = objects / f"{job.name}.{contents:08x}.o"
            if not target.exists():
                for old in objects.glob(f"{job.name}.*"):
                    old.unlink()
                draft = target.with_suffix(".draft")
                run_compiler([*job.command, "-o", str(draft)])
                draft.replace(target)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compile_source, jobs))
        draft = library.with_suffix(f".{os.getpid()}.draft")  # whoever has loaded the old library keeps it
        run_compiler([*link, *made, "-o", str(draft)])
        draft.replace(library)
        return toolchain.describe(link[0]) + told


def run_compiler(command):
    """Run one command. Raises CompileError with what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)


class AnyPython(bdist_wheel):
    """Name the wheel after the platform alone."""

    def get_tag(self):
        """Return py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(module, [str(path) for path in toolchain.list_sources(name, CSRC)], optional=True)
        for name, module in LIBRARIES.items()
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython},
)
