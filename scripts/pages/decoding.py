"""The section of docs/measurements.md on decoding on a CPU, and its line of README's table."""

from scripts.pages.without_gpu import paragraph


def spread(summary: dict, form: str) -> str:
    """Return a median with its extremes: 1.99 (1.74 to 2.28)."""
    return f"{summary['median']:{form}} ({summary['min']:{form}} to {summary['max']:{form}})"


def decoding(figures):
    names = {"cria": "ours", "cria, torch's operators": "ours with torch's operators"}
    lines = [
        paragraph(
            "SmolLM2-135M answers one prompt greedily in bf16. All take turns; a figure is the time from the first "
            f"token of an answer to its last, of {figures['tokens']}. The machine's load is told: where other "
            "programs run, threads that wait for each other lose more time than they work, so CPU milliseconds of all "
            "threads stand beside the time on the clock. The last column counts the tokens with which an answer begins "
            "as the same weights in fp32 give them."
        ),
        "",
        "| | threads | CPU ms a token | ours takes less CPU by | ms a token | ours is faster by | as in fp32 |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for run in figures["runs"]:
        for name in run["ms_a_token"]:
            times = [spread(run[key][name], ".2f") if name in run[key] else "" for key in ("cpu_ratio", "ratio")]
            cpu, wall = (run[key][name]["median"] for key in ("cpu_ms_a_token", "ms_a_token"))
            same = f"{run['tokens_as_in_fp32'][name]} of {figures['tokens']}"
            who = names.get(name, name)
            lines.append(f"| {who} | {run['threads']} | {cpu:.1f} | {times[0]} | {wall:.1f} | {times[1]} | {same} |")
    one = figures["runs"][0]
    rate = figures["weight_bytes"] / 1e6 / one["cpu_ms_a_token"]["cria"]["median"]
    loads = " and ".join(f"{run['load_average']['median']:.1f}" for run in figures["runs"])
    lines += [
        "",
        paragraph(
            f"The load average was {loads}. In a CPU second ours reads {rate:.1f} GB of weights, beside "
            f"{one['read_gb_per_cpu_s']:.1f} GB in a product that does nothing else, the best of ten."
        ),
    ]  # fmt: skip
    return lines


def decoding_row(figures):
    run = figures["runs"][0]
    times, best = run["cpu_ms_a_token"], run["cpu_ratio"]["transformers"]
    peer = f"{times['transformers']['median']:.1f} (transformers)"
    return "decoding SmolLM2-135M in bf16, CPU ms a token", f"{times['cria']['median']:.1f}", peer, spread(best, ".2f")
