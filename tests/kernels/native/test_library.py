"""Libraries of csrc: built, loaded, refused, and replaced by torch's operators where they are missing."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from kernels.native import cpu, library, toolchain
from kernels.native.library import NativeError, build_if_stale, check, load, why_missing
from kernels.native.weight_gradient import has_amx
from tests.helpers import native


def run_info(tmp_path, **environment):
    """Run python -m kernels.info and return its lines and its JSON by part."""
    path = tmp_path / "info.json"
    done = subprocess.run(
        [sys.executable, "-m", "kernels.info", "--json", str(path)],
        capture_output=True, text=True, check=False, cwd=library.ROOT, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = {part["name"]: part for part in json.loads(path.read_text())}
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(parts)
    return parts


@native.needs_cxx
def test_info_tells_the_instruction_set_in_use(tmp_path):
    part = run_info(tmp_path)["cpu"]
    assert part["in_use"] and "instruction set" in part["why"] and "built with" in part["why"]
    assert ("and AMX" in part["why"]) == has_amx()
    part = run_info(tmp_path, CRIA_INSTRUCTION_SET="plain")["cpu"]
    assert part["in_use"] and "instruction set plain, " in part["why"]


def test_info_tells_why_a_library_is_not_in_use(tmp_path):
    part = run_info(tmp_path, CRIA_INSTRUCTION_SET="quantum")["cpu"]
    assert not part["in_use"] and ("CRIA_INSTRUCTION_SET is 'quantum'" in part["why"] or not native.CXX)
    part = run_info(tmp_path, CRIA_NATIVE="off")["cpu"]
    assert not part["in_use"] and part["why"].endswith("in its place: torch's operators on the CPU")


def test_a_missing_library_names_the_reason_that_the_build_recorded(tmp_path):
    (tmp_path / "build.json").write_text(json.dumps({"cuda": {"built": False, "why": "no nvcc"}}))
    assert why_missing("cuda", tmp_path) == "no nvcc; install nvcc (CUDA's toolkit) and run pip install again"
    with pytest.raises(NativeError, match="library cuda is not there: no nvcc; install"):
        build_if_stale("cuda", tmp_path, tmp_path)
    assert why_missing("cpu", tmp_path).startswith("setup.py has not built it; install g++")


def test_a_checkout_without_a_compiler_says_which(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeError, match="library cpu is not there: no-such-compiler: No such file"):
        build_if_stale("cpu", library.ROOT, tmp_path)
    monkeypatch.setenv("NVCC", "no-nvcc")
    with pytest.raises(NativeError, match="library cuda is not there: no-nvcc: No such file"):
        build_if_stale("cuda", library.ROOT, tmp_path)


@native.needs_cxx
@pytest.mark.parametrize("wanted", [cpu.ABI_VERSION - 1, 99])  # the library is newer, or older
def test_a_library_of_another_version_is_refused(wanted):
    with pytest.raises(NativeError, match=rf"has ABI {cpu.ABI_VERSION}, wanted {wanted}; delete it"):
        load.__wrapped__("cpu", wanted)


def test_of_many_processes_one_builds_and_the_others_find_what_it_built(tmp_path, monkeypatch):
    """Each takes the lock by a file of its own, as a process does."""
    built, target = [], tmp_path / "libcpu.so"

    def build(command, **options):
        built.append(options["env"]["CRIA_BUILD"])
        time.sleep(0.1)
        target.write_bytes(b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "one.cpp").write_text("")
    monkeypatch.setattr(toolchain, "find_cxx", lambda: ["g++"])
    monkeypatch.setattr(library.subprocess, "run", build)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: build_if_stale("cpu", tmp_path, tmp_path), range(4)))
    assert built == ["cpu"]


@native.needs_cxx
@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("CRIA_NATIVE", "of", "CRIA_NATIVE is 'of', wanted on or off"),
     ("CRIA_INSTRUCTION_SET", "quantum", "CRIA_INSTRUCTION_SET is 'quantum', this processor runs plain up to")],
)  # fmt: skip
def test_a_mistyped_variable_is_said_and_torch_does_not_take_over(variable, value, said, monkeypatch):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(cpu, "load_cpu", cpu.load_cpu.__wrapped__)
    with pytest.raises(NativeError, match=said):
        cpu.find_cpu.__wrapped__()


def test_without_the_library_torch_takes_over_and_says_why(monkeypatch, capsys):
    def load(*_):
        raise NativeError("kernels: the library cpu is not there: no g++")

    monkeypatch.setattr(cpu, "load_cpu", load)
    assert cpu.find_cpu.__wrapped__() is None
    assert capsys.readouterr().err.startswith("kernels: the library cpu is not there: no g++\n(torch's own operators")
    monkeypatch.setenv("CRIA_NATIVE", "off")
    assert cpu.find_cpu.__wrapped__() is None and capsys.readouterr().err == ""


def test_what_nvcc_complains_of_is_told(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    with pytest.raises(ValueError, match=r"nvcc does not compile adamw\.cu for sm_80:\nerror: no such thing"):
        toolchain.compile_ptx(library.ROOT / "csrc" / "cuda" / "adamw.cu", "80")


def test_codes_become_words():
    check(0, "adamw")
    with pytest.raises(NativeError, match="adamw: the compiled function was given a pointer that is not aligned"):
        check(2, "adamw")
    with pytest.raises(NativeError, match=r"adamw: CUDA says 'out of memory' \(error 2\)"):
        check(1002, "adamw", lambda error: b"out of memory" if error == 2 else b"")


@pytest.mark.parametrize("name", library.WANTED)
def test_every_library_has_sources(name):
    assert toolchain.list_sources(name, library.ROOT / "csrc")


def test_nvcc_is_found_in_pips_package(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho release 13\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("NVCC", raising=False)
    assert toolchain.find_nvcc() in (str(nvcc), "/usr/local/cuda/bin/nvcc")
    monkeypatch.setenv("NVCC", str(nvcc))
    assert toolchain.find_nvcc() == str(nvcc) and toolchain.describe(str(nvcc)) == "release 13"


@pytest.mark.parametrize("newer", ["none", "one source", "one header", "all"])
def test_one_newer_file_makes_a_library_stale(newer, monkeypatch, tmp_path):
    folder, built = tmp_path / "csrc" / "cpu", []
    folder.mkdir(parents=True)
    for name, kind in (("one.cpp", "one source"), ("two.cpp", ""), ("api.h", "one header")):
        (folder / name).write_text("")
        os.utime(folder / name, (200, 200) if newer in (kind, "all") else (50, 50))
    target = tmp_path / "libcpu.so"
    target.write_bytes(b"")
    os.utime(target, (100, 100))

    def build(command, **options):
        built.append(options["env"]["CRIA_BUILD"])
        target.write_bytes(b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(toolchain, "find_cxx", lambda: ["g++"])
    monkeypatch.setattr(library.subprocess, "run", build)
    build_if_stale("cpu", tmp_path, tmp_path)
    assert built == ["cpu"] * (newer != "none")


def test_every_kind_of_header_and_source_counts(tmp_path):
    """A change of any of them compiles anew."""
    names = {"cpu": ["a.cpp", "a.h", "isa/b.cpp", "isa/b.h"], "cuda": ["a.cu", "a.cuh", "a.h"],
             "ptx": ["a.cpp", "a.h", "a.inc"]}  # fmt: skip
    for folder, files in names.items():
        for name in files:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text("")
        library_ = {"ptx": "ptx_machine"}.get(folder, folder)
        found = [*toolchain.list_sources(library_, tmp_path), *toolchain.list_headers(library_, tmp_path)]
        assert sorted(str(path.relative_to(tmp_path / folder)) for path in found) == sorted(files)


def test_what_is_compiled_how(monkeypatch):
    """What rounds as PyTorch does is never fused; instruction sets have their flags; the user's come last."""
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setenv("CXXFLAGS", "-DMINE -g")
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "x86_64")
    jobs, link = toolchain.plan_cxx("cpu", library.ROOT / "csrc", openmp=True)
    assert link[0] == "sh" and link[-1] == "-shared" and "-fopenmp" in link
    for job in jobs:
        assert job.command[0] == "sh" and {"-DMINE", "-g", "-fopenmp"} <= set(job.command)
        exact = job.source.parent.name != "isa" or job.source.name in ("adamw.cpp", "nf4.cpp")
        assert (toolchain.EXACT in job.command, toolchain.FUSED in job.command) == (exact, not exact), job.name
        assert ("-mavx512f" in job.command) == job.name.endswith("-avx512") and ("-mfma" in job.command) == (
            job.name.endswith(("-avx2", "-avx512"))
        )
    of_cuda = {job.source.name: job.command for job in toolchain.plan_cuda(library.ROOT / "csrc")[0]} if (
        shutil.which("nvcc")) else {}  # fmt: skip
    assert all(("code=sm_80" in " ".join(c)) == (name != "hopper_attention.cu") for name, c in of_cuda.items())


@pytest.mark.parametrize(("named", "used", "is_refused"), [
    ("", "avx512", False), ("avx2", "avx2", False), ("avx512", "avx2", True), ("avx2", "plain", True),
    ("plain", "avx2", True),
])  # fmt: skip
def test_an_instruction_set_that_does_not_run_here_is_refused(named, used, is_refused, monkeypatch):
    monkeypatch.setenv("CRIA_INSTRUCTION_SET", named)
    found = SimpleNamespace(cria_instruction_set=lambda: used.encode())
    monkeypatch.setattr(cpu, "load", lambda *_: found)
    monkeypatch.setattr(cpu, "declare", lambda library: None)
    if is_refused:
        with pytest.raises(NativeError, match=f"CRIA_INSTRUCTION_SET is '{named}'"):
            cpu.load_cpu.__wrapped__()
    else:
        assert cpu.load_cpu.__wrapped__() is found
