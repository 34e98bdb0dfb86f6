"""Offloaded updates by the CPU: what they cost a step on a CPU, and AdamW's own time, in one run.

    python -m scripts.speed.offload --json benchmarks/offload.json

Equal models, six layers of SmolLM2-135M, take equal steps in turn, of several micro-batches: everything on the device;
states and gradients on the host, where gradients leave after backward; and the same, where they leave in backward. Here
device and host are one processor with one memory, so copies cost their time, and nothing runs beside them. Losses and
norms must be equal to the bit. AdamW is timed from the known norm to the last weight that has gone back. Seconds are
the process's CPU seconds in one thread, as other programs may share the machine.
"""

import json
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_gen.base.cli import run_for_reader
from engine.data.packing import Packing, make_micro_batches
from engine.model.config import MODELS
from engine.model.llama import new_model
from engine.planning.memory import leaving_bytes
from engine.planning.setting import Setting
from engine.planning.step_time import host_update_bytes
from engine.planning.weights import state_bytes
from engine.training.optimizer import AdamW
from kernels.native.cpu import load_cpu
from scripts.base.results import describe_cpu, new_json_parser, summarize, summarize_ratios, today, write_json
from scripts.step.rows import alpaca_rows

MODEL = replace(MODELS["smollm2-135m"], n_layers=6)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ON_DEVICE, AFTER, WITHIN = "on the device", "after backward", "in backward"


@dataclass(frozen=True)
class Took:
    """How a step went."""

    seconds: float
    update_s: float  # of it, from the known norm on
    loss: float
    norm: float


class Stepper:
    """A model with random weights and an optimizer that works in one of the three ways."""

    def __init__(self, way: str, dtype: torch.dtype):
        self.model = new_model(MODEL, "cpu", dtype, "native", accumulate=True)
        self.model.init_weights(0)
        offload = way != ON_DEVICE
        self.optimizer = AdamW(
            self.model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, impl="native", offload=offload,
            on_cpu=offload,
        )  # fmt: skip
        self.optimizer.is_sharded = way == AFTER  # as gradients of several ranks, which stay until the update

    def step(self, batches: list) -> Took:
        """Take one optimizer step."""
        began, loss = time.process_time(), torch.zeros(())
        for i, batch in enumerate(batches, 1):
            with self.optimizer.micro_batch(i == len(batches)):
                part = self.model.loss(batch)
                part.backward()
            loss += part.detach()
        norm = self.optimizer.grad_norm()
        known = time.process_time()
        self.optimizer.step(1e-5, norm, 1.0, apply=torch.isfinite(loss + norm))
        ended = time.process_time()
        return Took(ended - began, ended - known, loss.item(), norm.item())


def measure_in_turns(args: Namespace) -> tuple[dict[str, list[Took]], list[int]]:
    """Return how each way's steps went, without a first one, and the micro-batches of each step."""
    rows, steppers = alpaca_rows(args.rounds + 1, smoke=False), {}
    for way in (ON_DEVICE, AFTER, WITHIN):
        steppers[way] = Stepper(way, DTYPES[args.dtype])
    took: dict[str, list[Took]] = {way: [] for way in steppers}
    counts = []
    for i in range(args.rounds + 1):
        examples = rows.get_examples(np.arange(i * args.batch, (i + 1) * args.batch))
        batches = make_micro_batches(examples, Packing(args.tokens), scale=1e-3)
        counts.append(len(batches))
        for way, stepper in steppers.items():
            took[way].append(stepper.step(batches))
            print(f"{way}: {took[way][-1]}", flush=True)
        assert len({(found[-1].loss, found[-1].norm) for found in took.values()}) == 1, "the bits must be equal"
    return {way: found[1:] for way, found in took.items()}, counts[1:]


def parse_arguments() -> Namespace:
    parser = new_json_parser(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    took, counts = measure_in_turns(args)
    setting = Setting(DTYPES[args.dtype], offload=True, on_cpu=True)
    state = state_bytes(MODEL, setting)
    moved = host_update_bytes(state, setting)
    seconds = {way: [one.seconds for one in found] for way, found in took.items()}
    result = {
        "what": "steps of six layers of SmolLM2-135M on a CPU with offloaded updates, in turns",
        "parameters": MODEL.n_parameters, "dtype": args.dtype,
        "rows": args.batch, "micro_batches": counts, "rounds": args.rounds,
        "seconds": {way: summarize(found) for way, found in seconds.items()},
        "in_backward_over_after": summarize_ratios(seconds[WITHIN], seconds[AFTER]),
        "in_backward_over_on_device": summarize_ratios(seconds[WITHIN], seconds[ON_DEVICE]),
        "update_s": {way: summarize(one.update_s for one in found) for way, found in took.items()},
        "update_bytes": moved, "update_gb_per_s": summarize(moved / one.update_s / 1e9 for one in took[WITHIN]),
        "gradient_bytes": {"all": state.weights, "at once": leaving_bytes(MODEL, setting, False)},
        "instruction_set": load_cpu().cria_instruction_set().decode(), "threads": torch.get_num_threads(),
        **describe_cpu(), "torch": torch.__version__, "date": today(),
    }  # fmt: skip
    write_json(args.json, result)
    print(json.dumps({k: v for k, v in result.items() if isinstance(v, dict)}, indent=1, default=float))


if __name__ == "__main__":
    sys.exit(run_for_reader(main))
