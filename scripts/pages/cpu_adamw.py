"""The sections of docs/measurements.md on AdamW on a CPU, and on offloaded updates."""

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
            "are the process's CPU seconds, as other programs shared the machine. Torch's way moves 46 bytes a "
            "parameter."
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


def offloaded(figures):
    counts, held = figures["micro_batches"], figures["gradient_bytes"]
    return [
        paragraph(
            f"Equal models of {figures['parameters']:,} parameters (six layers of SmolLM2-135M, {figures['dtype']}) "
            f"take {figures['rounds']} equal steps of {min(counts)} to {max(counts)} micro-batches in turns, losses "
            "and norms equal to the bit: with everything on the device, and with states and gradients on the host, "
            "where gradients leave after backward or in it. Device and host are one CPU here, so each copy takes its "
            "time and hides behind nothing; on a GPU copies run beside backward. Seconds are the process's CPU seconds "
            f"in one thread. AdamW alone moves {spread(figures['update_gb_per_s'], '.1f')} GB/s, weights on their way "
            f"back included. Of {held['all'] / 1e6:.0f} MB of gradients at most {held['at once'] / 1e6:.0f} are on the "
            "device."
        ),
        "",
        "| gradients | seconds a step | AdamW's, from the norm on |",
        "|---|---|---|",
        *(
            f"| {way} | {spread(took, '.2f')} | {spread(figures['update_s'][way], '.3f')} |"
            for way, took in figures["seconds"].items()
        ),
        "",
        f"In backward over after it: {spread(figures['in_backward_over_after'], '.3f')}.",
    ]
