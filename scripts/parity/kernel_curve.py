"""One loss curve: a small model fine-tuned in fp32 through our kernels and through their references, step by step.

    python -m scripts.parity.kernel_curve --json benchmarks/kernel_parity.json

On a GPU the kernels themselves; elsewhere the same code in Triton's interpreter.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton

CPU = not torch.cuda.is_available()


def curve(kernels, out, args):
    """(loss, gradient norm) of every step."""
    command = [
        sys.executable, "-m", "engine.finetune", "--model", "tiny", "--random-init", "--data", "seed-tasks",
        "--out", out, "--max-steps", args.steps, "--epochs", 100, "--global-batch-size", args.batch,
        "--max-length", args.max_length, "--dtype", "fp32", "--lr", args.lr, "--kernels", kernels,
        "--micro-batch-tokens", args.max_length, "--log-every", 20,
    ]  # fmt: skip
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if CPU else {})
    subprocess.run([str(c) for c in command], check=True, env=environment)
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if line["event"] == "train"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="where the figures go")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        ours, references = (curve(kernels, Path(tmp) / kernels, args) for kernels in ("triton", "ref"))
    worst = {
        name: max(abs(a[k] / b[k] - 1) for a, b in zip(ours, references, strict=True))
        for k, name in enumerate(("loss", "grad_norm"))
    }
    result = {
        "what": "a small LLaMA in fp32, every op a kernel against every op a reference: per-step loss",
        "device": "CPU, Triton's interpreter" if CPU else torch.cuda.get_device_name(),
        "steps": args.steps, "batch": args.batch, "max_length": args.max_length, "lr": args.lr,
        "torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%Y-%m-%d"),
        "loss": {"kernels": [loss for loss, _ in ours], "references": [loss for loss, _ in references]},
        "worst_relative_difference": worst,
    }  # fmt: skip
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{args.steps} steps, loss {ours[0][0]:.3f} -> {ours[-1][0]:.3f}: worst relative difference {worst}")


if __name__ == "__main__":
    main()
