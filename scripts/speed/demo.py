"""The demo over several seeds: held-out loss and answers before and after, and its time beside the demo of before.

    python -m scripts.speed.demo --json benchmarks/demo.json

Each seed is a run of `python -m engine.finetune`, which draws another order of the rows. The run it is timed against is
the demo of before, on the embedded seed tasks. Seconds are both CPU seconds, which other programs on the machine change
little, and those of a clock.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine.output.folder import METRICS, read_metrics
from kernels.base.commands import run_command
from scripts.base.results import describe_cpu, new_json_parser, summarize, today, write_json

SEED_TASKS = (
    "--model smollm2-135m --data seed-tasks --epochs 1 --global-batch-size 16 --lr 1e-4 --eval-fraction 0.1 "
    "--eval-every end --sample-every end --sample-tokens 48"
)


def take_run(out: Path, flags: list[str]) -> dict:
    """Return what a run of engine.finetune with these flags took and reached."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "engine.finetune", "--resume", "never", "--out", str(out), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = read_metrics(out / METRICS)
    scores = [line for line in lines if line["event"] == "score"]
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "loss": [line["loss"] for line in lines if line["event"] == "eval"],
        "equal": [line["equal"] for line in scores],
        "answers": scores[0]["answers"] if scores else 0,
        "overlap": [line["overlap"] for line in scores],
        "steps": sum(line["event"] == "train" for line in lines),
    }


def main() -> None:
    """Take the runs, and write their figures."""
    parser = new_json_parser(str(__doc__))
    parser.add_argument("--seeds", type=int, default=5, help="runs of the demo, each with another seed (5)")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            runs.append({"seed": seed} | take_run(Path(folder) / f"demo{seed}", ["--seed", str(seed)]))
            print(runs[-1], flush=True)
            if seed == (args.seeds - 1) // 2:  # in the middle, because the machine may change
                dtype = json.loads((Path(folder) / "demo0" / "run.json").read_text())["config"]["dtype"]
                seed_tasks = take_run(Path(folder) / "seed-tasks", [*SEED_TASKS.split(), "--dtype", dtype])
                print("seed tasks", seed_tasks, flush=True)
    result = describe_cpu() | {"date": today(), "dtype": dtype, "runs": runs, "seed_tasks": seed_tasks}
    cpu_seconds = [run["cpu_seconds"] for run in runs]
    result["cpu_ratio"] = summarize([seconds / seed_tasks["cpu_seconds"] for seconds in cpu_seconds])
    write_json(args.json, result)


if __name__ == "__main__":
    run_command(main)
