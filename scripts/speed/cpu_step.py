"""Fine-tuning SmolLM2-135M on a CPU: our step against the transformers loop, in one run, as a ratio.

    python -m scripts.speed.cpu_step --json benchmarks/cpu_speed.json

Both get the dtype and thread count that a probe finds best, and we the micro-batch. The loop is timed twice: padded, at
the micro-batch of Stanford's command (4 rows), and at the size that a probe finds best for it, which may be 1, where
nothing is padded. Then all take the same steps in turn. Rows are drawn so that prompts and responses are as long as
Alpaca's. Tokens are those that the rows hold: padding never counts, and sharing a prefix does not reduce them.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from engine.data import dataset as data
from engine.data import packing
from engine.data.rows import read_rows
from engine.formats.find import embedded_gguf
from engine.formats.source import open_source
from engine.model.llama import new_model
from engine.text.tokenizer import load_tokenizer
from engine.training.optimizer import AdamW
from kernels.measure.alpaca import alpaca_lengths
from scripts.parity.transformers_loop import TransformersLoop, masked

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LR = 1e-5
PADDED = 4  # rows: --per_device_train_batch_size of Stanford's command
ROOT = Path(__file__).parents[2]
SEED_TASKS = ROOT / "data_gen" / "seed_tasks.jsonl"


class Ours:
    """Steps as engine.finetune takes them; micro is a budget of tokens."""

    def __init__(self, source, dataset, dtype):
        self.dataset = dataset
        self.model = new_model(source.config, "cpu", dtype)
        source.read_into(self.model)
        self.optimizer = AdamW(self.model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)

    def step(self, examples, micro):
        scale = 1 / self.dataset.loss_tokens()[examples].sum()
        for batch in packing.micro_batches(self.dataset, examples, micro, scale=scale):
            self.model.loss(batch).backward()
        self.optimizer.step(LR, self.optimizer.grad_norm(), 1.0)
        self.optimizer.zero_grad()


class Theirs:
    def __init__(self, folder, examples, dtype):
        self.examples = examples
        self.loop = TransformersLoop(folder, lr=LR, total_steps=1000, dtype=dtype, fused=True)

    def step(self, examples, micro):
        self.loop.step([self.examples[i] for i in examples], micro)


def seconds(stepper, examples, micro, threads):
    torch.set_num_threads(threads)
    began = time.perf_counter()
    stepper.step(examples, micro)
    return time.perf_counter() - began


def like_alpaca(dataset, n, generator):
    """n examples, each once, whose prompts and responses are as long as those of rows drawn from Alpaca."""
    alpaca = alpaca_lengths()
    responses = dataset.loss_tokens()
    prompts, picked = dataset.lengths() - responses, []
    for i in generator.integers(len(alpaca), size=n):
        off = np.abs(prompts - alpaca.prompt[i]) + np.abs(responses - alpaca.response[i])
        off[picked] = 1 << 30
        picked.append(int(off.argmin()))
    return np.array(picked)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(SEED_TASKS), help="Alpaca JSON or JSONL (the embedded seed tasks)")
    parser.add_argument("--json", required=True, help="where the figures go")
    parser.add_argument("--batch", type=int, default=32, help="examples a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=512)
    args = parser.parse_args()

    gguf = embedded_gguf()
    source, tokenizer = open_source(gguf), load_tokenizer(gguf)
    rows, _ = read_rows([Path(args.data)])
    dataset = data.tokenize(rows, tokenizer, max_length=args.max_length)
    generator = np.random.default_rng(0)
    pool = like_alpaca(dataset, min(len(dataset) // 2, args.batch * (args.rounds + 1)), generator)
    lengths = dataset.lengths()
    steps = [generator.choice(pool, args.batch, replace=False) for _ in range(args.rounds + 1)]
    probe, cores = steps[0][:16], torch.get_num_threads()
    with tempfile.TemporaryDirectory() as tmp:
        export = [sys.executable, "-m", "engine.export", "--model", "smollm2-135m", "--out", f"{tmp}/model"]
        subprocess.run(export, check=True)
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(f"{tmp}/model")
        plain = [{"instruction": row.instruction, "input": row.input, "output": row.output} for row in rows]
        examples = masked(plain, their_tokenizer, args.max_length)
        assert [len(ids) for ids, _ in examples] == lengths.tolist(), "both must train on the same tokens"
        make = {
            "cria": lambda dtype: Ours(source, dataset, dtype),
            "transformers": lambda dtype: Theirs(f"{tmp}/model", examples, dtype),
        }
        sizes, best, probes = {"cria": (1024, 2048, 4096), "transformers": (1, 2, PADDED, 8)}, {}, []
        for name, dtype in itertools.product(make, DTYPES):
            stepper = make[name](DTYPES[dtype])
            seconds(stepper, probe, sizes[name][1], cores)  # warms up
            for threads, micro in itertools.product(sorted({1, cores}), sizes[name]):
                if threads < cores and micro != sizes[name][1]:
                    continue
                rate = lengths[probe].sum() / seconds(stepper, probe, micro, threads)
                probes.append({"who": name, "dtype": dtype, "threads": threads, "micro": micro, "tokens_per_s": rate})
                print(probes[-1], flush=True)
                if rate > best.get(name, {"tokens_per_s": 0})["tokens_per_s"]:
                    best[name] = probes[-1]
        steppers = {name: make[name](DTYPES[best[name]["dtype"]]) for name in make}
        settings = {name: {k: best[name][k] for k in ("dtype", "threads", "micro")} for name in make}
        settings["transformers, padded"] = settings["transformers"] | {"micro": PADDED}
    rates = {name: [] for name in settings}
    for examples in steps[1:]:  # in turn, so that all see the same machine
        for name, setting in settings.items():
            stepper = steppers[name.partition(",")[0]]
            rates[name].append(lengths[examples].sum() / seconds(stepper, examples, setting["micro"], cores))
            print(f"{name}: {rates[name][-1]:.0f} tok/s", flush=True)

    def ratio(name):
        ratios = [a / b for a, b in zip(rates["cria"], rates[name], strict=True)]
        return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}

    result = {
        "what": "SmolLM2-135M fine-tuning on CPU, real tokens a second, steps in turn",
        "rows": Path(args.data).name, "batch": args.batch, "rounds": args.rounds, "max_length": args.max_length,
        "tokens_per_row": float(lengths[pool].mean()), "settings": settings,
        "tokens_per_s": {name: statistics.median(rate) for name, rate in rates.items()},
        "ratio": {name: ratio(name) for name in settings if name != "cria"},
        "probes": probes,
        "cpu": cpu_name(), "cores": cores, "torch": torch.__version__,
        "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    Path(args.json).write_text(json.dumps(result, indent=1, default=float) + "\n")
    print(json.dumps({k: result[k] for k in ("settings", "tokens_per_s", "ratio")}, indent=1))


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
