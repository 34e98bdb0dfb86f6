"""The training step of scripts.step.bench as others take it today: transformers, liger-kernel, torch.compile.

    python -m scripts.step.peers [--only NAME ...] [--json FILE] [--minutes M] [--smoke]

Rows, global batch, clipping and learning rate are those of scripts.step.bench. Weights and AdamW states are in bf16,
which is less than our fp32 master holds, and torch's AdamW is fused. Each peer gets what favours it: rows sorted by
length, so that padding is least; the largest power of two of rows in a micro-batch that fits; one record without
gradient checkpointing and one with it. liger-kernel patches transformers for good, so each peer has a process of its
own. This is a part of scripts.gpu_report.
"""

import importlib.util
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from engine.training.run_ahead import Mark
from kernels.base.commands import run_command
from kernels.measure.machine import DEVICE, GPU, installed_version
from scripts.report.processes import measure_in_processes
from scripts.step.figures import (
    DTYPE,
    DTYPE_NAME,
    card_here,
    format_record,
    peak_memory,
    reset_peak_memory,
    summarize_speed,
)
from scripts.step.records import Records, halve_until_it_fits, parse_arguments
from scripts.step.rows import alpaca_rows, examples_of_step, model_shape

LR, CLIP = 2e-5, 1.0
LEAST_STEPS = 2  # timed steps, if the time is up before all are taken


@dataclass(frozen=True)
class Peer:
    """One way others take a step."""

    model: str = "llama-7b"
    liger: bool = False
    compiled: bool = False
    checkpointing: bool = False
    rows: int = 16  # of a micro-batch, to begin with
    steps: int = 5  # timed
    warmup: int = 2  # steps; a compiled peer warms up with all of its steps instead


LARGE, SMALL = {"model": "llama-7b"}, {"model": "tinyllama-1.1b", "rows": 64}
PEERS = {
    "llama-7b, transformers": Peer(**LARGE),
    "llama-7b, transformers, checkpointing": Peer(**LARGE, checkpointing=True, rows=64),
    "llama-7b, transformers + liger": Peer(**LARGE, liger=True, rows=32),
    "llama-7b, transformers + liger, checkpointing": Peer(**LARGE, liger=True, checkpointing=True, rows=128),
    "llama-7b, transformers + compile": Peer(**LARGE, compiled=True),
    "llama-7b, transformers + compile, checkpointing": Peer(**LARGE, compiled=True, checkpointing=True, rows=64),
    "tinyllama-1.1b, transformers": Peer(**SMALL),
    "tinyllama-1.1b, transformers + liger": Peer(**SMALL, liger=True),
    "tinyllama-1.1b, transformers + compile": Peer(**SMALL, compiled=True),
}


class Absent(Exception):
    """A peer cannot take part; the message says why."""


