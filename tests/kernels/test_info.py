"""The command kernels.info: what is in use, and why, from stand-ins for the GPU and the libraries."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import triton

from kernels import info
from kernels.compiled.machine_library import PtxError
from kernels.native.library import NativeError

INSTEAD = "; in its place: "


def fail(error):
    raise error


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Libraries that load, and the record of how they were built."""
    library = SimpleNamespace(cria_instruction_set=lambda: b"avx2", cria_has_amx=lambda: False)
    monkeypatch.setattr(info, "load_cpu", lambda: library)
    monkeypatch.setattr(info, "load_cuda", lambda: None)
    monkeypatch.setattr(info, "load_library", lambda: None)
    monkeypatch.setattr(info, "FOLDER", tmp_path)
    monkeypatch.setattr(info.torch, "get_num_threads", lambda: 7)
    monkeypatch.delenv("CRIA_NATIVE", raising=False)
    record = {name: {"why": f"compiler of {name}"} for name in info.INSTEAD}
    (tmp_path / "build.json").write_text(json.dumps(record))
    return library


def with_gpu(monkeypatch, has_gpu, cuda="13.0"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(info, "chip", lambda device: "sm_90" if device.type == "cuda" else "none")
    monkeypatch.setattr(torch.version, "cuda", cuda)


def told(name):
    part = info.describe_library(name)
    assert part.name == name
    return part.in_use, part.why


def test_a_gpu_or_why_there_is_none(monkeypatch):
    with_gpu(monkeypatch, True)
    assert info.describe_gpu() == info.Part("gpu", True, "H200, launches of sm_90")
    for cuda, why in (("13.0", "torch sees no CUDA device"), (None, "torch is built without CUDA")):
        with_gpu(monkeypatch, False, cuda)
        assert info.describe_gpu() == info.Part("gpu", False, f"{why}; every op runs its reference on the CPU")


def test_a_library_in_use_is_told_with_its_compiler(built, monkeypatch):
    with_gpu(monkeypatch, True)
    assert told("cpu") == (True, "instruction set avx2, 7 threads; built with compiler of cpu")
    built.cria_has_amx = lambda: True
    assert told("cpu") == (True, "instruction set avx2 and AMX, 7 threads; built with compiler of cpu")
    assert told("cuda") == (True, "only where it is chosen, impl='cuda'; built with compiler of cuda")
    assert told("ptx_machine") == (True, "runs compiled kernels without a GPU; built with compiler of ptx_machine")
    (info.FOLDER / "build.json").write_text('{"cpu": {"built": true, "why": "g++"}}')  # of one that was built alone
    assert told("ptx_machine") == (True, "runs compiled kernels without a GPU; built with built elsewhere")
    (info.FOLDER / "build.json").unlink()
    assert told("ptx_machine") == (True, "runs compiled kernels without a GPU; built with built elsewhere")
    with_gpu(monkeypatch, False)
    assert told("cuda") == (False, "no GPU here; built with built elsewhere")


def test_a_library_that_is_not_in_use_is_told_with_what_works_instead(built, monkeypatch):
    with_gpu(monkeypatch, True)
    monkeypatch.setenv("CRIA_NATIVE", "off")
    assert told("cpu") == (False, f"CRIA_NATIVE=off{INSTEAD}torch's operators on the CPU")
    assert told("cuda")[0] and told("ptx_machine")[0]
    monkeypatch.setenv("CRIA_NATIVE", "on")
    assert told("cpu")[0]
    monkeypatch.setattr(info, "load_cpu", lambda: fail(NativeError("not built")))
    monkeypatch.setattr(info, "load_cuda", lambda: fail(NativeError("no nvcc")))
    monkeypatch.setattr(info, "load_library", lambda: fail(PtxError("no g++")))
    assert told("cpu") == (False, f"not built{INSTEAD}torch's operators on the CPU")
    assert told("cuda") == (False, f"no nvcc{INSTEAD}the Triton kernels")
    assert told("ptx_machine") == (False, f"no g++{INSTEAD}nothing: kernels.simulate and its tests need it")


def test_each_part_is_a_line_and_an_object_of_json(built, monkeypatch, capsys, tmp_path):
    with_gpu(monkeypatch, False)
    versions = f"Triton {triton.__version__}, torch {torch.__version__}"
    monkeypatch.setattr(sys, "argv", ["info", "--json", str(tmp_path / "info.json")])
    info.main()
    parts = [
        ("gpu", False, "torch sees no CUDA device; every op runs its reference on the CPU"),
        ("triton", False, versions),
        ("cpu", True, "instruction set avx2, 7 threads; built with compiler of cpu"),
        ("cuda", False, "no GPU here; built with compiler of cuda"),
        ("ptx_machine", True, "runs compiled kernels without a GPU; built with compiler of ptx_machine"),
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        f"{name}{' ' * (13 - len(name))}{'in use     ' if used else 'not in use '} {why}" for name, used, why in parts
    ]
    text = (tmp_path / "info.json").read_text()
    assert json.loads(text) == [{"name": name, "in_use": used, "why": why} for name, used, why in parts]
    assert text.startswith('[\n {\n  "name": "gpu",\n') and text.endswith("]\n")
    with_gpu(monkeypatch, True)
    monkeypatch.setattr(sys, "argv", ["info"])
    info.main()
    assert f"triton       in use      {versions}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bench", "info", "simulate", "static", "tune"])
def test_every_flag_is_explained(name, monkeypatch, capsys, snapshot):
    command = __import__(f"kernels.{name}", fromlist=["main"])
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    if name == "bench":
        monkeypatch.setattr(command, "GPU", False)
    if name == "simulate":
        monkeypatch.setattr("kernels.measure.simulated_cases.has_nvcc", lambda: True)
    with pytest.raises(SystemExit) as end:
        command.main()
    told = re.sub(r"\s+\(default:\s+\S*/kernels/launch\)", " (default: kernels/launch)", capsys.readouterr().out)
    assert not end.value.code and told == snapshot
