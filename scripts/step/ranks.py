"""The cost of ranks, as far as one card can show it: FSDP2, saves beside steps, and checks that both are right.

    python -m scripts.step.ranks [--only NAME ...] [--json FILE] [--minutes M] [--smoke]

one rank   The step of scripts.step.bench with a model that engine.distributed.fsdp sharded over one rank, over the
           plain step. A real run of one rank never shards, so this is the cost of FSDP2 itself without wires: it
           copies what it would gather and reduce. Blocks of both kinds alternate, each with fresh weights, because two
           7B models do not fit a card. A ratio is that of two neighbouring blocks' median steps.
saves      Steps while engine.output.saver.Saver writes the whole state, between steps without a save.
checks     scripts.step.rank_checks: losses, norms and states of one rank against none, and of two ranks on one card.

A wrong result is recorded as failed, without a time. This is a part of scripts.gpu_report.
"""

import shutil
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine.output.saver import Saver
from engine.training.micro_batch_size import is_out_of_memory
from kernels.base.commands import run_command
from kernels.measure.machine import DEVICE, free_memory
from scripts.report.processes import measure_in_processes
from scripts.step.bench import Steps, Variant
from scripts.step.figures import STEPS_AN_EPOCH, card_here, format_record, summarize_speed
from scripts.step.rank_checks import (
    BACKEND,
    check_one_rank,
    check_two_ranks,
    compare_curves,
    one_rank,
    run_block,
    variant_here,
)
from scripts.step.records import Records, parse_arguments
from scripts.step.rows import model_shape

IN_MEMORY = "/dev/shm"

# ---- FSDP2's cost ---------------------------------------------------------------------------------------------------


def measure_fsdp(variant: Variant, n_pairs: int, smoke: bool, is_time_up=lambda: False) -> dict:
    """Return FSDP2's step over the plain step, measured in pairs of blocks whose order alternates.

    If the two do not fit, both drop the fp32 master. Halving the micro-batch instead would double the gathers.
    """
    variant = variant_here(variant, smoke)
    try:
        return measure_pairs(variant, n_pairs, smoke, is_time_up)
    except Exception as error:
        if not is_out_of_memory(error) or variant.master == "stochastic":
            raise
        said = str(error).split(". ")[0]
    record = measure_pairs(replace(variant, master="stochastic"), n_pairs, smoke, is_time_up)
    return record | {"out_of_memory": f"with master {variant.master}: {said}"}


def measure_pairs(variant, n_pairs, smoke, is_time_up) -> dict:
    """Return the record of pairs of blocks, one plain and one sharded."""
    plain, sharded = [], []
    with one_rank() as shard:
        for i in range(2 if smoke else n_pairs):
            pair = [(plain, None), (sharded, shard)]
            for blocks, how in pair if i % 2 == 0 else reversed(pair):
                blocks.append(run_block(variant, smoke, how))
            if is_time_up():
                break
        free_memory()
    ratios = [statistics.median(b.seconds) / statistics.median(a.seconds) for a, b in zip(plain, sharded, strict=True)]
    n_parameters = model_shape(variant.model, smoke).n_parameters
    columns = {name: [x for b in sharded for x in getattr(b, name)] for name in ("tokens", "computed", "seconds")}
    return {
        **variant.describe(smoke), "backend": BACKEND, "pairs": len(ratios),
        "over_plain": statistics.median(ratios), "over_plain_min": min(ratios), "over_plain_max": max(ratios),
        "plain_step_s_median": statistics.median(s for b in plain for s in b.seconds),
        **summarize_speed(n_parameters, **columns, card=card_here()),
        "micro_batches_a_step": statistics.mean(plain[0].micro_batches),
        **largest_memory(sharded), **{f"plain_{name}": gib for name, gib in largest_memory(plain).items()},
        **compare_curves(sharded[0], plain[0]),
    }  # fmt: skip


def largest_memory(blocks) -> dict:
    """Return the largest of the blocks' peaks, or None where there is no GPU."""
    return {name: gib and max(b.memory[name] for b in blocks) for name, gib in blocks[0].memory.items()}


# ---- saves ----------------------------------------------------------------------------------------------------------


class Absent(Exception):
    """Something is not measured here; the message says why."""


