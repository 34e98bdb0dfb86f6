"""Checks of scripts.step.ranks: ranks on one card train right, and a saved state comes back bit for bit.

First one rank of FSDP2 (NCCL; gloo on a CPU) is held against a run without ranks: losses, norms, and a state that is
saved while the run trains. Then the whole engine.finetune runs on two ranks of one card. NCCL refuses to share a card,
so gloo carries their messages, and a card on which gloo cannot is reported as absent. A wrong result raises Differs.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from engine import finetune
from engine.base.errors import run_main
from engine.distributed.fsdp import shard_model
from engine.formats.find import list_checkpoints
from engine.output import checkpoint
from engine.output.folder import read_metrics
from engine.output.saver import Saver
from kernels.measure.machine import DEVICE, GPU, free_memory
from scripts.base.results import ROOT
from scripts.step.bench import Steps, Variant
from scripts.step.figures import peak_memory, reset_peak_memory
from scripts.step.rows import TOY_TOKENS

ROUNDING = 2**-8 if GPU else 1e-5  # relative error of one number in bf16, of sums in fp32
RANKS_LIMIT_S = 150
BACKEND = "nccl" if GPU else "gloo"
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
NOT_POSSIBLE = 77  # exit code of a rank whose backend cannot do what ranks need


class Differs(Exception):
    """Two results that must agree differ."""


def relative_difference(a: float, b: float) -> float:
    """Return |a - b| / |b|."""
    return abs(a - b) / abs(b)


def check_difference(what: str, value: float, most: float) -> float:
    """Return the difference, or raise Differs if it is larger than `most` or NaN."""
    if not value <= most:
        raise Differs(f"{what}: {value:.2e} apart, wanted at most {most:.2e}")
    return value


def variant_here(variant: Variant, smoke: bool) -> Variant:
    """Return the variant at the size of this run. A CPU uses the references: the interpreter's kernels take minutes."""
    variant = variant if GPU else replace(variant, impl="ref")
    return replace(variant, tokens=TOY_TOKENS // 2, steps=2, warmup=1) if smoke else variant


# ---- blocks of steps ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank():
    """Yield engine.distributed's shard_model() for a process group of this process only.

    The mesh is made here, because a World of one rank has none.
    """
    with tempfile.TemporaryDirectory(prefix="cria-store-") as folder:
        dist.init_process_group(BACKEND, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            mesh = init_device_mesh(DEVICE, (1,), mesh_dim_names=("shards",))
            yield partial(shard_model, world=SimpleNamespace(mesh=mesh))
        finally:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Block:
    """Steps of a fresh model: seconds and counts of the timed steps, losses and norms of all."""

    seconds: list[float]
    losses: list[float]
    norms: list[float]
    tokens: list[int]
    computed: list[int]
    micro_batches: list[int]
    memory: dict


def run_block(variant: Variant, smoke: bool, shard=None) -> Block:
    """Take warm-up and timed steps of a fresh model, sharded if a shard function is given."""
    free_memory()  # the model of the block before, which FSDP2 leaves in reference cycles
    reset_peak_memory()
    n = variant.warmup + variant.steps
    steps = Steps(variant, variant.tokens, n, smoke, shard)
    try:
        for step in range(1, n + 1):
            steps.run(step)
        steps.read_figures()
        timed = slice(variant.warmup, None)
        return Block(
            steps.seconds()[timed], steps.losses, steps.norms, steps.tokens[timed], steps.computed[timed],
            steps.n_batches[timed], peak_memory(),
        )  # fmt: skip
    finally:
        steps.close()


def compare_curves(ours: Block, wanted: Block) -> dict:
    """Return the relative differences. Raise Differs if those of the first step are larger than rounding."""
    losses, norms = (
        list(map(relative_difference, getattr(ours, name), getattr(wanted, name))) for name in ("losses", "norms")
    )
    return {
        "first_loss_apart": check_difference("loss of the first step", losses[0], ROUNDING),
        "first_norm_apart": check_difference("gradient norm of the first step", norms[0], ROUNDING),
        "largest_loss_apart": max(losses), "largest_norm_apart": max(norms),
    }  # fmt: skip


# ---- one rank -------------------------------------------------------------------------------------------------------


def check_collectives(device: str) -> None:
    """Run the collectives that FSDP2 and World need. Raise what the backend raises, or Differs for a wrong result."""
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


def check_one_rank(variant: Variant, smoke: bool, is_time_up=lambda: False) -> dict:
    """Hold one rank of FSDP2 against a plain run, and resume both from a state saved while the sharded run trains."""
    variant = replace(variant_here(variant, smoke), steps=6, warmup=0)
    with one_rank() as shard, tempfile.TemporaryDirectory(prefix="cria-checks-") as folder:
        check_collectives(DEVICE)
        plain, sharded = run_block(variant, smoke), run_block(variant, smoke, shard)
        found = compare_curves(sharded, plain)
        for name in ("loss", "norm"):
            check_difference(f"{name} of {variant.steps} steps", found[f"largest_{name}_apart"], 4 * ROUNDING)
        return {
            **variant.describe(smoke), "backend": BACKEND, **found,
            **check_save_and_resume(variant, smoke, shard, Path(folder)),
        }  # fmt: skip


def check_save_and_resume(variant, smoke, shard, folder) -> dict:
    """Save a sharded run's state halfway while it trains on, and read it back sharded and plain."""
    half, n = variant.steps // 2, variant.steps
    with contextlib.closing(Steps(variant, variant.tokens, n, smoke, shard)) as steps:
        saver = Saver(folder, keep=1, device=DEVICE)
        for step in range(1, half + 1):
            steps.run(step)
        saver.save(half, steps.optimizer.tensors(), {"n_updates": half})
        kept = {name: s.tensor.clone() for name, s in steps.optimizer.tensors().items()}
        for step in range(half + 1, n + 1):
            steps.run(step)
        steps.read_figures()
        saved = saver.wait()
        saver.close()
        last = steps.losses[half:]
    for kind, how in (("plain", None), ("sharded", shard)):
        with contextlib.closing(Steps(variant, variant.tokens, n, smoke, how)) as steps:
            resumed = resume_and_compare(steps, saved.folder, kept, half, last, kind)
    return {"saved_bytes": saved.bytes, "read_back": "bit-equal, sharded and plain", "resumed_loss_apart": resumed}


def resume_and_compare(steps, folder, kept, half, last, kind) -> float:
    """Load a state, take the steps after it, and return the largest relative difference of their losses."""
    found, tensors = checkpoint.open_checkpoint(folder), steps.optimizer.tensors()
    checkpoint.load(found, tensors)
    wrong = [name for name, s in tensors.items() if not torch.equal(s.tensor, kept[name])]
    if wrong or tensors.keys() != kept.keys():
        raise Differs(f"{len(wrong)} tensors of a state that was read back, {kind}")
    steps.optimizer.n_updates = found.manifest["n_updates"]
    for step in range(half + 1, steps.n_steps + 1):
        steps.run(step)
    steps.read_figures()
    resumed = max(map(relative_difference, steps.losses, last))
    return check_difference(f"losses after a resume, {kind}", resumed, 4 * ROUNDING)


# ---- two ranks ------------------------------------------------------------------------------------------------------


FINETUNE = (
    "--model", "tiny", "--random-init", "--dtype", "fp32", "--lr", "1e-3", "--max-length", "320", "--replicas", "1",
    "--global-batch-size", "8", "--max-steps", "4", "--micro-batch-tokens", "400", "--save-every", "2",
    "--sample-every", "off", "--token-cache", "off", "--rank-timeout", "60",
)  # fmt: skip
RANK_CODE = "from scripts.step.rank_checks import run_as_rank; run_as_rank()"


def check_two_ranks(smoke: bool, is_time_up=lambda: False) -> dict:
    """Run engine.finetune on two ranks of one card, hold it against one rank, and check the state they saved."""
    with tempfile.TemporaryDirectory(prefix="cria-ranks-") as folder:
        folder = Path(folder)
        write_rows(folder / "rows.json")
        write_tokenizer(folder / "tokenizer")
        two, one = folder / "two", folder / "one"
        codes = finetune_with_ranks(folder, {two: 2, one: 1})
        if NOT_POSSIBLE in codes:
            return {"absent": f"not possible: {find_message(folder, 'not possible: ')}"}
        if any(codes):
            raise RuntimeError(f"exit codes {codes} of two ranks and of one: {find_message(folder, 'error: ')}")
        ours, wanted = read_training_lines(two), read_training_lines(one)
        for key in ("tokens", "examples"):
            if ours[key] != wanted[key] or not ours[key]:
                raise Differs(f"{key} a step: {ours[key]} of two ranks, {wanted[key]} of one")
        newest = list_checkpoints(two)[-1][1]
        files = checkpoint.open_checkpoint(newest).manifest["files"]
        if len(files) != 2:
            raise Differs(f"{newest.name} of two ranks is in {len(files)} files")
        loss, norm = (max(map(relative_difference, ours[key], wanted[key])) for key in ("loss", "grad_norm"))
        return {
            "backend": "gloo", "dtype": "float32", "steps": len(ours["loss"]),
            "largest_loss_apart": check_difference("losses of two ranks and of one", loss, ROUNDING),
            "largest_norm_apart": check_difference("gradient norms of two ranks and of one", norm, ROUNDING),
        }  # fmt: skip


def write_rows(path: Path) -> None:
    """Write 24 short Alpaca rows of many lengths."""
    rows = [
        {"instruction": f"Say {i} in words.", "input": "n" * (i % 5), "output": "yes " * (1 + i * 7 % 23)}
        for i in range(24)
    ]
    path.write_text(json.dumps(rows))


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes, so that the check needs no model that the machine may lack."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": special[0], "eos_token": special[1], "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def read_training_lines(out: Path) -> dict[str, list]:
    """Return the figures of every step in an output folder's metrics.jsonl, by name."""
    lines = [line for line in read_metrics(out / "metrics.jsonl") if line["event"] == "train"]
    return {key: [line[key] for line in lines] for key in ("loss", "grad_norm", "tokens", "examples")}


def finetune_with_ranks(folder: Path, runs: dict[Path, int]) -> list[int]:
    """Run engine.finetune once for each {--out: number of ranks}, all at the same time. Return every exit code."""
    children = []
    try:
        for out, n_ranks in runs.items():
            port = find_free_port()
            for rank in range(n_ranks):
                place = {"RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_RANK": 0, "MASTER_PORT": port}
                children.append(start_rank(folder, out, {name: str(n) for name, n in place.items()}))
        end = time.monotonic() + RANKS_LIMIT_S
        return [child.wait(max(1.0, end - time.monotonic())) for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()


def start_rank(folder: Path, out: Path, place: dict[str, str]) -> subprocess.Popen:
    """Start the process of one rank. Its place among the ranks is given by environment variables."""
    command = [sys.executable, "-c", RANK_CODE, *finetune_flags(folder, out)]
    environment = os.environ | place | {"MASTER_ADDR": "127.0.0.1"}
    with open(folder / f"{out.name}-{place['RANK']}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finetune_flags(folder: Path, out: Path) -> list[str]:
    """Return the flags of engine.finetune with the files of this check."""
    files = ["--data", folder / "rows.json", "--tokenizer", folder / "tokenizer", "--out", out]
    return [*map(str, files), *FINETUNE, "--device", DEVICE]


def find_free_port() -> int:
    """Return a TCP port that no process uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def find_message(folder: Path, mark: str) -> str:
    """Return the first line with a mark from any rank's log, after the mark, or the last line of the first log."""
    logs = [path.read_text().strip().splitlines() for path in sorted(folder.glob("*.log"))]
    marked = [text.split(mark, 1)[1] for log in logs for text in log if mark in text]
    return (marked or [log[-1] for log in logs if log] or ["nothing was said"])[0][:300]


def run_as_rank() -> None:
    """Run engine.finetune as one of several ranks on one card, with gloo in place of NCCL."""
    init_process_group = dist.init_process_group

    def init_with_gloo(_, **options):
        init_process_group("gloo", **options)
        try:
            check_collectives(DEVICE)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"not possible: gloo between ranks of one card: {first}", flush=True)
            os._exit(NOT_POSSIBLE)

    dist.init_process_group = init_with_gloo
    sys.exit(run_main(finetune.main))
