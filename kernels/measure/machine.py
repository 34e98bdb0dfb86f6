"""The machine that measures: its device, its facts, and the files its figures are written to."""

import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton

from kernels.ops.common import INTERPRETED

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
IMPL = "triton" if GPU or INTERPRETED else "ref"
PACKAGES = ("liger-kernel", "cut-cross-entropy", "flashoptim", "bitsandbytes", "torchao", "transformers")


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def query_nvidia_smi(*fields: str) -> dict[str, str] | None:
    """Return what nvidia-smi reports of the first card by field, or None if it does not run."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in out.strip().split(",")), strict=False))


def describe_machine() -> dict[str, Any]:
    """Return the device and the versions that every record of measurements begins with."""
    facts = {
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d"),
        "packages": {name: installed_version(name) for name in PACKAGES},
    }  # fmt: skip
    if not GPU:
        return {"device": "CPU, Triton's interpreter" if INTERPRETED else "CPU", **facts}
    card = torch.cuda.get_device_properties(0)
    return {
        "device": card.name, "capability": f"sm_{card.major}{card.minor}", "sms": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size, "memory_bytes": card.total_memory,
        "driver": (query_nvidia_smi("driver_version") or {}).get("driver_version"), **facts,
    }  # fmt: skip


def free_memory() -> None:
    """Collect garbage and give the GPU's cached memory back to the driver."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def write_json(path: str | Path, data: Any) -> None:
    """Write data as JSON. A reader finds the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)
