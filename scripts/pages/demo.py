"""The demo's section of docs/measurements.md and its row of README."""

from scripts.pages.without_gpu import paragraph


def demo(figures):
    """Return the lines about the demo over several seeds."""
    runs, before = figures["runs"], figures["seed_tasks"]
    ratio = figures["cpu_ratio"]
    return [
        paragraph(
            f"`make demo` teaches SmolLM2-135M ({figures['dtype']}) to write messages as orders, from 144 rows, and "
            f"asks it for {runs[0]['answers']} that share no name, town, thing or wording with them. The seed is "
            f"of the order of the rows. The demo of before, on the seed tasks, took {before['cpu_seconds']:.0f} CPU "
            f"seconds ({before['seconds']:.0f} by the clock of a machine with other work) and went "
            f"from a held-out loss of {before['loss'][0]:.4f} to {before['loss'][-1]:.4f}; this one "
            f"takes {ratio['median']:.2f} of its CPU seconds ({ratio['min']:.2f} to {ratio['max']:.2f})."
        ),
        "",
        "| seed | held-out loss before | after | answers as wanted before | after | CPU seconds | seconds |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {run['seed']} | {run['loss'][0]:.4f} | {run['loss'][-1]:.4f} | {run['equal'][0]} of {run['answers']} | "
            f"{run['equal'][-1]} of {run['answers']} | {run['cpu_seconds']:.0f} | {run['seconds']:.0f} |"
            for run in runs
        ),
    ]


def demo_adapters(figures):
    """Return the lines about the demo with all weights, with LoRA and with QLoRA."""
    names = {"none": "all weights", "lora": "LoRA", "qlora": "QLoRA"}
    whole = {run["seed"]: run for run in figures["runs"] if run["adapter"] == "none"}

    def memory(run, what):
        return f"{run[what] / 1e9:.2f} GB | {run[what] / whole[run['seed']][what]:.2f}"

    return [
        paragraph(
            f"`make demo` beside `make demo ADAPTER=lora` and `ADAPTER=qlora`, which compute each layer again in "
            f"backward, in {figures['runs'][0]['dtype']}. What training keeps is weights, their gradients, masters and "
            "optimizer states. The peak is that of the whole process, with Python, PyTorch, activations and what "
            "oneDNN compiles. Shares are of the run of all weights with the same seed."
        ),
        "",
        "| trains | seed | held-out loss | answers as wanted | training keeps | share | peak | share | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {names[run['adapter']]} | {run['seed']} | {run['loss'][-1]:.4f} | "
            f"{run['equal'][-1]} of {run['answers']} | {memory(run, 'state_bytes')} | {memory(run, 'peak_bytes')} | "
            f"{run['cpu_seconds']:.0f} |"
            for run in figures["runs"]
        ),
    ]


def demo_row(figures):
    """Return README's cells: what, ours, peer, ratio."""
    runs = figures["runs"]
    after = sorted(run["equal"][-1] for run in runs)
    what = f"held-out answers as wanted after `make demo`, {len(runs)} seeds"
    ours, most = f"{after[0]} to {after[-1]} of {runs[0]['answers']}", max(run["equal"][0] for run in runs)
    return what, ours, f"{most} (before it)", f"{figures['cpu_ratio']['median']:.2f} of the old demo's CPU time"
