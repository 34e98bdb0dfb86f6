"""What one card tells of ranks: the cost of FSDP2, that of a state which is written meanwhile, and that both are right.

    python -m scripts.rank_bench [--only NAME ...] [--json FILE] [--minutes M] [--smoke]

one rank   scripts.step_bench's step of a model that engine.distributed.shard() cut over one rank, over the plain step.
           A run of one rank never shards: this is what FSDP2 itself takes, beside what goes over wires. At this size
           it copies what it would gather and reduce, so NCCL carries nothing. Blocks of both alternate, each from
           fresh weights, as two models of 7B do not fit a card; a ratio is that of two neighbours' median steps.
saves      steps while engine.checkpoint.Saver writes their whole state, between steps of the same run without.
checks     losses, norms and states: of one rank against none; of engine.finetune on two ranks of one card, which NCCL
           refuses to share, so gloo carries what they exchange. Where it cannot, that is told.

What was wrong is recorded as failed, without a time. Part of scripts.gpu_report.
"""

import contextlib
import json
import os
import shutil
import socket
import statistics
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

from engine import checkpoint, finetune
from engine.distributed import shard
from engine.errors import exit_code_of
from engine.fit import is_out_of_memory
from engine.run import read_lines
from kernels.bench import DEVICE, GPU, free
from scripts.step_bench import TOY_TOKENS, Steps, Variant
from scripts.step_common import (
    ALPACA_ROWS,
    DTYPE,
    ROWS,
    Records,
    card,
    in_processes,
    line,
    parse,
    peak_memory,
    shape,
    speed,
)

