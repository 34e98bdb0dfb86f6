"""Files of figures."""

import importlib.metadata
import json
import os
import platform
import subprocess
from types import SimpleNamespace

import pytest

from kernels.measure import machine


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "b.json"
    machine.write_json(path, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        machine.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_facts_are_of_the_first_card_and_none_where_there_is_no_nvidia_smi(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor asked; do echo "$asked" >> "$0.asked"; done\necho "1980 MHz, 45"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.query_nvidia_smi("clocks.sm", "temperature.gpu") == {
        "clocks.sm": "1980 MHz",
        "temperature.gpu": "45",
    }
    asked = (tmp_path / "nvidia-smi.asked").read_text().split()
    assert asked == ["--query-gpu=clocks.sm,temperature.gpu", "--format=csv,noheader", "--id=0"]
    program.write_text('#!/bin/sh\necho "no devices were found"\nexit 6\n')
    assert machine.query_nvidia_smi("clocks.sm") is None
    for error in (FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("x", 1)):
        monkeypatch.setattr(machine.subprocess, "run", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        assert machine.query_nvidia_smi("clocks.sm") is None


def test_a_card_is_told_as_torch_knows_it(monkeypatch):
    card = SimpleNamespace(
        name="H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 << 20, total_memory=141 << 30
    )
    monkeypatch.setattr(machine, "GPU", True)
    monkeypatch.setattr(machine.torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(machine, "query_nvidia_smi", lambda *names: {name: "580.1" for name in names})
    facts = machine.describe_machine()
    wanted = {
        "device": "H200", "capability": "sm_90", "sms": 132, "l2_bytes": 60 << 20, "memory_bytes": 141 << 30,
        "driver": "580.1", "torch": machine.torch.__version__,
    }  # fmt: skip
    assert facts.items() >= wanted.items()


@pytest.mark.parametrize("gpu", [False, True])
def test_memory_is_freed_on_the_host_and_the_gpu(gpu, monkeypatch):
    freed = []
    monkeypatch.setattr(machine, "GPU", gpu)
    monkeypatch.setattr(machine.gc, "collect", lambda: freed.append("host"))
    monkeypatch.setattr(machine.torch.cuda, "empty_cache", lambda: freed.append("gpu"))
    machine.free_memory()
    assert freed == ["host", "gpu"][: 1 + gpu]


@pytest.mark.parametrize(("interpreted", "name"), [(True, "CPU, Triton's interpreter"), (False, "CPU")])
def test_facts_of_a_cpu_are_versions(interpreted, name, monkeypatch):
    monkeypatch.setattr(machine, "GPU", False)
    monkeypatch.setattr(machine, "INTERPRETED", interpreted)
    monkeypatch.setattr(machine, "installed_version", lambda package: f"of {package}")
    monkeypatch.setattr(machine.time, "strftime", lambda form: form)
    packages = ("liger-kernel", "cut-cross-entropy", "flashoptim", "bitsandbytes", "torchao", "transformers")
    assert machine.describe_machine() == {
        "device": name, "torch": machine.torch.__version__, "triton": machine.triton.__version__,
        "cuda": machine.torch.version.cuda, "python": platform.python_version(),
        "date": "%Y-%m-%d", "packages": {package: f"of {package}" for package in packages},
    }  # fmt: skip


def test_a_version_is_that_of_the_package_or_none():
    assert machine.installed_version("torch") == importlib.metadata.version("torch")
    assert machine.installed_version("no-such-package-of-ours") is None