def measure_saves(
    variant: Variant, n_saves: int, most_steps: int, where: str | None, smoke: bool, is_time_up=lambda: False
) -> dict:
    """Return the cost of saves of the whole state beside steps. Each state is removed when it is written.

    The cost of a save is the extra time of its steps, beginning with the step at whose end it was asked for, over as
    many steps without a save. where: the folder to save to, None for the temporary one. most_steps: the limit of all
    steps together.
    """
    variant = variant_here(variant, smoke)
    with tempfile.TemporaryDirectory(prefix="cria-saves-", dir=where) as folder:
        steps = Steps(variant, variant.tokens, most_steps, smoke)
        saver = Saver(Path(folder), keep=1, device=DEVICE)
        try:
            check_space(sum(s.tensor.nbytes for s in steps.optimizer.tensors().values()), Path(folder))
            found = run_saves(steps, saver, variant, n_saves, is_time_up)
        except Absent as reason:
            return {**variant.describe(smoke), "absent": str(reason)}
        finally:
            saver.close()
            steps.close()
        place = f"{Path(folder).parent} ({filesystem_of(folder)})"
        return {**variant.describe(smoke), **found, "folder": place}


def run_saves(steps: Steps, saver, variant: Variant, n_saves: int, is_time_up) -> dict:
    """Alternate steps without a save and steps beside one, and return their costs."""
    taken, without, during, written = 0, [], [], []  # indices of steps

    def next_step() -> int:
        nonlocal taken
        if taken == steps.n_steps:
            raise TimeoutError(f"save {len(written) + 1} is not written after {steps.n_steps} steps")
        steps.run(taken := taken + 1)
        return taken - 1

    for _ in range(n_saves):
        for _ in range(variant.warmup):  # the disk also has the removed state to clean up
            next_step()
        without += [next_step() for _ in range(variant.steps)]
        beside = [next_step()]
        saver.save(taken, steps.optimizer.tensors(), {"n_updates": steps.optimizer.n_updates})
        while (saved := saver.poll()) is None:
            beside.append(next_step())
        during.append(beside)
        written.append(saved)
        shutil.rmtree(saved.folder)
        if is_time_up():
            break
    steps.read_figures()
    return summarize_saves(steps.seconds(), without, during, written)


def summarize_saves(seconds: list[float], without: list[int], during: list[list[int]], written: list) -> dict:
    """Return what saves cost.

    seconds: of every step. without: indices of the steps without a save. during: for each save the indices of its
    steps. written: what the Saver reported of each save.
    """
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
    later = found[1:] or found  # the first save also allocates the memory of the copy
    medians = {name: median_of_known([save[name] for save in later]) for name in found[0]}
    slow = [save["meanwhile_over_unsaved"] for save in later if save["meanwhile_over_unsaved"]]

    def over_unsaved(every):
        wait_s = max(0.0, medians["write_s"] - every * plain)  # the next save waits for this one
        return 1 + (medians["lost_s"] + wait_s) / (every * plain)

    return {
        "bytes": written[0].bytes, "unsaved_step_s_median": plain, "unsaved_steps": len(without), **medians,
        "meanwhile_over_unsaved_min": min(slow, default=None), "meanwhile_over_unsaved_max": max(slow, default=None),
        "over_unsaved_at_100": over_unsaved(100), "over_unsaved_an_epoch": over_unsaved(STEPS_AN_EPOCH),
        "first_held_s": found[0]["held_s"], "first_lost_s": found[0]["lost_s"], "saves": found,
    }  # fmt: skip


def median_of_known(values: list) -> float | None:
    """Return the median of the values that are not None, or None if there is none."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def check_space(state_bytes: int, folder: Path) -> None:
    """Raise Absent unless the folder has room for a state and the host's memory for a copy; a tmpfs needs both."""
    disk, memory = shutil.disk_usage(folder).free, available_memory_bytes()
    copies = 2 if filesystem_of(folder) == "tmpfs" else 1
    for what, free_bytes, n in ((f"{folder.parent} has", disk, 1), ("the host's memory has", memory, copies)):
        if free_bytes < 1.1 * n * state_bytes:
            raise Absent(f"{what} {free_bytes / 1e9:.1f} GB free, wanted {1.1 * n * state_bytes / 1e9:.1f}")


def available_memory_bytes() -> int:
    """Return the memory that Linux can still give to programs."""
    figures = dict(text.split(":") for text in Path("/proc/meminfo").read_text().splitlines())
    return int(figures["MemAvailable"].split()[0]) * 1024


