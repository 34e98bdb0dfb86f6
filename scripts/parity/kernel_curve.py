"""One loss curve twice: a small model fine-tuned in fp32 through our kernels, and through their references.

    python -m scripts.parity.kernel_curve --json benchmarks/kernel_parity.json

On a GPU the kernels themselves run. Elsewhere Triton's interpreter runs the same code.
"""

import tempfile
from pathlib import Path

import torch
import triton

from kernels.base.commands import run_command
from scripts.base.results import today, write_json
from scripts.parity.curves import describe_settings, finetune_curve, losses_of, new_curve_parser, worst_difference

CPU = not torch.cuda.is_available()


def main():
    args = new_curve_parser(__doc__, steps=300, batch=2, max_length=96, lr=1e-3).parse_args()
    flags = ["--model", "tiny", "--random-init", "--data", "seed-tasks", "--epochs", 100, "--log-every", 20]
    flags += ["--micro-batch-tokens", args.max_length]
    environment = {"TRITON_INTERPRET": "1"} if CPU else {}
    with tempfile.TemporaryDirectory() as folder:
        ours, reference = (
            finetune_curve(args, Path(folder, name), *flags, "--kernels", name, environment=environment)
            for name in ("triton", "ref")
        )
    worst = worst_difference(ours, reference)
    result = {
        "what": "a small LLaMA in fp32, every op a kernel against every op a reference: per-step loss",
        "device": "CPU, Triton's interpreter" if CPU else torch.cuda.get_device_name(),
        **describe_settings(args), "torch": torch.__version__, "triton": triton.__version__, "date": today(),
        "loss": {"kernels": losses_of(ours), "references": losses_of(reference)},
        "worst_relative_difference": worst,
    }  # fmt: skip
    write_json(args.json, result)
    print(f"{args.steps} steps, loss {ours[0][0]:.3f} -> {ours[-1][0]:.3f}: worst relative difference {worst}")


if __name__ == "__main__":
    run_command(main)
