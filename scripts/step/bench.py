"""Our training step at the shapes of real models, on rows of Alpaca's lengths: speed, memory and MFU of every mode.

    python -m scripts.step.bench [--only NAME ...] [--json FILE] [--minutes M] [--smoke]

A step is engine.training's own: packed micro-batches from a thread, gradients that add up in the GEMMs, clipping at
1.0, an update that the device can call off, figures that are read one step late. Weights are random. A step's seconds
run from its beginning to the next step's beginning on the device. A variant that runs out of memory is tried again with
half the micro-batch. This is a part of scripts.gpu_report.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from engine.data.batches import Batches, Order, StepBatch
from engine.data.packing import Packing
from engine.distributed.fsdp import local_shards
from engine.model.llama import new_model
from engine.planning.memory import CONTEXT_BYTES, BatchShape, memory
from engine.planning.setting import Setting
from engine.training.micro_batch_size import TOKENS_MULTIPLE
from engine.training.optimizer import AdamW, lr_factor
from engine.training.run_ahead import Mark, Prefetcher
from engine.training.step import StepReport
from engine.training.step import Steps as TrainingSteps
from kernels.base.commands import run_command
from kernels.measure.machine import DEVICE, GPU, IMPL
from scripts.report.processes import measure_in_processes
from scripts.step.figures import (
    DTYPE,
    DTYPE_NAME,
    STEPS_AN_EPOCH,
    card_here,
    format_record,
    peak_memory,
    project_finetune,
    reset_peak_memory,
    summarize_speed,
)
from scripts.step.records import Records, halve_until_it_fits, parse_arguments
from scripts.step.rows import EPOCHS, TOY_TOKENS, alpaca_rows, model_shape, rows_a_step

LR, CLIP = 2e-5, 1.0
LEAST_STEPS = 3  # timed steps, if the time is up before all are taken


@dataclass(frozen=True)
class Variant:
    """One way to take a step. The defaults are engine.finetune's for a 7B model on one card of 80 GB."""

    model: str = "llama-7b"
    tokens: int = 8320  # of a micro-batch, at most
    sharing: bool = True
    recompute: str = "cheap"
    master: str = "split"
    states: str = "8bit"
    offload: bool = False
    on_cpu: bool = False  # the CPU updates offloaded states
    impl: str = IMPL
    steps: int = 10  # timed
    warmup: int = 3
    least_gib: int = 0  # of the smallest card that it is for

    def describe(self, smoke: bool) -> dict:
        """Return the settings for a record."""
        return {**asdict(self), "dtype": DTYPE_NAME, **({"model": "toy"} if smoke else {})}


GIB = 2**30
LARGE = {"tokens": 16640, "least_gib": 130}  # a step at once on a card of 141 GB
SMALL = {"model": "tinyllama-1.1b", "tokens": 16640}
HEADLINE = {  # names are unique, and targets.json selects by them
    "llama-7b, fp32 states": Variant(**LARGE, states="fp32", steps=30),
    "llama-7b, bf16 states": Variant(**LARGE, states="bf16", steps=30),
    "llama-7b, no sharing, bf16 states": Variant(**LARGE | {"tokens": 19200}, sharing=False, states="bf16", steps=20),
    "llama-7b": Variant(steps=30),
    "llama-7b, no sharing": Variant(sharing=False, steps=20),
}
VARIANTS = HEADLINE | {  # the most wanted first
    "llama-7b, low memory: offload, recompute block": Variant(
        offload=True, on_cpu=True, recompute="block", steps=5, warmup=2
    ),
    "llama-7b, states that visit the GPU, recompute block": Variant(offload=True, recompute="block", steps=5, warmup=2),
    "llama-7b, recompute block": Variant(recompute="block"),
    "tinyllama-1.1b": Variant(**SMALL, steps=30),
    "tinyllama-1.1b, no sharing": Variant(**SMALL, sharing=False),
    "llama-7b, recompute none, bf16 states": Variant(**LARGE, recompute="none", states="bf16"),
    "llama-7b, stochastic master": Variant(master="stochastic"),
    "llama-7b, stochastic master, a step at once": Variant(tokens=16640, master="stochastic"),
    "llama-7b, recompute block, a step at once": Variant(tokens=16640, recompute="block"),
    "llama-7b, recompute none": Variant(tokens=4160, recompute="none"),
    "llama-7b, micro-batches of 4160": Variant(tokens=4160),
    "llama-7b, micro-batches of 2080": Variant(tokens=2080),
    "tinyllama-1.1b, recompute none": Variant(**SMALL, recompute="none"),
    "tinyllama-1.1b, fp32 states": Variant(**SMALL, states="fp32"),
    "tinyllama-1.1b, references": Variant(
        "tinyllama-1.1b", tokens=2048, impl="ref", recompute="block", steps=3, warmup=1
    ),
}
MAIN = "llama-7b"


