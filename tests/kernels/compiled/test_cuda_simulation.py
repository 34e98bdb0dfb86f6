"""The PTX of csrc/cuda that a checkout keeps: made again when anything changes that it is made of."""

import shutil

import pytest

from kernels.compiled import cuda_simulation
from tests.helpers.run import ROOT


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The (source, chip) of each run of a compiler that gives its source back, on a copy of csrc/cuda."""
    runs = []
    shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "csrc" / "cuda")

    def compile_ptx(source, chip):
        runs.append((source.name, chip))
        return source.read_text()

    monkeypatch.setattr(cuda_simulation, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_simulation.toolchain, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_simulation.toolchain, "describe", lambda nvcc: "release 13")
    monkeypatch.setattr(cuda_simulation.toolchain, "compile_ptx", compile_ptx)
    return runs


def compile_source(source="adamw.cu", chip="sm_80"):
    return cuda_simulation.compile_source.__wrapped__(source, chip)


@pytest.mark.parametrize("changed", ["adamw.cu", "numbers.cuh", "eight_bit.cuh"])
def test_a_change_of_a_source_or_a_header_compiles_anew(changed, compiled, tmp_path):
    for _ in range(2):
        compile_source()
    assert compiled == [("adamw.cu", "80")]
    path = tmp_path / "csrc" / "cuda" / changed
    path.write_text(path.read_text() + "// changed\n")
    assert compile_source() == (tmp_path / "csrc" / "cuda" / "adamw.cu").read_text()
    assert compiled == [("adamw.cu", "80")] * 2
    assert len(list((tmp_path / "build").iterdir())) == 1  # what is out of date goes


def test_another_compiler_compiles_anew_and_another_source_or_chip_beside(compiled, tmp_path, monkeypatch):
    compile_source()
    path = tmp_path / "csrc" / "cuda" / "grad_norm.cu"
    path.write_text(path.read_text() + "// changed\n")
    compile_source()
    assert compiled == [("adamw.cu", "80")]
    compile_source(chip="sm_90")
    compile_source("grad_norm.cu")
    assert compiled[1:] == [("adamw.cu", "90a"), ("grad_norm.cu", "80")]
    monkeypatch.setattr(cuda_simulation.toolchain, "describe", lambda nvcc: "release 14")
    compile_source()
    assert compiled[3:] == [("adamw.cu", "80")] and len(list((tmp_path / "build").iterdir())) == 3