def filesystem_of(folder) -> str:
    """Return the kind of a folder's file system: "ext4", "tmpfs", ..."""
    mounts = [text.split()[1:3] for text in Path("/proc/self/mounts").read_text().splitlines()]
    path = Path(folder).resolve()
    return max((len(mount), kind) for mount, kind in mounts if path.is_relative_to(mount))[1]


# ---- in scripts.gpu_report ------------------------------------------------------------------------------------------

SMALL, LARGE = Variant("tinyllama-1.1b", steps=8, warmup=2), Variant("llama-7b", steps=5, warmup=2)
VARIANTS = {  # first what shows most in a second; names are unique, and targets.json selects by them
    "checks, one rank": partial(check_one_rank, Variant("smollm2-135m", tokens=8320)),
    "tinyllama-1.1b, one rank": partial(measure_fsdp, SMALL, 4),
    "tinyllama-1.1b, saves": partial(measure_saves, SMALL, 3, 250, None),
    "checks, two ranks of one card": check_two_ranks,
    "tinyllama-1.1b, saves to memory": partial(measure_saves, SMALL, 3, 250, IN_MEMORY),
    "llama-7b, one rank": partial(measure_fsdp, LARGE, 3),
    "llama-7b, saves": partial(measure_saves, LARGE, 2, 250, None),
}
SMOKE = ("checks, one rank", "tinyllama-1.1b, one rank", "tinyllama-1.1b, saves")


CHECKS = [name for name in VARIANTS if name.startswith("checks")]


def measure_checks(report) -> None:
    """Add the records of the checks that FSDP2 is right."""
    names = [name for name in CHECKS if name in SMOKE or not report.smoke]
    measure_in_processes(report, "ranks", "scripts.step.ranks", names)


def measure_part(report) -> None:
    """Add the record of every variant."""
    measure_in_processes(report, "ranks", "scripts.step.ranks", SMOKE if report.smoke else VARIANTS)


def format_part(part: dict) -> list[str]:
    """Return the lines that the report prints."""
    lines = [format_variant(record) for record in part.get("records", [])]
    return ["ranks, on one card:", *lines] if lines else []


def format_variant(r: dict) -> str:
    """Return a record's line, by what was measured."""
    if "over_plain" in r:
        text = format_fsdp(r)
    elif "saves" in r:
        text = format_saves(r)
    elif "largest_loss_apart" in r:
        read_back = f"; read back {r['read_back']}" if "read_back" in r else ""
        text = f"the same by {r['backend']}: losses {r['largest_loss_apart']:.1e} apart, norms "
        text += f"{r['largest_norm_apart']:.1e}{read_back}"
    else:
        return format_record(r)
    return f"  {r['name']:<36}{text}"


def format_fsdp(r: dict) -> str:
    """Return the figures of FSDP2 over the plain step."""
    memory = "" if r["peak_gib"] is None else f"  {r['peak_gib']:.1f} GiB, plain {r['plain_peak_gib']:.1f}"
    dropped = f"  master {r['master']}; out of memory {r['out_of_memory']}" if "out_of_memory" in r else ""
    return (
        f"{r['over_plain']:.3f}x the plain step of {r['plain_step_s_median']:.3f} s "
        f"({r['over_plain_min']:.3f} to {r['over_plain_max']:.3f}){memory}{dropped}"
    )


def format_saves(r: dict) -> str:
    """Return the figures of saves beside steps."""
    meanwhile = f"{r['meanwhile_over_unsaved']:.3f}x" if r["meanwhile_over_unsaved"] else "none"
    return (
        f"{r['bytes'] / 1e9:.2f} GB in {r['write_s']:.1f} s ({r['gb_per_s']:.2f} GB/s) to {r['folder']}; held "
        f"{r['held_s']:.3f} s, the first {r['first_held_s']:.3f}; steps meanwhile {meanwhile}; "
        f"{r['over_unsaved_at_100']:.4f}x at --save-every 100, {r['over_unsaved_an_epoch']:.4f}x with one an epoch"
    )


# ---- command --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments("scripts.step.ranks", __doc__, list(VARIANTS), argv)
    records = Records(args.json, args.minutes)
    for name in args.only:
        records.attempt(name, partial(VARIANTS[name], smoke=args.smoke, is_time_up=records.is_time_up))
    print("\n".join(format_part(records.result)))


if __name__ == "__main__":
    run_command(main)
