"""What one card tells of ranks: the cost of FSDP2, that of a state which is written meanwhile, and that both are right.

    python -m scripts.step.ranks [--only NAME ...] [--json FILE] [--minutes M] [--smoke]

one rank   scripts.step.bench's step of a model that engine.distributed.fsdp.shard_model() cut over one rank, over the plain step.
           A run of one rank never shards: this is what FSDP2 itself takes, beside what goes over wires. At this size
           it copies what it would gather and reduce, so NCCL carries nothing. Blocks of both alternate, each from
           fresh weights, as two models of 7B do not fit a card; a ratio is that of two neighbours' median steps.
saves      steps while engine.output.saver.Saver writes their whole state, between steps of the same run without.
checks     scripts.step.rank_checks: losses, norms and states of one rank against none, and of two ranks on one card.

What was wrong is recorded as failed, without a time. Part of scripts.gpu_report.
"""

import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine.output.saver import Saver
from engine.training.micro_batch_size import is_out_of_memory
from kernels.measure.machine import DEVICE, free_memory
from scripts.step.bench import Steps, Variant
from scripts.step.common import ALPACA_ROWS, ROWS, Records, card, in_processes, line, parse, shape, speed
from scripts.step.rank_checks import (
    BACKEND,
    about,
    at_hand,
    block,
    check_one_rank,
    check_two_ranks,
    one_rank,
    same_curve,
)

EPOCH = -(-ALPACA_ROWS // ROWS)  # steps
MEMORY = "/dev/shm"


# ---- FSDP2's cost ---------------------------------------------------------------------------------------------------


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
        free_memory()
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
        saver = Saver(Path(folder), keep=1, device=DEVICE)
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


# ---- what there is --------------------------------------------------------------------------------------------------

SMALL, LARGE = Variant("tinyllama-1.1b", steps=8, warmup=2), Variant("llama-7b", steps=5, warmup=2)
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
    in_processes(report, run, "ranks", "scripts.step.ranks", SMOKE if report.smoke else VARIANTS)


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
    args = parse("scripts.step.ranks", __doc__, list(VARIANTS), argv)
    records = Records(args.json, args.minutes)
    for name in args.only:
        records.attempt(name, partial(VARIANTS[name], smoke=args.smoke, spent=records.spent))
    print("\n".join(table(records.result)))


if __name__ == "__main__":
    sys.exit(main())
