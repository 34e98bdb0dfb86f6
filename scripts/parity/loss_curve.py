"""One loss curve twice: SmolLM2-135M fine-tuned by transformers and by us, on the same rows, step by step.

    python -m scripts.parity.loss_curve --data alpaca.json --json benchmarks/parity.json

Both run in fp32 on a CPU, in the order of the file, 20 steps of 8 rows. Ours runs at several micro-batch sizes.
"""

import tempfile
from pathlib import Path

import torch
import transformers

from engine.data.rows import read_rows
from kernels.base.commands import run_command
from scripts.base.results import today, write_json
from scripts.base.rows import row_as_dict
from scripts.parity.curves import (
    describe_settings,
    finetune_curve,
    losses_of,
    new_curve_parser,
    run_module,
    worst_difference,
)
from scripts.parity.transformers_loop import TransformersLoop, encode_rows


def transformers_curve(args, examples, folder):
    """Return (loss, gradient norm) of every step that transformers takes from the model in the folder."""
    loop = TransformersLoop(folder, lr=args.lr, total_steps=args.steps, exact_norm=True)
    curve = []
    for i in range(args.steps):
        curve.append(loop.step(examples[i * args.batch : (i + 1) * args.batch], args.batch))
        print(f"transformers {i + 1}/{args.steps}  loss {curve[-1][0]:.4f}", flush=True)
    return curve


def main():
    parser = new_curve_parser(__doc__, steps=20, batch=8, max_length=512, lr=2e-5)
    parser.add_argument("--data", required=True, help="Alpaca JSON or JSONL")
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    flags = ["--model", "smollm2-135m", "--data", args.data, "--no-shuffle", "--device", "cpu", "--epochs", 1]
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp, "model")
        run_module("engine.export", "--model", "smollm2-135m", "--out", folder)
        rows = [row_as_dict(row) for row in read_rows([Path(args.data)])[0][: args.steps * args.batch]]
        examples = encode_rows(rows, transformers.AutoTokenizer.from_pretrained(folder), args.max_length)
        theirs = transformers_curve(args, examples, folder)
        curves = {
            micro: finetune_curve(args, Path(tmp, f"micro-{micro}"), *flags, "--micro-batch-size", micro)
            for micro in args.micro
        }
    worst = {micro: worst_difference(curve, theirs) for micro, curve in curves.items()}
    result = {
        "what": "SmolLM2-135M, fp32, CPU: per-step loss and gradient norm against transformers with padding",
        **describe_settings(args), "data": Path(args.data).name, "tokens": sum(len(ids) for ids, _ in examples),
        "torch": torch.__version__, "transformers": transformers.__version__, "date": today(),
        "transformers_loss": losses_of(theirs),
        "loss": {micro: losses_of(curve) for micro, curve in curves.items()},
        "worst_relative_difference": worst,
    }  # fmt: skip
    write_json(args.json, result)
    for micro, difference in worst.items():
        print(f"micro-batch {micro}: worst relative difference {difference}")


if __name__ == "__main__":
    run_command(main)