ROOT = Path(__file__).parent.parent
ROUNDING = 2**-8 if GPU else 1e-5  # relative: of one number in bf16; of sums in fp32
EPOCH = -(-ALPACA_ROWS // ROWS)  # steps
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


# ---- one rank -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank():
    """shard() over a process group of this process alone, on a mesh of its own: a World of one rank has none."""
    with tempfile.TemporaryDirectory(prefix="cria-store-") as folder:
        dist.init_process_group(BACKEND, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            mesh = init_device_mesh(DEVICE, (1,), mesh_dim_names=("shards",))
            yield partial(shard, world=SimpleNamespace(mesh=mesh))
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
    free()  # the block before, whose model FSDP2 leaves in cycles
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


def over_plain(variant: Variant, n_pairs: int, smoke: bool, spent=lambda: False) -> dict:
    """FSDP2's step over the plain one, in pairs of blocks whose order alternates. Where both do not fit, neither keeps
    an fp32 master: micro-batches of half the tokens would gather and reduce twice as often."""
    variant = at_hand(variant, smoke)
    try:
        return pairs(variant, n_pairs, smoke, spent)
    except Exception as error:
        if not is_out_of_memory(error) or variant.master == "stochastic":
            raise
        said = str(error).split(". ")[0]
    record = pairs(replace(variant, master="stochastic"), n_pairs, smoke, spent)
    return record | {"out_of_memory": f"with master {variant.master}: {said}"}


def pairs(variant, n_pairs, smoke, spent):
    plain, sharded = [], []
    with one_rank() as cut:
        for i in range(2 if smoke else n_pairs):
            both = [(plain, None), (sharded, cut)]
            for blocks, how in both if i % 2 == 0 else reversed(both):
                blocks.append(block(variant, smoke, how))
            if spent():
                break
        free()
    ratios = [statistics.median(b.seconds) / statistics.median(a.seconds) for a, b in zip(plain, sharded, strict=True)]
    n_parameters = shape(variant.model, smoke).n_parameters
    together = {name: [x for b in sharded for x in getattr(b, name)] for name in ("tokens", "computed", "seconds")}
    return {
        **about(variant, smoke), "backend": BACKEND, "pairs": len(ratios),
        "over_plain": statistics.median(ratios), "over_plain_min": min(ratios), "over_plain_max": max(ratios),
        "plain_step_s_median": statistics.median(s for b in plain for s in b.seconds),
        **speed(n_parameters, **together, card=card()), "micro_batches_a_step": statistics.mean(plain[0].micro_batches),
        **largest_memory(sharded), **{f"plain_{name}": gib for name, gib in largest_memory(plain).items()},
        **same_curve(sharded[0], plain[0]),
    }  # fmt: skip


def largest_memory(blocks):
    return {name: gib and max(b.memory[name] for b in blocks) for name, gib in blocks[0].memory.items()}


def same_curve(ours: Block, wanted: Block) -> dict:
    """How far apart, relatively. Raises Differs where the first step is further than rounding takes it."""
    losses, norms = (list(map(apart, getattr(ours, name), getattr(wanted, name))) for name in ("losses", "norms"))
    return {
        "first_loss_apart": insist("loss of the first step", losses[0], ROUNDING),
        "first_norm_apart": insist("gradient norm of the first step", norms[0], ROUNDING),
        "largest_loss_apart": max(losses), "largest_norm_apart": max(norms),
    }  # fmt: skip


# ---- saves ----------------------------------------------------------------------------------------------------------


class Absent(Exception):
    """Why something is not measured here."""


def saves(variant: Variant, n_saves: int, most_steps: int, where: str | None, smoke: bool, spent=lambda: False) -> dict:
    """Steps beside saves of the whole state, each removed when it is written.

    Cost of a save: what its steps, from the one at whose end it was asked for, take longer than as many without.
    where: a folder; None: the temporary one. most_steps: that all of it may take.
    """
    variant = at_hand(variant, smoke)
    with tempfile.TemporaryDirectory(prefix="cria-saves-", dir=where) as folder:
        steps = Steps(variant, variant.tokens, most_steps, smoke)
        saver = checkpoint.Saver(Path(folder), keep=1, device=DEVICE)
        try:
            need_room(sum(s.tensor.nbytes for s in steps.optimizer.tensors().values()), Path(folder))
            found = timeline(steps, saver, variant, n_saves, most_steps, spent)
        except Absent as reason:
            return {**about(variant, smoke), "absent": str(reason)}
        finally:
            saver.close()
            steps.close()
        return {**about(variant, smoke), **found, "folder": f"{folder_of(folder)} ({filesystem(folder)})"}


def timeline(steps, saver, variant, n_saves, most_steps, spent):
    taken, without, during, written = 0, [], [], []  # indices of steps

    def take() -> int:
        nonlocal taken
        if taken == most_steps:
            raise TimeoutError(f"save {len(written) + 1} is not written after {most_steps} steps")
        steps.take(taken := taken + 1)
        return taken - 1

    for _ in range(n_saves):
        for _ in range(variant.warmup):  # also what a removed state leaves the disk to do
            take()
        without += [take() for _ in range(variant.steps)]
        last = take()
        saver.save(taken, steps.optimizer.tensors(), {"n_updates": steps.optimizer.n_updates})
        beside = [last]
        while (saved := saver.poll()) is None:
            beside.append(take())
        during.append(beside)
        written.append(saved)
        shutil.rmtree(saved.folder)
        if spent():
            break
    steps.read()
    return costs(steps.seconds(), without, during, written)


def costs(seconds: list[float], without: list[int], during: list[list[int]], written: list) -> dict:
    """Of steps' seconds, which of them were without a save, which beside each one, and what the Saver told."""
    plain = statistics.median(seconds[i] for i in without)
    found = []
    for (first, *rest), saved in zip(during, written, strict=True):
        meanwhile = statistics.median(seconds[i] for i in rest) if rest else None
        found.append({
            "held_s": saved.held_seconds, "copy_s": seconds[first] - plain, "write_s": saved.seconds,
            "gb_per_s": saved.bytes / 1e9 / saved.seconds, "steps_meanwhile": len(rest), "step_s_median": meanwhile,
            "meanwhile_over_unsaved": meanwhile and meanwhile / plain,
            "lost_s": sum(seconds[i] - plain for i in (first, *rest)),
        })  # fmt: skip
    later = found[1:] or found  # the first takes the memory of the copy
    middle = {name: middle_of([save[name] for save in later]) for name in found[0]}
    slow = [save["meanwhile_over_unsaved"] for save in later if save["meanwhile_over_unsaved"]]

    def over_unsaved(every):
        waits = max(0.0, middle["write_s"] - every * plain)  # of the next save for this one
        return 1 + (middle["lost_s"] + waits) / (every * plain)

    return {
        "bytes": written[0].bytes, "unsaved_step_s_median": plain, "unsaved_steps": len(without), **middle,
        "meanwhile_over_unsaved_min": min(slow, default=None), "meanwhile_over_unsaved_max": max(slow, default=None),
        "over_unsaved_at_100": over_unsaved(100), "over_unsaved_an_epoch": over_unsaved(EPOCH),
        "first_held_s": found[0]["held_s"], "first_lost_s": found[0]["lost_s"], "saves": found,
    }  # fmt: skip


def middle_of(values):
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None


def need_room(state_bytes: int, folder: Path):
    """Raises Absent unless the folder holds a state and the host's memory a copy; of a folder in memory, both."""
    disk, memory = shutil.disk_usage(folder).free, memory_available()
    copies = 2 if filesystem(folder) == "tmpfs" else 1
    for what, free_bytes, n in ((f"{folder_of(folder)} has", disk, 1), ("the host's memory has", memory, copies)):
        if free_bytes < 1.1 * n * state_bytes:
            raise Absent(f"{what} {free_bytes / 1e9:.1f} GB free, wanted {1.1 * n * state_bytes / 1e9:.1f}")


def memory_available() -> int:
    figures = dict(text.split(":") for text in Path("/proc/meminfo").read_text().splitlines())
    return int(figures["MemAvailable"].split()[0]) * 1024


def filesystem(folder) -> str:
    """Its kind: "ext4", "tmpfs", ..."""
    mounts = [text.split()[1:3] for text in Path("/proc/self/mounts").read_text().splitlines()]
    path = Path(folder).resolve()
    return max((len(at), kind) for at, kind in mounts if path.is_relative_to(at))[1]


def folder_of(folder) -> Path:
    return Path(folder).parent


# ---- checks ---------------------------------------------------------------------------------------------------------


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
        saver = checkpoint.Saver(folder, keep=1, device=DEVICE)
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
    manifest = checkpoint.verify(saved.folder)
    for how in (None, cut):
        with begun(how) as steps:
            tensors = steps.optimizer.tensors()
            checkpoint.load(saved.folder, tensors)
            wrong = [name for name, s in tensors.items() if not torch.equal(s.tensor, kept[name])]
            if wrong or tensors.keys() != kept.keys():
                raise Differs(f"{len(wrong)} tensors of a state that was read back, {'sharded' if how else 'plain'}")
            steps.optimizer.n_updates = manifest["n_updates"]
            for step in range(half + 1, n + 1):
                steps.take(step)
            steps.read()
            resumed = max(map(apart, steps.losses, last))
            insist(f"losses after a resume, {'sharded' if how else 'plain'}", resumed, 4 * ROUNDING)
    return {"saved_bytes": saved.bytes, "read_back": "bit-equal, sharded and plain", "resumed_loss_apart": resumed}


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
        newest = checkpoint.checkpoints(two)[-1][1]
        files = checkpoint.verify(newest)["files"]
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
            command = [sys.executable, "-c", "from scripts.rank_bench import as_rank; as_rank()"]
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


# ---- what there is --------------------------------------------------------------------------------------------------

SMALL, LARGE = Variant("tinyllama-1.1b", steps=8, warmup=2), Variant("llama-7b", steps=5, warmup=2)
MEMORY = "/dev/shm"
VARIANTS = {  # what tells most a second comes first; names are unique, and targets.json selects by them
    "checks, one rank": partial(check_one_rank, Variant("smollm2-135m", tokens=8320)),
    "tinyllama-1.1b, one rank": partial(over_plain, SMALL, 4),
    "tinyllama-1.1b, saves": partial(saves, SMALL, 3, 250, None),
    "checks, two ranks of one card": check_two_ranks,
    "tinyllama-1.1b, saves to memory": partial(saves, SMALL, 3, 250, MEMORY),
    "llama-7b, one rank": partial(over_plain, LARGE, 3),
    "llama-7b, saves": partial(saves, LARGE, 2, 250, None),
}
SMOKE = ("checks, one rank", "tinyllama-1.1b, one rank", "tinyllama-1.1b, saves")


# ---- in scripts.gpu_report ------------------------------------------------------------------------------------------


def part(report, run):
    in_processes(report, run, "ranks", "scripts.rank_bench", SMOKE if report.smoke else VARIANTS)


def table(found: dict) -> list[str]:
    lines = [text(record) for record in found.get("records", [])]
    return ["ranks, on one card:", *lines] if lines else []


def text(r: dict) -> str:
    """One record."""
    if "over_plain" in r:
        memory = "" if r["peak_gib"] is None else f"  {r['peak_gib']:.1f} GiB, plain {r['plain_peak_gib']:.1f}"
        told = (
            f"{r['over_plain']:.3f}x the plain step of {r['plain_step_s_median']:.3f} s "
            f"({r['over_plain_min']:.3f} to {r['over_plain_max']:.3f}){memory}"
        )
        if "out_of_memory" in r:
            told += f"  master {r['master']}; out of memory {r['out_of_memory']}"
    elif "saves" in r:
        meanwhile = r["meanwhile_over_unsaved"]
        told = (
            f"{r['bytes'] / 1e9:.2f} GB in {r['write_s']:.1f} s ({r['gb_per_s']:.2f} GB/s) to {r['folder']}; held "
            f"{r['held_s']:.3f} s, the first {r['first_held_s']:.3f}; steps meanwhile "
            f"{f'{meanwhile:.3f}x' if meanwhile else 'none'}; {r['over_unsaved_at_100']:.4f}x at --save-every 100, "
            f"{r['over_unsaved_an_epoch']:.4f}x with one an epoch"
        )
    elif "largest_loss_apart" in r:
        told = f"the same by {r['backend']}: losses {r['largest_loss_apart']:.1e} apart, norms "
        told += f"{r['largest_norm_apart']:.1e}" + (f"; read back {r['read_back']}" if "read_back" in r else "")
    else:
        return line(r)
    return f"  {r['name']:<36}{told}"


# ---- command --------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse("scripts.rank_bench", __doc__, list(VARIANTS), argv)
    records = Records(args.json, args.minutes)
    for name in args.only:
        records.attempt(name, partial(VARIANTS[name], smoke=args.smoke, spent=records.spent))
    print("\n".join(table(records.result)))


if __name__ == "__main__":
    sys.exit(main())
