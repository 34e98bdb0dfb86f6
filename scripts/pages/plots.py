"""Pictures of the kernels from a file that scripts.gpu_report or kernels.bench wrote. Needs matplotlib (extra "plots").

python -m scripts.pages.plots benchmarks/DEVICE.json --out docs/img
"""

import argparse
import json
from pathlib import Path

from kernels.measure.plot import draw


def benchmarks(report):
    """The result of kernels.bench in a report; a result of kernels.bench is one already."""
    if "records" in report:
        return report
    parts = report["parts"]
    if "records" not in parts.get("kernels", {}):
        raise ValueError("the report holds no kernel benchmarks; run scripts.gpu_report with its part kernels")
    return {**parts["kernels"], "machine": parts["machine"], "ceilings": ceilings(parts)}


def ceilings(parts):
    """The machine's, or those that the first benchmark measured for itself."""
    return parts.get("ceilings") or next(iter(parts["kernels"]["ceilings"].values()))


def main():
    parser = argparse.ArgumentParser(
        prog="python -m scripts.pages.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", help="the file with the figures")
    parser.add_argument("--out", default="docs/img", help="folder for the pictures (docs/img)")
    args = parser.parse_args()
    for path in draw(benchmarks(json.loads(Path(args.json).read_text())), args.out):
        print(path)


if __name__ == "__main__":
    main()
