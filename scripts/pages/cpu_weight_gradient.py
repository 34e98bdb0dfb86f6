"""The section of docs/measurements.md on the gradient of a weight on a CPU with AMX."""

from scripts.pages.decoding import spread
from scripts.pages.without_gpu import paragraph


def cpu_weight_gradient(figures):
    return [
        paragraph(
            "`csrc/cpu` adds dy^T x to a weight's gradient in bf16 by AMX, torch by oneDNN's AMX; one thread of each, "
            f"{figures['rounds']} times in turns. Seconds are the process's CPU seconds, as other programs shared the "
            "machine. An error is the largest against fp64, in units of the result's largest number: half a unit in "
            "the last place of bf16 is 0.002 to 0.004."
        ),
        "",
        "| weight | tokens, rows, columns | GFLOP/s | torch's GFLOP/s | faster than torch by | error | torch's error |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {', '.join(f'{n:,}' for n in f['shape'])} | {spread(f['gflop_per_s']['ours'], '.0f')} | "
            f"{spread(f['gflop_per_s']['torch'], '.0f')} | {spread(f['faster_than_torch'], '.2f')} | "
            f"{f['errors']['ours']:.4f} | {f['errors']['torch']:.4f} |"
            for name, f in figures["figures"].items()
        ),
    ]
