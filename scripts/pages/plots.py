"""Pictures of the kernels from a file that scripts.gpu_report or kernels.bench wrote. Needs matplotlib (extra "plots").

python -m scripts.pages.plots benchmarks/DEVICE.json --out docs/img
"""

import argparse
import json
from pathlib import Path

from kernels.base.commands import run_command
from kernels.measure.plot import draw


def read_benchmarks(report: dict) -> dict:
    """Return the result of kernels.bench in a GPU report. A result of kernels.bench is returned as it is."""
    if "records" in report:
        return report
    parts = report["parts"]
    if "records" not in parts.get("kernels", {}):
        raise ValueError("the report holds no kernel benchmarks; run scripts.gpu_report with its part kernels")
    return {**parts["kernels"], "machine": parts["machine"], "ceilings": find_ceilings(parts)}


def find_ceilings(parts: dict) -> dict:
    """Return the ceilings the report measured, or else those of its first benchmark."""
    return parts.get("ceilings") or next(iter(parts["kernels"]["ceilings"].values()))


def main() -> None:
    """Draw the pictures of a file into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.pages.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", help="the file with the figures")
    parser.add_argument("--out", default="docs/img", help="folder for the pictures (docs/img)")
    args = parser.parse_args()
    for path in draw(read_benchmarks(json.loads(Path(args.json).read_text())), args.out):
        print(path)


if __name__ == "__main__":
    run_command(main)
