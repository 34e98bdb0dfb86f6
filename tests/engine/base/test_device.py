"""What --device, --dtype and --kernels choose, on machines that are not here: a GPU's answers are the test's."""

import pytest
import torch

from engine.base import device
from engine.base.device import choose_device, choose_dtype, choose_kernels, cpu_multiplies_bf16
from engine.base.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that fakes a GPU. emulates: torch computes bf16 on it all the same, slowly."""

    def fake(has_bf16, emulates=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Some GPU")
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported",
            lambda including_emulation=True: has_bf16 or (emulates and including_emulation),
        )  # fmt: skip

    return fake


@pytest.mark.parametrize(("has_gpu", "found"), [(True, ("cuda", "cuda", "cpu")), (False, (None, "cpu", "cpu"))])
def test_the_device_is_a_gpu_where_there_is_one_and_it_is_wanted(has_gpu, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    for name, kind in zip(("cuda", "auto", "cpu"), found, strict=True):
        if kind is None:
            with pytest.raises(UsageError, match="--device cuda: torch sees no GPU"):
                choose_device(name)
        else:
            assert choose_device(name).type == kind


def test_bf16_is_for_devices_that_have_it_and_emulation_is_none(gpu):
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    assert {name: choose_dtype(name, CPU) for name in kinds} == kinds and choose_dtype("auto", CPU) == torch.float32
    gpu(has_bf16=True)
    assert {name: choose_dtype(name, CUDA) for name in kinds} == kinds and choose_dtype("auto", CUDA) == torch.bfloat16
    gpu(has_bf16=False)
    assert choose_dtype("auto", CUDA) == choose_dtype("fp32", CUDA) == torch.float32
    with pytest.raises(UsageError, match="--dtype bf16: NVIDIA Some GPU has no bf16; pass --dtype fp32"):
        choose_dtype("bf16", CUDA)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("avx512f avx512_bf16", True),
        ("amx_bf16", True),
        ("amx_bf16 avx512_bf16", True),
        ("avx512f", False),
        (None, False),
    ],
)
def test_a_cpu_with_either_kind_of_instructions_multiplies_bf16(flags, found, tmp_path, monkeypatch):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
    monkeypatch.setattr(device, "Path", lambda name: tmp_path / name.removeprefix("/proc/"))
    assert cpu_multiplies_bf16() == found


@pytest.mark.parametrize("is_built", [True, False])
@pytest.mark.parametrize("interpreted", [True, False])
def test_kernels_run_where_they_can_and_auto_never_fails(is_built, interpreted, monkeypatch):
    def load():
        if not is_built:
            raise device.NativeError("not built")

    monkeypatch.setattr(device, "find_cpu", lambda: object() if is_built else None)
    monkeypatch.setattr(device, "load_cpu", load)
    monkeypatch.setattr(device.kernels, "INTERPRETED", interpreted)
    assert choose_kernels("auto", CPU, torch.float32) == ("native" if is_built and not interpreted else "ref")
    assert choose_kernels("auto", CPU, torch.float16) == choose_kernels("ref", CPU, torch.float32) == "ref"
    refused = {("native", torch.float16), *([] if is_built else [("native", torch.float32)])}
    refused |= set() if interpreted else {("triton", torch.float32)}
    for name, dtype in (("native", torch.float16), ("native", torch.float32), ("triton", torch.float32)):
        if (name, dtype) in refused:
            with pytest.raises(UsageError, match=f"--kernels {name}: "):
                choose_kernels(name, CPU, dtype)
        else:
            assert choose_kernels(name, CPU, dtype) == name
