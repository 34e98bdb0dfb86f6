"""AdamW's 8-bit states against fp32 ones: SmolLM2-135M fine-tuned on a CPU, the same steps, one curve for each.

    python -m scripts.parity.optimizer_states --json benchmarks/optimizer_parity.json

Weights are fp32, so that the states alone differ. The final loss is the mean over the last steps, a tenth of all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

STATES = ("fp32", "8bit")
SEED_TASKS = Path(__file__).parents[2] / "data_gen" / "seed_tasks.jsonl"


def curve(states, out, args):
    """The loss of every step."""
    command = [
        sys.executable, "-m", "engine.finetune", "--model", "smollm2-135m", "--data", args.data, "--out", out,
        "--max-steps", args.steps, "--epochs", 100, "--global-batch-size", args.batch, "--max-length", args.max_length,
        "--lr", args.lr, "--dtype", "fp32", "--device", "cpu", "--optimizer-states", states, "--log-every", 20,
    ]  # fmt: skip
    subprocess.run([str(c) for c in command], check=True)
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "train"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, help="where the figures go")
    parser.add_argument("--data", type=Path, default=SEED_TASKS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--runs", type=Path, help="keep the runs here; a second start goes on from them")
    args = parser.parse_args()
    result = {
        "what": "SmolLM2-135M fine-tuned in fp32 on a CPU with each kind of optimizer states: per-step loss",
        "rows": args.data.name, "steps": args.steps, "batch": args.batch, "max_length": args.max_length, "lr": args.lr,
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "loss": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as tmp:
        for states in STATES:
            result["loss"][states] = curve(states, (args.runs or Path(tmp)) / states, args)
    last = max(1, args.steps // 10)
    final = {states: statistics.mean(losses[-last:]) for states, losses in result["loss"].items()}
    reference = result["loss"]["fp32"]
    result["final_loss"] = final
    result["final_relative_difference"] = {s: abs(final[s] / final["fp32"] - 1) for s in STATES[1:]}
    result["worst_relative_difference"] = {
        s: max(abs(a / b - 1) for a, b in zip(result["loss"][s], reference, strict=True)) for s in STATES[1:]
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{args.steps} steps, final loss {final}, relative difference {result['final_relative_difference']}")


if __name__ == "__main__":
    main()
