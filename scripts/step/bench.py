"""Our training step at the shapes of real models, on rows of Alpaca's lengths: speed, memory, MFU of every mode.

    python -m scripts.step.bench [--only NAME ...] [--json FILE] [--minutes M] [--smoke]

The pieces are engine.finetune's, put together as its loop does: packed micro-batches from a thread, gradients that add
up in the GEMMs, clipping at 1.0, an update that the device can call off, figures read a step late. Weights are random.
A step's seconds run from its beginning to the next one's on the device. What runs out of memory is tried with half the
micro-batch. Part of scripts.gpu_report.
"""

import itertools
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial

import torch

from engine.data.packing import Packing, make_micro_batches
from engine.distributed.fsdp import local_shards
from engine.model.llama import new_model
from engine.planning.memory import CONTEXT_BYTES, BatchShape, memory
from engine.planning.setting import Setting
from engine.training.optimizer import AdamW, lr_factor
from engine.training.prepare import ALIGN
from engine.training.run_ahead import Feeder, Figures, Mark
from kernels.measure.machine import DEVICE, GPU, IMPL
from scripts.step.common import (
    ALPACA_ROWS,
    DTYPE,
    EPOCHS,
    ROWS,
    Records,
    alpaca_rows,
    card,
    examples_of,
    in_processes,
    line,
    parse,
    peak_memory,
    projection,
    shape,
    speed,
    within_memory,
)

LR, CLIP = 2e-5, 1.0
TOY_TOKENS = 384
LEAST_STEPS = 3  # that are timed, when the time is spent while they run


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
    impl: str = IMPL
    steps: int = 10  # timed
    warmup: int = 3


SMALL = {"model": "tinyllama-1.1b", "tokens": 16640}
VARIANTS = {  # the most wanted first; names are unique, and targets.json selects by them
    "llama-7b": Variant(steps=30),
    "llama-7b, no sharing": Variant(sharing=False, steps=30),
    "llama-7b, low memory: offload, recompute block": Variant(offload=True, recompute="block", steps=5, warmup=2),
    "llama-7b, recompute block": Variant(recompute="block"),
    "tinyllama-1.1b": Variant(**SMALL, steps=30),
    "tinyllama-1.1b, no sharing": Variant(**SMALL, sharing=False),
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
    "llama-7b, references": Variant(tokens=2048, impl="ref", recompute="block", steps=2, warmup=1),
}
MAIN, UNSHARED = "llama-7b", "llama-7b, no sharing"


class Steps:
    """A model, its optimizer and its rows, and the step that engine.finetune.train takes."""

    def __init__(self, variant: Variant, tokens: int, n_steps: int, smoke: bool, shard=None):
        self.variant, self.max_tokens, self.smoke, self.n_steps = variant, tokens, smoke, n_steps
        self.config, self.rows = shape(variant.model, smoke), alpaca_rows(n_steps, smoke)
        self.device = torch.device(DEVICE)
        impl = variant.impl
        self.model = new_model(self.config, self.device, DTYPE, impl, variant.recompute, accumulate=True, shard=shard)
        self.model.init_weights(0, local_shards(self.model))
        self.optimizer = AdamW(
            self.model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, master=variant.master,
            states=variant.states, impl=impl, offload=variant.offload,
        )  # fmt: skip
        self.total_steps = EPOCHS * math.ceil(ALPACA_ROWS / ROWS)
        self.feed = Feeder(self.batches_of_step, self.model)
        self.told = None
        self.marks, self.losses, self.norms = [], [], []  # a mark at each step's beginning
        self.tokens, self.computed, self.largest, self.n_batches = [], [], (0, 0, 0), []

    def batches_of_step(self, step):
        if step > self.n_steps:
            return []
        examples = examples_of(step, self.smoke)
        how = Packing(self.max_tokens, share_prefix=self.variant.sharing, multiple=ALIGN if GPU else 1)
        return make_micro_batches(self.rows, examples, how, scale=1 / self.rows.loss_tokens()[examples].sum())

    def take(self, step: int) -> None:
        """Gives one step to the device, and reads the figures of the one before."""
        self.marks.append(Mark(self.device))
        lr = LR * lr_factor("cosine", step, self.total_steps, 0.03)
        batches = self.feed.take(step)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            part = self.model.loss(batch)
            part.backward()
            loss += part.detach()
        self.read()
        norm = self.optimizer.grad_norm()
        finite = torch.isfinite(loss + norm)
        self.optimizer.step(lr, norm, CLIP, apply=finite)
        self.optimizer.zero_grad()
        self.told = Figures(loss, norm, finite)
        self.tokens.append(int(self.rows.lengths()[examples_of(step, self.smoke)].sum()))
        self.computed.append(sum(len(batch.tokens) for batch in batches))
        self.n_batches.append(len(batches))
        self.largest = max([self.largest, *((len(b.tokens), len(b.targets), len(b.rows)) for b in batches)])

    def read(self) -> None:
        """The figures of the last step that was given, waiting for them."""
        if self.told:
            loss, norm, finite = self.told.read()
            self.losses.append(loss)
            self.norms.append(norm)
            self.optimizer.n_updates -= not finite
            self.told = None

    def seconds(self) -> list[float]:
        """Of every step, to the beginning of the next; the last ends where the device is now."""
        marks = [*self.marks, Mark(self.device)]
        return [after.seconds_since(before) for before, after in itertools.pairwise(marks)]

    def close(self):
        self.feed.__exit__()


