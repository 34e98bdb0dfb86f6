"""One loss curve: SmolLM2-135M fine-tuned by transformers and by us, the same rows, step by step.

    python -m scripts.parity.loss_curve --data alpaca.json --json benchmarks/parity.json

fp32 on CPU, the order of the file, 20 steps of 8 rows. Ours runs through its command line at several micro-batch sizes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from engine.data.rows import read_rows
from scripts.parity.transformers_loop import TransformersLoop, masked


def ours(data, out, args, micro):
    command = [
        sys.executable, "-m", "engine.finetune", "--model", "smollm2-135m", "--data", data, "--out", out,
        "--max-steps", args.steps, "--global-batch-size", args.batch, "--micro-batch-size", micro, "--no-shuffle",
        "--dtype", "fp32", "--device", "cpu", "--lr", args.lr, "--max-length", args.max_length, "--epochs", 1,
    ]  # fmt: skip
    subprocess.run([str(c) for c in command], check=True)
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if line["event"] == "train"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Alpaca JSON or JSONL")
    parser.add_argument("--json", required=True, help="where the figures go")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "model"
        export = [sys.executable, "-m", "engine.export", "--model", "smollm2-135m", "--out", folder]
        subprocess.run([str(c) for c in export], check=True)
        rows = [vars_of(row) for row in read_rows([Path(args.data)])[0][: args.steps * args.batch]]
        examples = masked(rows, transformers.AutoTokenizer.from_pretrained(folder), args.max_length)
        loop = TransformersLoop(folder, lr=args.lr, total_steps=args.steps, exact_norm=True)
        theirs = []
        for i in range(args.steps):
            theirs.append(loop.step(examples[i * args.batch : (i + 1) * args.batch], args.batch))
            print(f"transformers {i + 1}/{args.steps}  loss {theirs[-1][0]:.4f}", flush=True)
        curves = {micro: ours(args.data, Path(tmp) / f"micro-{micro}", args, micro) for micro in args.micro}
    worst = {
        micro: {
            name: max(abs(a[k] / b[k] - 1) for a, b in zip(curve, theirs, strict=True))
            for k, name in enumerate(("loss", "grad_norm"))
        }
        for micro, curve in curves.items()
    }
    result = {
        "what": "SmolLM2-135M, fp32, CPU: per-step loss and gradient norm against transformers with padding",
        "steps": args.steps, "batch": args.batch, "max_length": args.max_length, "lr": args.lr,
        "data": Path(args.data).name, "tokens": sum(len(ids) for ids, _ in examples),
        "torch": torch.__version__, "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d"),
        "transformers_loss": [loss for loss, _ in theirs],
        "loss": {micro: [loss for loss, _ in curve] for micro, curve in curves.items()},
        "worst_relative_difference": worst,
    }  # fmt: skip
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    for micro, difference in worst.items():
        print(f"micro-batch {micro}: worst relative difference {difference}")


def vars_of(row):
    return {"instruction": row.instruction, "input": row.input, "output": row.output}


if __name__ == "__main__":
    main()
