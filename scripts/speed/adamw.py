"""AdamW of csrc/cpu: the reference's bits in every mode over many steps, then its speed against torch's, in one run.

    python -m scripts.speed.adamw --json benchmarks/cpu_adamw.json

torch's way to update a bf16 parameter in the host's memory is three passes: the gradient is copied to fp32,
torch.optim.AdamW(fused=True) updates an fp32 master, and the master is copied to bf16. The copy rate is that of
torch's copy_ between two fp32 tensors, bytes read and written. All take turns, so ratios are of neighbours in time, and
seconds are the process's CPU seconds in one thread: other programs may share the machine, and a thread that waits for
another one spins. Where the system places a tensor moves its figure by some per cent, so that all are made anew several
times. Bytes are those that kernels/ops/adamw.py's table says an update moves.
"""

import itertools
import json
import sys
import time
from argparse import Namespace
from collections import defaultdict

import torch

import kernels
from data_gen.base.cli import run_for_reader
from kernels.native.cpu import load_cpu
from kernels.ops.adamw import MASTERS, STATES, AdamWState
from scripts.base.results import describe_cpu, new_json_parser, summarize, summarize_ratios, today, write_json

SETTINGS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
BYTES = {  # moved a parameter
    ("fp32", "fp32"): 28, ("split", "fp32"): 26, ("split", "bf16"): 18, ("split", "8bit"): 14 + 16 / 256,
    ("stochastic", "bf16"): 14,
}  # fmt: skip
MODES = [("none", states) for states in STATES] + list(itertools.product(MASTERS, STATES))


def make(n: int, master: str, states: str) -> tuple[torch.Tensor, AdamWState]:
    """Return a parameter of n numbers, fp32 with master "none", and its state."""
    param = torch.randn(n, generator=torch.Generator().manual_seed(0))
    param = param if master == "none" else param.bfloat16()
    return param, kernels.adamw_state(param, "split" if master == "none" else master, states)


def count_equal_steps(master: str, states: str, n: int, steps: int) -> int:
    """Return after how many steps parameter and state still have the reference's bits: all if nothing is wrong."""
    draw = torch.Generator().manual_seed(1)
    (ours, our_state), (theirs, their_state) = make(n, master, states), make(n, master, states)
    for step in range(1, steps + 1):
        grad = torch.randn(n, generator=draw) * 10 ** (6 * torch.rand(n, generator=draw) - 6)
        grad = grad if step % 2 else grad.bfloat16()
        given = SETTINGS | {"lr": 1e-3, "grad_scale": 0.5, "step": step, "seed": step, "offset": 8 * step}
        kernels.adamw(ours, grad, our_state, impl="native", **given)
        kernels.adamw(theirs, grad, their_state, impl="ref", **given)
        pairs = zip((ours, *our_state.tensors().values()), (theirs, *their_state.tensors().values()), strict=True)
        if not all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in pairs):
            return step - 1
    return steps


class TorchsWay:
    """A bf16 parameter updated by three passes of torch."""

    def __init__(self, n: int):
        self.param, _ = make(n, "stochastic", "fp32")
        self.master = torch.nn.Parameter(self.param.float())
        self.master.grad = torch.empty_like(self.master)
        betas = SETTINGS["beta1"], SETTINGS["beta2"]
        self.optimizer = torch.optim.AdamW(
            [self.master], lr=1e-3, betas=betas, eps=SETTINGS["eps"], weight_decay=SETTINGS["weight_decay"], fused=True
        )

    @torch.no_grad()
    def update(self, grad: torch.Tensor) -> None:
        """Take one step with a bf16 gradient."""
        self.master.grad.copy_(grad)
        self.optimizer.step()
        self.param.copy_(self.master)


def measure_in_turns(n: int, rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each contender in each round, without a first round, which touches all memory."""
    grad = torch.randn(n).bfloat16()
    source, target = torch.ones(n), torch.ones(n)
    torchs, ours = TorchsWay(n), {mode: make(n, *mode) for mode in BYTES}
    calls = {"copy": lambda step: target.copy_(source), "torch": lambda step: torchs.update(grad)}
    for (master, states), (param, state) in ours.items():
        calls[f"{master}, {states}"] = lambda step, param=param, state=state: kernels.adamw(
            param, grad, state, lr=1e-3, step=step, impl="native", **SETTINGS
        )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for step in range(1, rounds + 2):
        for name, call in calls.items():
            began = time.process_time()
            call(step)
            if step > 1:
                seconds[name].append(time.process_time() - began)
    return seconds


def parse_arguments() -> Namespace:
    parser = new_json_parser(__doc__)
    parser.add_argument("--parameters", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=15, help="with the same tensors")
    parser.add_argument("--times", type=int, default=4, help="that all tensors are made anew")
    parser.add_argument("--steps", type=int, default=1000, help="steps in which all bits are compared")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4353, 8192], help="of the compared tensors")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    equal = {
        f"{master}, {states}": min(count_equal_steps(master, states, n, args.steps) for n in args.sizes)
        for master, states in MODES
    }
    print(json.dumps(equal, indent=1), flush=True)
    torch.set_num_threads(1)
    n, seconds = args.parameters, defaultdict(list)
    for _ in range(args.times):
        for name, took in measure_in_turns(n, args.rounds).items():
            seconds[name] += took
    copy_rates = [8 * n / s for s in seconds["copy"]]
    figures = {}
    for (master, states), moved in BYTES.items():
        took = seconds[f"{master}, {states}"]
        figures[f"{master}, {states}"] = {
            "bytes_a_parameter": moved, "seconds": summarize(took),
            "gb_per_s": summarize(moved * n / s / 1e9 for s in took),
            "of_copy": summarize_ratios([moved * n / s for s in took], copy_rates),
            "faster_than_torch": summarize_ratios(seconds["torch"], took),
        }  # fmt: skip
    result = {
        "what": "AdamW of csrc/cpu against copies to and from fp32 and torch's fused AdamW, in turns",
        "parameters": n, "rounds": args.rounds, "times": args.times, "steps": args.steps, "equal_steps": equal,
        "sizes": args.sizes,
        "copy_gb_per_s": summarize(rate / 1e9 for rate in copy_rates), "torch_s": summarize(seconds["torch"]),
        "figures": figures, "instruction_set": load_cpu().cria_instruction_set().decode(), **describe_cpu(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "date": today(),
    }  # fmt: skip
    write_json(args.json, result)
    print(json.dumps({k: result[k] for k in ("copy_gb_per_s", "torch_s", "figures")}, indent=1, default=float))


if __name__ == "__main__":
    sys.exit(run_for_reader(main))