def measure(variant: Variant, smoke: bool, spent=lambda: False) -> dict:
    """The record of a variant, halved where it does not fit. Past the time (spent) it ends after LEAST_STEPS steps."""
    config, least = shape(variant.model, smoke), 64 if smoke else 512
    tokens = min(variant.tokens, TOY_TOKENS) if smoke else variant.tokens
    about = asdict(variant) | {"dtype": str(DTYPE).removeprefix("torch.")} | ({"model": "toy"} if smoke else {})
    n_warm, n_steps = (0, 2) if smoke else (variant.warmup, variant.steps)

    def attempt(tokens):
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        steps = Steps(variant, tokens, n_warm + n_steps, smoke)
        try:
            for step in range(1, n_warm + n_steps + 1):
                steps.take(step)
                if step >= n_warm + LEAST_STEPS and spent():
                    break
            steps.read()
            seconds = steps.seconds()[n_warm:]
            timed = steps.tokens[n_warm:], steps.computed[n_warm:]
            return {
                **about, "tokens": tokens, "warmup": n_warm, "parameters": config.n_parameters,
                **speed(config.n_parameters, *timed, seconds, card()), **peak_memory(), **estimated(variant, steps),
                "micro_batches_a_step": sum(steps.n_batches) / len(steps.n_batches),
                "largest_micro_batch_tokens": steps.largest[0],
                "first_loss": steps.losses[0], "last_loss": steps.losses[-1],
                "all_finite": all(map(math.isfinite, steps.losses + steps.norms)),
            }  # fmt: skip
        finally:
            steps.close()

    record, failed = within_memory(tokens, least, attempt)
    return record | ({"out_of_memory_at": failed} if failed else {})


def estimated(variant: Variant, steps: Steps) -> dict:
    """What engine.planning.memory says of the largest micro-batch that there was, and the measured peaks over it: of tensors
    over the sum of its tensors, of what the allocator held over its total without CUDA's context."""
    tokens, loss_rows, query_rows = steps.largest
    setting = Setting(DTYPE, variant.master, variant.states, variant.recompute, variant.offload)
    used = memory(
        steps.config, setting, BatchShape(tokens, loss_rows, max(steps.n_batches) == 1, loss_rows - query_rows)
    )  # fmt: skip
    peak, tensors = peak_memory(), used.total - used.overhead

    def over(figure, n_bytes):
        return None if peak[figure] is None else peak[figure] * 2**30 / n_bytes

    return {
        "estimate_gib": used.total / 2**30, "estimate_of_tensors_gib": tensors / 2**30,
        "peak_over_estimate": over("peak_gib", tensors),
        "reserved_over_estimate": over("peak_reserved_gib", used.total - CONTEXT_BYTES),
    }  # fmt: skip


# ---- in scripts.gpu_report ------------------------------------------------------------------------------------------

SMOKE = (MAIN, "tinyllama-1.1b, references")


def part(report, run):
    """Every variant, and the whole fine-tune at the pace of the main one."""
    in_processes(report, run, "step", "scripts.step.bench", SMOKE if report.smoke else VARIANTS)
    measured = {r["name"]: r for r in report.result["parts"]["step"]["records"] if "tokens_per_s" in r}
    found = [projection(measured[name], card()) for name in (MAIN, UNSHARED) if name in measured]
    report.put("step", projections=found)


def table(found: dict) -> list[str]:
    lines = [line(record) for record in found.get("records", [])]
    for p in found.get("projections", []):
        price = f", ${p['dollars']:.2f} at ${p['dollars_an_hour']} an hour ({p['price_of']})" if p["dollars"] else ""
        lines.append(f"  {p['what']} {p['of']!r}: {p['steps']} steps, {p['minutes']:.1f} minutes{price}")
    return ["training step, ours:", *lines] if lines else []


# ---- command --------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse("scripts.step.bench", __doc__, list(VARIANTS), argv)
    records = Records(args.json, args.minutes)
    for name in args.only:
        records.attempt(name, partial(measure, VARIANTS[name], args.smoke, records.spent))


if __name__ == "__main__":
    sys.exit(main())
