"""NF4 with double quantisation against bitsandbytes on a CPU, bit for bit, and how fast both are.

    python -m scripts.parity.nf4 --json benchmarks/nf4.json

bitsandbytes is installed into an environment of its own. Both sides quantise random tensors of many shapes, types and
sizes of numbers, and every matrix of SmolLM2-135M in bf16, and compare digests of the codes, the codes of the maxima,
their maxima, the mean, and the numbers in fp32 and bf16. Exits 1 if one differs. Seconds are the processes' CPU seconds
in one thread, taken in turns.
"""

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import kernels
from engine.formats.find import find_model
from engine.formats.names import list_pieces
from engine.formats.pieces import read_piece
from engine.formats.source import open_source
from engine.model.config import EMBEDDED_MODEL
from kernels.base.commands import run_command
from scripts.base.environment import make_environment
from scripts.base.results import describe_cpu, new_json_parser, summarize, today, write_json

PACKAGES = ("bitsandbytes>=0.50,<0.51", f"torch=={torch.__version__.partition('+')[0]}", "numpy")
SHAPES = (
    (1,), (2,), (7,), (64,), (65,), (4, 16), (5, 66), (5, 80), (3, 67), (129, 63), (1000, 192), (256, 64), (257, 64),
    (192, 576), (576, 576), (1536, 576), (1024, 4096),
)  # fmt: skip
SCALES = (1e-30, 1e-4, 0.02, 1.0, 3e4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("codes", "absmax codes", "absmax2", "offset", "fp32", "bf16")
TIMED = (4096, 4096)
PEER = """
import hashlib, json, sys, time
import torch
from bitsandbytes import functional

def digest(t):
    return hashlib.sha256(t.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()

def quantise(w):
    return functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")

def numbers(codes, state, shape, dtype):
    state.shape, state.dtype = shape, dtype
    return functional.dequantize_4bit(codes, state)

def answer(file):
    w = torch.load(file)
    codes, state = quantise(w)
    parts = [codes, state.absmax, state.state2.absmax, state.offset]
    flat = [numbers(codes, state, torch.Size([w.numel()]), dtype) for dtype in (torch.float32, torch.bfloat16)]
    shaped = numbers(codes, state, w.shape, torch.float32)
    return {"digests": [digest(t) for t in (*parts, *flat)], "shape matters": digest(shaped) != digest(flat[0])}

def measure(file, rounds=2):
    w = torch.load(file)
    seconds = []
    for i in range(rounds + 1):
        start = time.process_time()
        codes, state = quantise(w)
        middle = time.process_time()
        numbers(codes, state, w.shape, torch.bfloat16)
        seconds.append((middle - start, time.process_time() - middle))
    return [min(column) for column in zip(*seconds[1:])]

torch.set_num_threads(1)
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    command, file = json.loads(line)
    print(json.dumps({"answer": answer, "measure": measure}[command](file)), flush=True)
"""


class Peer:
    """bitsandbytes in a process of its own environment, which answers lines of JSON."""

    def __init__(self, python: Path, folder: Path) -> None:
        command = ["env", "-u", "PYTHONPATH", "OMP_NUM_THREADS=1", "TORCH_COMPILE_DISABLE=1", str(python), "-c", PEER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)
        self.file = folder / "tensor.pt"
        self.read()

    def read(self) -> Any:
        """Return the next answer. Raises RuntimeError if the process has ended."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RuntimeError(f"bitsandbytes' process ended with code {self.process.wait()}; its error is above")
        return json.loads(line)

    def ask(self, command: str, tensor: torch.Tensor) -> Any:
        """Return what the process answers to a command on a tensor."""
        torch.save(tensor, self.file)
        if self.process.stdin:
            print(json.dumps([command, str(self.file)]), file=self.process.stdin, flush=True)
        return self.read()


def digest(t: torch.Tensor) -> str:
    """Return the digest of a tensor's bytes."""
    return hashlib.sha256(t.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def random_tensors() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every shape, type and scale; rows differ in size, and some blocks are zeros."""
    for shape in SHAPES:
        for scale in SCALES if math.prod(shape) < 1e5 else (0.02,):
            for name, dtype in DTYPES.items():
                weight = torch.randn(shape) * torch.rand(shape[0], *[1] * (len(shape) - 1)) * scale
                weight.view(-1)[128:256] = 0
                if weight.to(dtype).isfinite().all():
                    yield f"{shape} {name} {scale}", weight.to(dtype)


def model_tensors() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, matrix in bf16) of SmolLM2-135M."""
    source = open_source(find_model(EMBEDDED_MODEL))
    for name, piece in list_pieces(source.config, source.kind).items():
        if len(piece.shape) == 2 and name in source.stored:
            weight = torch.empty(piece.shape, dtype=torch.bfloat16)
            read_piece(source.path, name, source.stored[name], piece, weight)
            yield name, weight


def compare(peer: Peer, tensors: Iterator[tuple[str, torch.Tensor]]) -> dict:
    """Return how many tensors and numbers were compared, how many of each part differ, and what the shape changes.

    A part differs too where our reference and our C++ are not equal.
    """
    counts: dict[str, Any] = {"tensors": 0, "numbers": 0, "different": dict.fromkeys(PARTS, 0), "shape_matters": []}
    for name, weight in tensors:
        theirs = peer.ask("answer", weight)
        counts["tensors"] += 1
        counts["numbers"] += weight.numel()
        if theirs["shape matters"]:
            counts["shape_matters"].append(name)
        for impl in ("ref", "auto"):
            q = kernels.quantise_nf4(weight, impl)
            numbers = [kernels.dequantise_nf4(q, dtype, impl=impl) for dtype in (torch.float32, torch.bfloat16)]
            for part, ours, wanted in zip(PARTS, (*q.tensors, *numbers), theirs["digests"], strict=True):
                if digest(ours) != wanted:
                    print(f"{name}, {impl}: {part} differs", file=sys.stderr)
                    counts["different"][part] += 1
    return counts


def measure(peer: Peer, rounds: int) -> dict:
    """Return the CPU seconds a billion numbers of each side and step: bf16 to NF4, and back into bf16."""
    weight = torch.randn(TIMED).bfloat16()
    q, out = kernels.quantise_nf4(weight), torch.empty_like(weight)
    runs: dict[str, Callable[[], object]] = {
        "quantise": lambda: kernels.quantise_nf4(weight),
        "quantise, reference": lambda: kernels.quantise_nf4(weight, "ref"),
        "dequantise": lambda: kernels.dequantise_nf4(q, out=out),
        "dequantise, reference": lambda: kernels.dequantise_nf4(q, out=out, impl="ref"),
        "copy": lambda: out.copy_(weight),
    }
    spent: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds = []
            for _ in range(3):
                start = time.process_time()
                run()
                seconds.append(time.process_time() - start)
            spent.setdefault(name, []).append(min(seconds[1:]))
        both = peer.ask("measure", weight)
        for name, seconds in zip(("quantise, bitsandbytes", "dequantise, bitsandbytes"), both, strict=True):
            spent.setdefault(name, []).append(seconds)
    return {name: summarize(s / weight.numel() * 1e9 for s in seconds) for name, seconds in spent.items()}


def main() -> None:
    """Compare, measure and write the figures; exit with 1 if bits differ."""
    parser = new_json_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as tmp:
        commands, versions = make_environment(Path(tmp) / "environment", PACKAGES)
        peer = Peer(commands / "python", Path(tmp))
        compared = {"random": compare(peer, random_tensors()), EMBEDDED_MODEL: compare(peer, model_tensors())}
        seconds = measure(peer, args.rounds)
        peer.process.terminate()
    q = kernels.quantise_nf4(torch.ones(TIMED, dtype=torch.bfloat16))
    result = {
        "what": "NF4 against bitsandbytes on a CPU: digests of every part, CPU seconds a billion numbers",
        "compared": compared, "seconds_per_billion": seconds, "bits_a_number": 8 * q.n_bytes / (TIMED[0] * TIMED[1]),
        "bitsandbytes": versions["bitsandbytes"], "torch": torch.__version__, "date": today(), **describe_cpu(),
    }  # fmt: skip
    write_json(args.json, result)
    for name, counts in compared.items():
        print(f"{name}: {counts['tensors']} tensors, {counts['numbers']:,} numbers, different: {counts['different']}")
    print("\n".join(f"{name}: {s['median']:.2f} s a billion" for name, s in seconds.items()))
    sys.exit(any(any(counts["different"].values()) for counts in compared.values()))


if __name__ == "__main__":
    run_command(main)
