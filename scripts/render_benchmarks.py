"""Writes README's figures from benchmarks/*.json, so that no number there is typed by hand.

python -m scripts.render_benchmarks            writes them
python -m scripts.render_benchmarks --check    exits 1 when README says something else
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
START, END = "<!-- figures: made by scripts/render_benchmarks.py -->\n", "<!-- /figures -->"


def parity(figures):
    worst = max(d["loss"] for d in figures["worst_relative_difference"].values())
    sizes = ", ".join(figures["worst_relative_difference"])
    return (
        f"| same maths: SmolLM2-135M, fp32, {figures['steps']} steps of {figures['batch']} Alpaca rows, micro-batches "
        f"of {sizes}: worst relative difference of a step's loss from transformers | {worst:.1e} |"
    )


def cpu_speed(figures):
    ours, theirs = (figures["tokens_per_s"][who] for who in ("cria", "transformers"))
    ratio, best = figures["ratio"], figures["best"]
    return (
        f"| CPU ({figures['cores']} cores, {figures['cpu']}): SmolLM2-135M, real tokens/s, ours in "
        f"{best['cria']['dtype']} against transformers in {best['transformers']['dtype']}, the best of each | "
        f"{ours:.0f} against {theirs:.0f}: {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f}) |"
    )


def rendered():
    lines = ["", "| measured | |", "|---|---|"]
    for render in (parity, cpu_speed):
        path = ROOT / "benchmarks" / f"{render.__name__}.json"
        if path.exists():
            lines.append(render(json.loads(path.read_text())))
    lines.append("| GPU | not yet measured |")
    return "\n".join([*lines, "", ""])


def main():
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(START)
    new = before + START + rendered() + END + rest.split(END, 1)[1]
    if "--check" in sys.argv:
        if new != readme:
            sys.exit(
                "README.md: its figures are not those of benchmarks/*.json; run python -m scripts.render_benchmarks"
            )
        return
    (ROOT / "README.md").write_text(new)


if __name__ == "__main__":
    main()
