"""That ranks train right on one card, and that what a state holds comes back: what scripts.step.ranks checks.

One rank of FSDP2 (NCCL; gloo on a CPU) against none: losses, norms, a state that is saved while it trains. Then
engine.finetune, whole, on two ranks of one card, which NCCL refuses to share, so gloo carries what they exchange; where
it cannot, that is told. What is wrong raises Differs.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from engine import finetune
from engine.base.errors import exit_code_of
from engine.distributed.fsdp import shard_model
from engine.formats.find import list_checkpoints
from engine.output import checkpoint
from engine.output.folder import read_lines
from engine.output.saver import Saver
from kernels.measure.machine import DEVICE, GPU, free_memory
from scripts.step.bench import TOY_TOKENS, Steps, Variant
from scripts.step.common import DTYPE, peak_memory

ROOT = Path(__file__).parents[2]
ROUNDING = 2**-8 if GPU else 1e-5  # relative: of one number in bf16; of sums in fp32
RANKS_LIMIT_S = 150
BACKEND = "nccl" if GPU else "gloo"
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
NOT_POSSIBLE = 77  # exit code of a rank whose backend cannot do what ranks need


class Differs(Exception):
    """What should be the same and is not."""


def apart(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def insist(what: str, value: float, most: float) -> float:
    if not value <= most:  # a NaN is not
        raise Differs(f"{what}: {value:.2e} apart, wanted at most {most:.2e}")
    return value


def at_hand(variant: Variant, smoke: bool) -> Variant:
    """The variant at the size of this run; on a CPU by the references, as the interpreter's kernels take minutes."""
    variant = variant if GPU else replace(variant, impl="ref")
    return replace(variant, tokens=TOY_TOKENS // 2, steps=2, warmup=1) if smoke else variant


def about(variant: Variant, smoke: bool) -> dict:
    return asdict(variant) | {"dtype": str(DTYPE).removeprefix("torch.")} | ({"model": "toy"} if smoke else {})


# ---- blocks of steps ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank():
    """shard_model() over a process group of this process alone, on a mesh of its own: a World of one rank has none."""
    with tempfile.TemporaryDirectory(prefix="cria-store-") as folder:
        dist.init_process_group(BACKEND, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            mesh = init_device_mesh(DEVICE, (1,), mesh_dim_names=("shards",))
            yield partial(shard_model, world=SimpleNamespace(mesh=mesh))
        finally:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Block:
    """Steps 1 to n of a fresh model: seconds of the timed ones, losses and norms of all."""

    seconds: list[float]
    losses: list[float]
    norms: list[float]
    tokens: list[int]
    computed: list[int]
    micro_batches: list[int]
    memory: dict


def block(variant: Variant, smoke: bool, shard=None) -> Block:
    free_memory()  # the block before, whose model FSDP2 leaves in cycles
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    n = variant.warmup + variant.steps
    steps = Steps(variant, variant.tokens, n, smoke, shard)
    try:
        for step in range(1, n + 1):
            steps.take(step)
        steps.read()
        timed = slice(variant.warmup, None)
        return Block(
            steps.seconds()[timed], steps.losses, steps.norms, steps.tokens[timed], steps.computed[timed],
            steps.n_batches[timed], peak_memory(),
        )  # fmt: skip
    finally:
        steps.close()


def same_curve(ours: Block, wanted: Block) -> dict:
    """How far apart, relatively. Raises Differs where the first step is further than rounding takes it."""
    losses, norms = (list(map(apart, getattr(ours, name), getattr(wanted, name))) for name in ("losses", "norms"))
    return {
        "first_loss_apart": insist("loss of the first step", losses[0], ROUNDING),
        "first_norm_apart": insist("gradient norm of the first step", norms[0], ROUNDING),
        "largest_loss_apart": max(losses), "largest_norm_apart": max(norms),
    }  # fmt: skip


# ---- one rank -------------------------------------------------------------------------------------------------------


def collectives(device: str) -> None:
    """What FSDP2 and World ask of a backend, on the device: raises what it raises, Differs for a wrong result."""
    n, rank = dist.get_world_size(), dist.get_rank()
    total = torch.full((4,), rank + 1.0, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    whole = torch.empty(2 * n, dtype=torch.bfloat16, device=device)
    all_gather(whole, torch.full((2,), rank, dtype=torch.bfloat16, device=device))
    part = torch.empty(2, device=device)
    reduce_scatter(part, torch.arange(2.0 * n, device=device))
    for what, found, wanted in (
        ("all_reduce", total.tolist(), [n * (n + 1) / 2] * 4),
        ("all_gather", whole.tolist(), [r for r in range(n) for _ in range(2)]),
        ("reduce_scatter", part.tolist(), [n * (2.0 * rank + i) for i in range(2)]),
    ):
        if found != wanted:
            raise Differs(f"{what} over {n} ranks: {found}, wanted {wanted}")


def check_one_rank(variant: Variant, smoke: bool, spent=lambda: False) -> dict:
    """One rank of FSDP2 against none; a state saved while it trains, read back by both, and the run resumed from it."""
    variant = replace(at_hand(variant, smoke), steps=6, warmup=0)
    with one_rank() as cut, tempfile.TemporaryDirectory(prefix="cria-checks-") as folder:
        collectives(DEVICE)
        plain, sharded = block(variant, smoke), block(variant, smoke, cut)
        found = same_curve(sharded, plain)
        for name in ("loss", "norm"):
            insist(f"{name} of {variant.steps} steps", found[f"largest_{name}_apart"], 4 * ROUNDING)
        return {
            **about(variant, smoke), "backend": BACKEND, **found,
            **saved_and_resumed(variant, smoke, cut, Path(folder)),
        }  # fmt: skip


def saved_and_resumed(variant, smoke, cut, folder):
    half, n = variant.steps // 2, variant.steps

    def begun(how=None):
        return contextlib.closing(Steps(variant, variant.tokens, n, smoke, how))

    with begun(cut) as steps:
        saver = Saver(folder, keep=1, device=DEVICE)
        for step in range(1, half + 1):
            steps.take(step)
        saver.save(half, steps.optimizer.tensors(), {"n_updates": half})
        kept = {name: s.tensor.clone() for name, s in steps.optimizer.tensors().items()}
        for step in range(half + 1, n + 1):
            steps.take(step)
        steps.read()
        saved = saver.wait()
        saver.close()
        last = steps.losses[half:]
    found = checkpoint.open_checkpoint(saved.folder)
    for how in (None, cut):
        with begun(how) as steps:
            tensors = steps.optimizer.tensors()
            checkpoint.load(found, tensors)
            wrong = [name for name, s in tensors.items() if not torch.equal(s.tensor, kept[name])]
            if wrong or tensors.keys() != kept.keys():
                raise Differs(f"{len(wrong)} tensors of a state that was read back, {'sharded' if how else 'plain'}")
            steps.optimizer.n_updates = found.manifest["n_updates"]
            for step in range(half + 1, n + 1):
                steps.take(step)
            steps.read()
            resumed = max(map(apart, steps.losses, last))
            insist(f"losses after a resume, {'sharded' if how else 'plain'}", resumed, 4 * ROUNDING)
    return {"saved_bytes": saved.bytes, "read_back": "bit-equal, sharded and plain", "resumed_loss_apart": resumed}


# ---- two ranks ------------------------------------------------------------------------------------------------------


def check_two_ranks(smoke: bool, spent=lambda: False) -> dict:
    """engine.finetune, whole, on two ranks of one card beside the same run alone."""
    with tempfile.TemporaryDirectory(prefix="cria-ranks-") as folder:
        folder = Path(folder)
        write_rows(folder / "rows.json")
        two, one = folder / "two", folder / "one"
        ended = finetuned(folder, {two: 2, one: 1})
        if NOT_POSSIBLE in ended:
            return {"absent": f"not possible: {said(folder, 'not possible: ')}"}
        if any(ended):
            raise RuntimeError(f"exit codes {ended} of two ranks and of one: {said(folder, 'error: ')}")
        ours, wanted = (
            {key: [step[key] for step in read_lines(out / "metrics.jsonl") if step["event"] == "train"]
             for key in ("loss", "grad_norm", "tokens", "examples")}
            for out in (two, one)
        )  # fmt: skip
        for key in ("tokens", "examples"):
            if ours[key] != wanted[key] or not ours[key]:
                raise Differs(f"{key} a step: {ours[key]} of two ranks, {wanted[key]} of one")
        newest = list_checkpoints(two)[-1][1]
        files = checkpoint.open_checkpoint(newest).manifest["files"]
        if len(files) != 2:
            raise Differs(f"{newest.name} of two ranks is in {len(files)} files")
        loss, norm = (max(map(apart, ours[key], wanted[key])) for key in ("loss", "grad_norm"))
        return {
            "backend": "gloo", "dtype": "float32", "steps": len(ours["loss"]),
            "largest_loss_apart": insist("losses of two ranks and of one", loss, ROUNDING),
            "largest_norm_apart": insist("gradient norms of two ranks and of one", norm, ROUNDING),
        }  # fmt: skip


def write_rows(path):
    rows = [
        {"instruction": f"Say {i} in words.", "input": "n" * (i % 5), "output": "yes " * (1 + i * 7 % 23)}
        for i in range(24)
    ]
    path.write_text(json.dumps(rows))


def finetuned(folder: Path, runs: dict[Path, int]) -> list[int]:
    """Exit codes of engine.finetune's processes, all at once: {--out: ranks}."""
    children = []
    try:
        for out, ranks in runs.items():
            command = [sys.executable, "-c", "from scripts.step.rank_checks import as_rank; as_rank()"]
            command += ["--data", folder / "rows.json", "--out", out, *FINETUNE, "--device", DEVICE]
            port = free_port()
            for rank in range(ranks):
                place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "MASTER_PORT": port}
                environment = os.environ | {name: str(n) for name, n in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
                with open(folder / f"{out.name}-{rank}.log", "w") as log:
                    children.append(subprocess.Popen(
                        list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                    ))  # fmt: skip
        end = time.monotonic() + RANKS_LIMIT_S
        return [child.wait(max(1.0, end - time.monotonic())) for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()


FINETUNE = (
    "--model", "tiny", "--random-init", "--dtype", "fp32", "--lr", "1e-3", "--max-length", "64", "--replicas", "1",
    "--global-batch-size", "8", "--max-steps", "4", "--micro-batch-tokens", "128", "--save-every", "2",
    "--sample-every", "off", "--token-cache", "off", "--rank-timeout", "60",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def said(folder: Path, mark: str) -> str:
    """The first line with a mark that any rank wrote, or the last line of the first one that ended badly."""
    logs = [path.read_text().strip().splitlines() for path in sorted(folder.glob("*.log"))]
    marked = [text.split(mark, 1)[1] for log in logs for text in log if mark in text]
    return (marked or [log[-1] for log in logs if log] or ["nothing was said"])[0][:300]


def as_rank():
    """The process of a rank: engine.finetune, whose card other ranks share."""
    begin = dist.init_process_group

    def over_gloo(_, **options):
        begin("gloo", **options)
        try:
            collectives(DEVICE)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"not possible: gloo between ranks of one card: {first}", flush=True)
            os._exit(NOT_POSSIBLE)

    dist.init_process_group = over_gloo
    sys.exit(exit_code_of(finetune.main))
