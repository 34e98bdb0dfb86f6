"""AdamW's 8-bit states against fp32 states: SmolLM2-135M fine-tuned twice on a CPU with the same steps.

    python -m scripts.parity.optimizer_states --json benchmarks/optimizer_parity.json

Weights are fp32, so only the states differ. The final loss is the mean over the last tenth of the steps.
"""

import statistics
import tempfile
from pathlib import Path

import torch

from data_gen.api.prompt import SEED_TASKS
from kernels.base.commands import run_command
from scripts.base.results import today, write_json
from scripts.parity.curves import describe_settings, finetune_curve, losses_of, new_curve_parser

STATES = ("fp32", "8bit")


def main():
    parser = new_curve_parser(__doc__, steps=200, batch=2, max_length=192, lr=2e-5)
    parser.add_argument("--data", type=Path, default=SEED_TASKS)
    parser.add_argument("--runs", type=Path, help="keep the runs here; a second start goes on from them")
    args = parser.parse_args()
    flags = ["--model", "smollm2-135m", "--data", args.data, "--epochs", 100, "--device", "cpu", "--log-every", 20]
    with tempfile.TemporaryDirectory() as tmp:
        folder = args.runs or Path(tmp)
        loss = {
            states: losses_of(finetune_curve(args, folder / states, *flags, "--optimizer-states", states))
            for states in STATES
        }
    n_last = max(1, args.steps // 10)
    final = {states: statistics.mean(losses[-n_last:]) for states, losses in loss.items()}
    result = {
        "what": "SmolLM2-135M fine-tuned in fp32 on a CPU with each kind of optimizer states: per-step loss",
        "rows": args.data.name, **describe_settings(args), "torch": torch.__version__, "date": today(),
        "loss": loss, "final_loss": final,
        "final_relative_difference": {"8bit": abs(final["8bit"] / final["fp32"] - 1)},
        "worst_relative_difference": {
            "8bit": max(abs(a / b - 1) for a, b in zip(loss["8bit"], loss["fp32"], strict=True))
        },
    }  # fmt: skip
    write_json(args.json, result)
    print(f"{args.steps} steps, final loss {final}, relative difference {result['final_relative_difference']}")


if __name__ == "__main__":
    run_command(main)