def build_llama(peer: Peer, config):
    """Return transformers' LLaMA of our shape with random weights, patched and compiled as the peer wants it."""
    if importlib.util.find_spec("transformers") is None:
        raise Absent("transformers is not installed")
    if peer.liger:
        if importlib.util.find_spec("liger_kernel") is None:
            raise Absent("liger-kernel is not installed")
        if not GPU:
            raise Absent("liger-kernel is installed; it runs on CUDA alone")
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaConfig(
        hidden_size=config.dim, intermediate_size=config.hidden_dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    usual = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(theirs)
    finally:
        torch.set_default_dtype(usual)
    model.train()
    if peer.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if peer.compiled:
        compile_by_layer(model)
    return model


def compile_by_layer(model):
    """Compile the layers, which share one graph, and the loss.

    This is minutes faster than compiling the whole model. Only fusions across layers are lost
    (docs.pytorch.org/tutorials/recipes/regional_compilation.html).
    """
    options = {"dynamic": True} if GPU else {"backend": "eager", "dynamic": True}
    for layer in model.model.layers:
        layer.compile(**options)
    model.loss_function = torch.compile(model.loss_function, **options)


def micro_batches(rows, examples, n):
    """Yield (ids, mask, labels), each (n, longest). The longest rows come first, so that if they fit, all rows fit."""
    order = sorted(examples, key=lambda i: -len(rows.tokens_of(i)))
    for first in range(0, len(order), n):
        part = order[first : first + n]
        width = len(rows.tokens_of(part[0]))
        ids, labels = torch.zeros(len(part), width, dtype=torch.int64), torch.full((len(part), width), -100)
        mask = torch.zeros(len(part), width, dtype=torch.int64)
        for k, i in enumerate(part):
            tokens = torch.from_numpy(rows.tokens_of(i).astype("int64"))
            ids[k, : len(tokens)], mask[k, : len(tokens)] = tokens, 1
            labels[k, : len(tokens)] = tokens.masked_fill(torch.from_numpy(~rows.is_target_of(i)), -100)
        yield ids, mask, labels


def send_to_device(t):
    """Return the tensor on the device, copied without waiting."""
    return t.pin_memory().to(DEVICE, non_blocking=True) if GPU else t


class Loop:
    """Steps of a peer. Optimizer states are made first, so that the memory left is for activations."""

    def __init__(self, peer: Peer, smoke: bool):
        self.peer, self.smoke = peer, smoke
        self.config = model_shape(peer.model, smoke)
        self.n_steps = 2 if smoke else peer.steps
        self.rows = alpaca_rows(self.n_steps, smoke)
        self.model = build_llama(peer, self.config)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0, fused=True)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, number, n):
        """Take a step in micro-batches of n rows. Return (loss on the device, logical tokens, tokens with padding)."""
        examples = examples_of_step(number, self.smoke)
        targets = torch.tensor(float(self.rows.loss_tokens()[examples].sum()), device=DEVICE)
        loss, padded = torch.zeros((), device=DEVICE), 0
        for batch in micro_batches(self.rows, examples, n):
            ids, mask, labels = map(send_to_device, batch)
            part = self.model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=targets).loss
            part.backward()
            loss += part.detach()
            padded += ids.numel()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, int(self.rows.lengths()[examples].sum()), padded

    def measure(self, n, is_time_up=lambda: False) -> dict:
        """Return the figures of all steps in micro-batches of n rows, or of LEAST_STEPS when the time is up."""
        self.optimizer.zero_grad()  # an attempt that ran out of memory leaves gradients
        reset_peak_memory()
        device = torch.device(DEVICE)
        marks, steps = [], []
        # A compiled peer has met every shape before it is timed.
        n_warm = self.n_steps if self.peer.compiled else min(self.peer.warmup, self.n_steps)
        for number in (*range(1, n_warm + 1), *range(1, self.n_steps + 1)):
            marks.append(Mark(device))
            steps.append(self.step(number, n))
            if len(steps) >= n_warm + LEAST_STEPS and is_time_up():
                break
        marks.append(Mark(device))
        seconds = [after.seconds_since(before) for before, after in pairwise(marks)]
        losses, tokens, padded = zip(*steps, strict=True)
        timed = slice(n_warm, None)
        speed = summarize_speed(
            self.config.n_parameters, tokens[timed], padded[timed], seconds[timed], card_here()
        )  # fmt: skip
        return {
            "rows": n, "parameters": sum(p.numel() for p in self.parameters), **speed, **peak_memory(),
            "warmup_s": sum(seconds[:n_warm]), "first_loss": losses[0].item(), "last_loss": losses[-1].item(),
        }  # fmt: skip


def measure_peer(name: str, smoke: bool, is_time_up=lambda: False) -> dict:
    """Return a peer's record, with the rows of a micro-batch halved until it fits, or the reason of its absence."""
    peer = PEERS[name]
    about = {
        "model": "toy" if smoke else peer.model, "checkpointing": peer.checkpointing, "states": DTYPE_NAME,
        "versions": {package: installed_version(package) for package in ("transformers", "liger-kernel", "torch")},
    }  # fmt: skip
    try:
        loop = Loop(peer, smoke)
    except (Absent, ImportError) as reason:
        return {**about, "absent": str(reason)}
    measure = partial(loop.measure, is_time_up=is_time_up)
    return {**about, **halve_until_it_fits(2 if smoke else peer.rows, 1, measure)}


# ---- in scripts.gpu_report ------------------------------------------------------------------------------------------

SMOKE = ("llama-7b, transformers", "llama-7b, transformers + liger", "llama-7b, transformers + compile, checkpointing")


def measure_part(report) -> None:
    """Add every peer's record and the ratio of our speed to its speed. Each peer runs in a process of its own."""
    for name in SMOKE if report.smoke else PEERS:
        measure_in_processes(report, "peers", "scripts.step.peers", [name])
        add_ratios(report.result["parts"])
        report.save()


def add_ratios(parts: dict) -> None:
    """Add our logical tokens/s over the peer's to each peer's record, on equal rows with and without sharing.

    Ours has bf16 states where that was measured, as peers have.
    """
    ours = {r["name"]: r["tokens_per_s"] for r in parts.get("step", {}).get("records", []) if "tokens_per_s" in r}
    for record in parts.get("peers", {}).get("records", []):
        if "tokens_per_s" in record:
            model = record["name"].split(", ")[0]
            for figure, name in (("ours_over_peer", model), ("ours_without_sharing_over_peer", f"{model}, no sharing")):
                of = next((found for found in (f"{name}, bf16 states", name) if found in ours), None)
                if of:
                    record[figure] = ours[of] / record["tokens_per_s"]


def format_part(part: dict) -> list[str]:
    """Return the lines that the report prints."""
    lines = [format_record(record) for record in part.get("records", [])]
    return ["training step, peers (bf16 states, no fp32 master):", *lines] if lines else []


# ---- command --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments("scripts.step.peers", __doc__, list(PEERS), argv)
    records = Records(args.json, args.minutes)
    for name in args.only:
        records.attempt(name, partial(measure_peer, name, args.smoke, records.is_time_up))


if __name__ == "__main__":
    run_command(main)
