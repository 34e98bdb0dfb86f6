"""The device, the dtype and the kernels that the flags --device, --dtype and --kernels choose on this machine."""

from pathlib import Path

import torch

import kernels
from engine.base.errors import UsageError
from kernels.native.cpu import find_cpu, load_cpu
from kernels.native.library import NativeError
from kernels.ops.common import NATIVE_DTYPES

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device of --device; "auto" takes CUDA when torch sees a GPU. Raise UsageError for a missing one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU; pass --device cpu or install a CUDA build of torch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def cpu_multiplies_bf16() -> bool:
    """Return whether the CPU has bf16 instructions. Without them bf16 on a CPU is correct and very slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of --dtype; "auto" takes bf16 on a GPU that has it, fp32 elsewhere.

    Raise UsageError for "bf16" on a GPU without it.
    """
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and not has_bf16:
        raise UsageError(f"--dtype bf16: {torch.cuda.get_device_name()} has no bf16; pass --dtype fp32")
    if name == "auto":
        name = "bf16" if device.type == "cuda" and has_bf16 else "fp32"
    return DTYPES[name]


def choose_kernels(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return what --kernels means: "triton", "native" or "ref". Raise UsageError where the kernels cannot run."""
    if name == "triton" and device.type == "cpu" and not kernels.INTERPRETED:
        raise UsageError("--kernels triton: they run on a GPU and the device is cpu; pass --kernels auto")
    if name == "native" or (device.type == "cpu" and name == "auto"):
        return choose_native(name, device, dtype)
    if name == "ref":
        return "ref"
    try:
        kernels.chip(device)  # raises for a GPU that the kernels do not support
    except ValueError as error:
        raise UsageError(f"--kernels {name}: {error}") from None
    return "triton"


def choose_native(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return "native" where csrc/cpu runs, else "ref" for "auto". Raise UsageError for "native" where it cannot run."""
    if device.type != "cpu" or dtype not in NATIVE_DTYPES:
        if name == "native":
            raise UsageError(f"--kernels native: it runs on the CPU in fp32 and bf16, this is {dtype} on {device}")
        return "ref"
    if name == "auto":
        return "ref" if kernels.INTERPRETED or find_cpu() is None else "native"
    try:
        load_cpu()
    except NativeError as error:
        raise UsageError(f"--kernels native: {error}") from None
    return "native"