# ---- steps ----------------------------------------------------------------------------------------------------------


class CountingPrefetcher(Prefetcher):
    """A prefetcher that remembers each step's number of micro-batches and the largest micro-batch of all steps."""

    def __init__(self, *args):
        super().__init__(*args)
        self.counts, self.largest = {}, (0, 0, 0)  # step: micro-batches; (tokens, targets, rows)

    def take(self, step: int) -> StepBatch:
        """Return the micro-batches of a step, counted."""
        batch = super().take(step)
        self.counts[step] = len(batch.micro_batches)
        sizes = ((len(b.tokens), len(b.targets), len(b.rows)) for b in batch.micro_batches)
        self.largest = max([self.largest, *sizes])
        return batch


class Steps:
    """A model with random weights, its optimizer and its rows, which take the steps of engine.training."""

    def __init__(self, variant: Variant, tokens: int, n_steps: int, smoke: bool, shard=None):
        self.max_tokens, self.n_steps = tokens, n_steps
        self.config, self.rows = model_shape(variant.model, smoke), alpaca_rows(n_steps, smoke)
        self.device = torch.device(DEVICE)
        impl = variant.impl
        self.model = new_model(self.config, self.device, DTYPE, impl, variant.recompute, accumulate=True, shard=shard)
        self.model.init_weights(0, local_shards(self.model))
        self.optimizer = AdamW(
            self.model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, master=variant.master,
            states=variant.states, impl=impl, offload=variant.offload, on_cpu=variant.on_cpu,
        )  # fmt: skip
        order = Order(len(self.rows), rows_a_step(smoke), seed=0, shuffle=False)
        packing = Packing(tokens, share_prefix=variant.sharing, multiple=TOKENS_MULTIPLE if GPU else 1)
        self.prefetcher = CountingPrefetcher(Batches(self.rows, order, packing), self.model, n_steps)
        self.steps = TrainingSteps(self.model, self.optimizer, self.prefetcher, CLIP)
        self.marks = []  # one at each step's beginning
        self.losses, self.norms, self.tokens, self.computed, self.n_batches = [], [], [], [], []

    def run(self, step: int) -> None:
        """Give one step to the device, and read the figures of the step before."""
        self.marks.append(Mark(self.device))
        self.steps.take_step(step, LR * lr_factor("cosine", step, EPOCHS * STEPS_AN_EPOCH, 0.03))
        self.record_reports(self.steps.take_reports(wait=False))

    def read_figures(self) -> None:
        """Read the figures of the last step, waiting for the device if need be."""
        self.record_reports(self.steps.take_reports(wait=True))

    def record_reports(self, reports: list[StepReport]) -> None:
        """Record the figures of steps that the device has finished."""
        for report in reports:
            self.losses.append(report.loss)
            self.norms.append(report.grad_norm)
            self.tokens.append(report.n_tokens)
            self.computed.append(report.n_computed_tokens)
            self.n_batches.append(self.prefetcher.counts[report.step])

    def seconds(self) -> list[float]:
        """Return every step's seconds until the next step began. The last step ends where the device is now."""
        marks = [*self.marks, Mark(self.device)]
        return [after.seconds_since(before) for before, after in itertools.pairwise(marks)]

    def close(self) -> None:
        """End the thread that prepares micro-batches."""
        self.prefetcher.__exit__()


# ---- measurement ----------------------------------------------------------------------------------------------------


def measure_variant(variant: Variant, smoke: bool, is_time_up=lambda: False) -> dict:
    """Return a variant's record, with the micro-batch halved until it fits.

    When the time is up, the measurement ends after LEAST_STEPS timed steps.
    """
    n_warm, n_steps = (0, 2) if smoke else (variant.warmup, variant.steps)

    def attempt(tokens):
        reset_peak_memory()
        steps = Steps(variant, tokens, n_warm + n_steps, smoke)
        try:
            for step in range(1, n_warm + n_steps + 1):
                steps.run(step)
                if step >= n_warm + LEAST_STEPS and is_time_up():
                    break
            steps.read_figures()
            return {**variant.describe(smoke), "tokens": tokens, **record_of(variant, steps, n_warm)}
        finally:
            steps.close()

    tokens = min(variant.tokens, TOY_TOKENS) if smoke else variant.tokens
    return halve_until_it_fits(tokens, 64 if smoke else 512, attempt)


