"""The section of docs/measurements.md on AdamW on a CPU."""

from scripts.pages.decoding import spread
from scripts.pages.without_gpu import paragraph


def cpu_adamw(figures):
    equal, copied = figures["equal_steps"], figures["copy_gb_per_s"]
    return [
        paragraph(
            f"AdamW of `csrc/cpu` has the reference's bits after {min(equal.values()):,} steps in each of {len(equal)} "
            f"kinds of parameter, master and states. Its speed, {figures['parameters']:,} parameters, "
            f"{figures['instruction_set']}, one thread, against a gradient copied to fp32, torch's fused AdamW and a "
            f"copy to bf16, and against torch's copy of fp32 numbers ({spread(copied, '.1f')} GB/s), in turns. Seconds "
            "are the process's CPU seconds, as other programs shared the machine. With fp32 states a core's root and "
            "division bound it, otherwise the random bits and the codes."
        ),
        "",
        "| master, states | bytes a parameter | GB/s | of the copy's rate | faster than torch by |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {f['bytes_a_parameter']:.1f} | {spread(f['gb_per_s'], '.1f')} | "
            f"{spread(f['of_copy'], '.2f')} | {spread(f['faster_than_torch'], '.2f')} |"
            for name, f in figures["figures"].items()
        ),
    ]
