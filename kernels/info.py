"""What of the kernels is in use on this machine, and why.

    python -m kernels.info
    python -m kernels.info --json info.json
    CRIA_NATIVE=off python -m kernels.info

Prints the GPU, the Triton and torch versions, and each library of csrc: whether it is in use, what it was built with or
why it is not there, and what does its work instead. Always exits with 0: a missing library is no error.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from kernels import chip
from kernels.base.commands import run_command
from kernels.base.help_text import HelpParser
from kernels.compiled.machine_library import PtxError, load_library
from kernels.native.cpu import load_cpu
from kernels.native.cuda import load_cuda
from kernels.native.library import FOLDER, NativeError

INSTEAD = {  # what does the work of a library that is not in use
    "cpu": "torch's operators on the CPU",
    "cuda": "the Triton kernels",
    "ptx_machine": "nothing: kernels.simulate and its tests need it",
}


@dataclass(frozen=True)
class Part:
    """One thing that kernels may run on or with."""

    name: str
    in_use: bool
    why: str


def describe_gpu() -> Part:
    """Return the GPU, or why there is none."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        return Part("gpu", True, f"{torch.cuda.get_device_name()}, launches of {chip(device)}")
    built = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    return Part("gpu", False, f"{built}; every op runs its reference on the CPU")


def describe_library(name: str) -> Part:
    """Return whether a library of csrc is in use, and what it was built with or why it is not in use."""
    try:
        if name == "cpu":
            library = load_cpu()
            used = f"instruction set {library.cria_instruction_set().decode()}"
            used += f"{' and AMX' if library.cria_has_amx() else ''}, {torch.get_num_threads()} threads"
        elif name == "cuda":
            load_cuda()
            used = "only where it is chosen, impl='cuda'"
        else:
            load_library()
            used = "runs compiled kernels without a GPU"
    except (NativeError, PtxError) as error:
        return Part(name, False, f"{error}; in its place: {INSTEAD[name]}")
    record = FOLDER / "build.json"
    records = json.loads(record.read_text()) if record.exists() else {}
    built = records[name]["why"] if name in records else "built elsewhere"
    if name == "cpu" and os.environ.get("CRIA_NATIVE") == "off":
        return Part(name, False, f"CRIA_NATIVE=off; in its place: {INSTEAD[name]}")
    if name == "cuda" and not torch.cuda.is_available():
        return Part(name, False, f"no GPU here; built with {built}")
    return Part(name, True, f"{used}; built with {built}")


def main() -> None:
    """Print one line for each part."""
    parser = HelpParser("kernels.info", __doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is printed there too")
    args = parser.parse_args()
    versions = Part("triton", torch.cuda.is_available(), f"Triton {triton.__version__}, torch {torch.__version__}")
    parts = [describe_gpu(), versions, *map(describe_library, INSTEAD)]
    for part in parts:
        print(f"{part.name:12} {'in use' if part.in_use else 'not in use':11} {part.why}")
    if args.json:
        args.json.write_text(json.dumps([asdict(part) for part in parts], indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