def record_of(variant: Variant, steps: Steps, n_warm: int) -> dict:
    """Return the figures of steps that were taken, without the first n_warm."""
    n = steps.config.n_parameters
    speed = summarize_speed(
        n, steps.tokens[n_warm:], steps.computed[n_warm:], steps.seconds()[n_warm:], card_here()
    )  # fmt: skip
    return {
        "warmup": n_warm, "parameters": n, **speed, **peak_memory(), **compare_with_estimate(variant, steps),
        "micro_batches_a_step": sum(steps.n_batches) / len(steps.n_batches),
        "largest_micro_batch_tokens": steps.prefetcher.largest[0],
        "first_loss": steps.losses[0], "last_loss": steps.losses[-1],
        "all_finite": all(map(math.isfinite, steps.losses + steps.norms)),
    }  # fmt: skip


def compare_with_estimate(variant: Variant, steps: Steps) -> dict:
    """Return engine.planning.memory's estimate for the largest micro-batch, and the measured peaks over it.

    The peak of tensors is divided by the estimated sum of tensors. The peak of reserved memory is divided by the
    estimated total without CUDA's context.
    """
    tokens, loss_rows, query_rows = steps.prefetcher.largest
    setting = Setting(DTYPE, variant.master, variant.states, variant.recompute, variant.offload, on_cpu=variant.on_cpu)
    batch = BatchShape(tokens, loss_rows, max(steps.n_batches) == 1, loss_rows - query_rows)
    used = memory(steps.config, setting, batch)
    peak, tensors = peak_memory(), used.total - used.overhead

    def peak_over(figure, n_bytes):
        return None if peak[figure] is None else peak[figure] * 2**30 / n_bytes

    return {
        "estimate_gib": used.total / 2**30, "estimate_of_tensors_gib": tensors / 2**30,
        "peak_over_estimate": peak_over("peak_gib", tensors),
        "reserved_over_estimate": peak_over("peak_reserved_gib", used.total - CONTEXT_BYTES),
    }  # fmt: skip


# ---- in scripts.gpu_report ------------------------------------------------------------------------------------------

SMOKE = (MAIN, "tinyllama-1.1b, references")


def names_for_card(variants: Iterable[str], smoke: bool) -> list[str]:
    """Return the names of the variants that are for a card as large as this one."""
    if smoke:
        return [name for name in variants if name in SMOKE]
    gib = torch.cuda.get_device_properties(0).total_memory / GIB
    return [name for name in variants if VARIANTS[name].least_gib <= gib]


def measure_part(report) -> None:
    """Add the records of the settings that a user of this card gets, and the whole fine-tune at their speed."""
    measure_variants(report, HEADLINE)


def measure_other_variants(report) -> None:
    """Add the records of all other settings."""
    measure_variants(report, [name for name in VARIANTS if name not in HEADLINE])


def measure_variants(report, variants: Iterable[str]) -> None:
    """Add the records of variants, and the projection of the whole fine-tune."""
    measure_in_processes(report, "step", "scripts.step.bench", names_for_card(variants, report.smoke))
    measured = [r for r in report.result["parts"]["step"]["records"] if r["name"] in HEADLINE and "tokens_per_s" in r]
    report.add("step", projections=[project_finetune(record, card_here()) for record in measured])


def format_part(part: dict) -> list[str]:
    """Return the lines that the report prints."""
    lines = [format_record(record) for record in part.get("records", [])]
    for p in part.get("projections", []):
        price = f", ${p['dollars']:.2f} at ${p['dollars_an_hour']} an hour ({p['price_of']})" if p["dollars"] else ""
        lines.append(f"  {p['what']} {p['of']!r}: {p['steps']} steps, {p['minutes']:.1f} minutes{price}")
    return ["training step, ours:", *lines] if lines else []


# ---- command --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments("scripts.step.bench", __doc__, list(VARIANTS), argv)
    records = Records(args.json, args.minutes)
    for name in args.only:
        records.attempt(name, partial(measure_variant, VARIANTS[name], args.smoke, records.is_time_up))


if __name__ == "__main__":
    run_command(main)
