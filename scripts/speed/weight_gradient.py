"""The gradient of a weight on a CPU with AMX: csrc/cpu/weight_gradient.cpp against torch's product, in turns.

    python -m scripts.speed.weight_gradient --json benchmarks/cpu_weight_gradient.json

Shapes are those of SmolLM2-135M's weights in a micro-batch of 4,096 tokens, and of a 7B's. Both add dy^T x to a
gradient in bf16. Seconds are the process's CPU seconds in one thread: other programs may share the machine. Errors are
the largest against fp64, in units of the largest number of the result.
"""

import json
import sys
import time
from argparse import Namespace

import torch

from data_gen.base.cli import run_for_reader
from kernels.native.library import NativeError
from kernels.native.weight_gradient import has_amx, write_weight_gradient
from scripts.base.results import describe_cpu, new_json_parser, summarize, summarize_ratios, today, write_json

SHAPES = {  # tokens, rows and columns of the weight
    "SmolLM2-135M wqkv": (4096, 960, 576), "SmolLM2-135M wo": (4096, 576, 576), "SmolLM2-135M w13": (4096, 3072, 576),
    "SmolLM2-135M w2": (4096, 576, 1536), "SmolLM2-135M head": (1024, 49152, 576), "7B wo": (1024, 4096, 4096),
}  # fmt: skip


def measure(tokens: int, rows: int, columns: int, rounds: int) -> dict:
    """Return the figures of one shape, without a first round, which touches all memory."""
    draw = torch.Generator().manual_seed(0)
    dy, x, start = (
        torch.randn(*shape, generator=draw).bfloat16() for shape in ((tokens, rows), (tokens, columns), (rows, columns))
    )
    grads = {"torch": start.clone(), "ours": start.clone()}
    calls = {
        "torch": lambda: grads["torch"].addmm_(dy.T, x),
        "ours": lambda: write_weight_gradient(grads["ours"], dy, x, is_added=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            seconds[name] += [time.process_time() - began] if round_ else []
            if not round_:
                want = start[:256].double() + dy[:, :256].double().T @ x.double()
                seconds[f"{name}'s error"] = [float((grads[name][:256] - want).abs().max() / want.abs().max())]
    errors = {name: seconds.pop(f"{name}'s error")[0] for name in calls}
    rate = 2 * tokens * rows * columns / 1e9
    return {
        "shape": [tokens, rows, columns], "errors": errors,
        "gflop_per_s": {name: summarize(rate / s for s in seconds[name]) for name in calls},
        "faster_than_torch": summarize_ratios(seconds["torch"], seconds["ours"]),
    }  # fmt: skip


def parse_arguments() -> Namespace:
    parser = new_json_parser(str(__doc__))
    parser.add_argument("--rounds", type=int, default=21)
    return parser.parse_args()


def main() -> None:
    """Take turns at every shape, and write the figures."""
    args = parse_arguments()
    if not has_amx():
        raise NativeError("this processor has no AMX, or the CPU library is not in use (python -m kernels.info)")
    torch.set_num_threads(1)
    figures = {name: measure(*shape, args.rounds) for name, shape in SHAPES.items()}
    result = {
        "what": "dW += dy^T x in bf16 by AMX, csrc/cpu against torch, in turns", "rounds": args.rounds,
        "figures": figures, "threads": 1, "torch": torch.__version__, **describe_cpu(), "date": today(),
    }  # fmt: skip
    write_json(args.json, result)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    sys.exit(run_for_reader(main))
