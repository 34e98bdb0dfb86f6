"""Fine-tuning SmolLM2-135M on a CPU: our step against the transformers loop, in one run, as a ratio.

    python -m scripts.cpu_speed --json benchmarks/cpu_speed.json

Both get the dtype, thread count and micro-batch size that a probe finds best, then take the same steps in turn.
Tokens are those that the rows hold: padding never counts.
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

from engine import data, packing
from engine.load import embedded_gguf
from engine.model import new_model
from engine.optim import AdamW
from engine.rows import read_rows
from engine.tokenizer import load_tokenizer
from engine.weights import open_source
from scripts.peers import TransformersLoop, masked

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LR = 1e-5
SEED_TASKS = Path(__file__).parent.parent / "data_gen" / "seed_tasks.jsonl"


class Ours:
    """Steps as engine.finetune takes them."""

    def __init__(self, source, dataset, dtype):
        self.dataset = dataset
        self.model = new_model(source.config, "cpu", dtype)
        source.read_into(self.model)
        self.optimizer = AdamW(self.model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)

    def step(self, examples, micro):
        n_loss = sum(int(self.dataset.is_target_of(i).sum()) for i in examples)
        batches = packing.micro_batches(self.dataset, examples, 10**9, micro)
        for batch in batches:
            (self.model.loss(batch) / n_loss).backward()
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(SEED_TASKS), help="Alpaca JSON or JSONL (the embedded seed tasks)")
    parser.add_argument("--json", required=True, help="where the figures go")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=512)
    args = parser.parse_args()

    gguf = embedded_gguf()
    source, tokenizer = open_source(gguf), load_tokenizer(gguf)
    rows, _ = read_rows([Path(args.data)])
    dataset = data.tokenize(rows, tokenizer, max_length=args.max_length)
    lengths, generator = dataset.lengths(), np.random.default_rng(0)
    steps = [generator.choice(len(dataset), args.batch, replace=False) for _ in range(args.rounds + 1)]
    probe, cores = steps[0][:8], torch.get_num_threads()
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
        best, probes = {}, []
        for name, dtype in itertools.product(make, DTYPES):
            stepper = make[name](DTYPES[dtype])
            seconds(stepper, probe, args.batch, cores)  # warms up
            for threads, micro in itertools.product(sorted({1, cores}), (2, 8)):
                rate = lengths[probe].sum() / seconds(stepper, probe, micro, threads)
                probes.append({"who": name, "dtype": dtype, "threads": threads, "micro": micro, "tokens_per_s": rate})
                print(probes[-1], flush=True)
                if rate > best.get(name, {"tokens_per_s": 0})["tokens_per_s"]:
                    best[name] = probes[-1]
        steppers = {name: make[name](DTYPES[best[name]["dtype"]]) for name in make}
    rates = {name: [] for name in make}
    for examples in steps[1:]:  # in turn, so that both see the same machine
        for name, stepper in steppers.items():
            took = seconds(stepper, examples, best[name]["micro"], best[name]["threads"])
            rates[name].append(lengths[examples].sum() / took)
            print(f"{name}: {rates[name][-1]:.0f} tok/s", flush=True)
    ratios = [a / b for a, b in zip(rates["cria"], rates["transformers"], strict=True)]
    result = {
        "what": "SmolLM2-135M fine-tuning on CPU, real tokens a second, each at its best settings, steps in turn",
        "rows": Path(args.data).name, "batch": args.batch, "rounds": args.rounds, "max_length": args.max_length,
        "tokens_per_row": float(lengths.mean()),
        "best": {name: {k: probe[k] for k in ("dtype", "threads", "micro")} for name, probe in best.items()},
        "tokens_per_s": {name: statistics.median(rate) for name, rate in rates.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "probes": probes,
        "cpu": cpu_name(), "cores": cores, "torch": torch.__version__,
        "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    Path(args.json).write_text(json.dumps(result, indent=1, default=float) + "\n")
    print(json.dumps({k: result[k] for k in ("best", "tokens_per_s", "ratio")}, indent=1))


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
