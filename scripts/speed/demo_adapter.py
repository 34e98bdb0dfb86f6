"""The demo with all weights, with LoRA and with QLoRA, in turn: held-out loss, answers, seconds and memory.

    python -m scripts.speed.demo_adapter --json benchmarks/demo_adapter.json

Runs are those of `make demo` and `make demo ADAPTER=...`. State is what training keeps, which engine.planning counts:
weights, their gradients, masters and optimizer states. The peak is that of the whole process, as metrics.jsonl has it.
"""

import json
import tempfile
from pathlib import Path

import torch

from engine.model.config import EMBEDDED_MODEL, MODELS
from engine.output.folder import METRICS, read_metrics
from engine.planning.weights import state_bytes
from engine.training.config import FinetuneConfig
from engine.training.planning_input import setting_from_config
from kernels.base.commands import run_command
from scripts.base.results import describe_cpu, new_json_parser, today, write_json
from scripts.speed.demo import take_run

ADAPTERS = ("none", "lora", "qlora")  # --adapter


def measure_run(out: Path, adapter: str, seed: int) -> dict:
    """Return the figures of one run of the demo."""
    flags = [] if adapter == "none" else ["--adapter", adapter, "--recompute", "block", "--lr", "2e-3"]
    run = take_run(out, [*flags, "--seed", str(seed)])
    dtype = json.loads((out / "run.json").read_text())["facts"]["dtype"]  # the flag may be "auto"
    config = FinetuneConfig(EMBEDDED_MODEL, data=("orders",), adapter=adapter, optimizer_states="fp32")
    state = state_bytes(MODELS[EMBEDDED_MODEL], setting_from_config(config, getattr(torch, dtype)))
    trains = [line for line in read_metrics(out / METRICS) if line["event"] == "train"]
    return {"adapter": adapter, "seed": seed, "dtype": dtype} | run | {
        "state_bytes": state.weights + state.trained + state.master + state.states,
        "peak_bytes": max(line["peak_memory_bytes"] for line in trains),
    }  # fmt: skip


def main() -> None:
    """Take the runs, and write their figures."""
    parser = new_json_parser(str(__doc__))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, each with another seed (3)")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for adapter in ADAPTERS:
                runs.append(measure_run(Path(folder) / f"{adapter}-{seed}", adapter, seed))
                print(runs[-1], flush=True)
    write_json(args.json, describe_cpu() | {"date": today(), "runs": runs})


if __name__ == "__main__":
    run_command(main)
