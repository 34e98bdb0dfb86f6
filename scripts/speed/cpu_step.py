"""Fine-tuning SmolLM2-135M on a CPU: our step against the transformers loop, in one run, as a ratio.

    python -m scripts.speed.cpu_step --json benchmarks/cpu_speed.json

Our step is timed again with torch's operators in place of csrc's. A probe finds the best dtype, thread count and
micro-batch of each side. The loop is also timed at the micro-batch of Stanford's command, 4 rows, which are padded. Its
best size may be 1 row, which needs no padding. Then all take equal steps in turn. Rows are drawn so that prompts and
responses are as long as Alpaca's. Tokens are those of the rows: padding never counts, and sharing a prefix does not
reduce them.
"""

import itertools
import json
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import transformers

from data_gen.api.prompt import SEED_TASKS
from engine.data import dataset as data
from engine.data.packing import Packing, make_micro_batches
from engine.data.rows import read_rows
from engine.formats.find import find_embedded_gguf
from engine.formats.source import open_source
from engine.model.llama import new_model
from engine.text.tokenizer_files import load_tokenizer
from engine.training.optimizer import AdamW
from kernels.base.commands import run_command
from kernels.measure.alpaca import alpaca_lengths
from kernels.native.cpu import load_cpu
from scripts.base.results import (
    new_json_parser,
    read_cpu_name,
    summarize,
    summarize_ratios,
    today,
    write_json,
)
from scripts.base.rows import row_as_dict
from scripts.parity.curves import run_module
from scripts.parity.transformers_loop import TransformersLoop, encode_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LR = 1e-5
TORCH = "cria with torch's operators"
PADDED = 4  # rows: --per_device_train_batch_size of Stanford's command
SIZES = {"cria": (1024, 2048, 4096), "transformers": (1, 2, PADDED, 8)}  # tokens; rows


class Ours:
    """Steps with engine.finetune's parts. A micro-batch is a budget of tokens."""

    def __init__(self, source, dataset, dtype, impl, adapter=None):
        self.dataset = dataset
        self.model = new_model(source.config, "cpu", dtype, impl, accumulate=True, adapter=adapter)
        source.read_into(self.model)
        self.model.init_adapter(0)
        self.optimizer = AdamW(self.model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, impl=impl)

    def step(self, examples, micro):
        """Take one optimizer step."""
        scale = 1 / self.dataset.loss_tokens()[examples].sum()
        for batch in make_micro_batches(self.dataset.get_examples(examples), Packing(micro), scale=scale):
            self.model.loss(batch).backward()
        self.optimizer.step(LR, self.optimizer.grad_norm(), 1.0)
        self.optimizer.zero_grad()


class Theirs:
    """Steps of the transformers loop. A micro-batch is a number of rows."""

    def __init__(self, folder, examples, dtype):
        self.examples = examples
        self.loop = TransformersLoop(folder, lr=LR, total_steps=1000, dtype=dtype, fused=True)

    def step(self, examples, micro):
        """Take one optimizer step."""
        self.loop.step([self.examples[i] for i in examples], micro)


def time_step(stepper, examples, micro, threads):
    """Return the seconds of one step."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    stepper.step(examples, micro)
    return time.perf_counter() - began


def pick_like_alpaca(dataset, n, generator):
    """Return n different examples whose prompts and responses are as long as those of rows drawn from Alpaca."""
    alpaca = alpaca_lengths()
    responses = dataset.loss_tokens()
    prompts, picked = dataset.lengths() - responses, []
    for i in generator.integers(len(alpaca), size=n):
        off = np.abs(prompts - alpaca.prompt[i]) + np.abs(responses - alpaca.response[i])
        off[picked] = 1 << 30
        picked.append(int(off.argmin()))
    return np.array(picked)


def probe(make, sizes_of, lengths, examples, dtypes):
    """Return every setting's tokens a second as records, and the best record of each contender.

    sizes_of: the micro-batches of each contender that are tried.
    """
    cores, best, probes = torch.get_num_threads(), {}, []
    for name, dtype in itertools.product(sizes_of, dtypes):
        stepper, sizes = make[name](DTYPES[dtype]), sizes_of[name]
        time_step(stepper, examples, sizes[1], cores)  # warms up
        for threads, micro in itertools.product(sorted({1, cores}), sizes):
            if threads < cores and micro != sizes[1]:
                continue
            rate = float(lengths[examples].sum() / time_step(stepper, examples, micro, threads))
            probes.append({"who": name, "dtype": dtype, "threads": threads, "micro": micro, "tokens_per_s": rate})
            print(probes[-1], flush=True)
            if name not in best or rate > best[name]["tokens_per_s"]:
                best[name] = probes[-1]
    return probes, best


def measure_in_turns(make, settings, lengths, steps):
    """Return {contender: tokens a second of every step}. All take a step before any takes the next one."""
    steppers = {name: make[name](DTYPES[settings[name]["dtype"]]) for name in make}
    rates = {name: [] for name in settings}
    for examples in steps:
        for name, setting in settings.items():
            stepper = steppers[name.partition(",")[0]]
            seconds = time_step(stepper, examples, setting["micro"], setting["threads"])
            rates[name].append(float(lengths[examples].sum() / seconds))
            print(f"{name}: {rates[name][-1]:.0f} tok/s", flush=True)
    return rates


def parse_arguments() -> Namespace:
    parser = new_json_parser(__doc__)
    parser.add_argument("--data", default=str(SEED_TASKS), help="Alpaca JSON or JSONL (the embedded seed tasks)")
    parser.add_argument("--batch", type=int, default=32, help="examples a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="that are probed (all)")
    parser.add_argument("--max-length", type=int, default=512)
    return parser.parse_args()


def main():
    args = parse_arguments()
    gguf = find_embedded_gguf()
    source, tokenizer = open_source(gguf), load_tokenizer(gguf)
    rows, _ = read_rows([Path(args.data)])
    dataset = data.encode_rows(rows, tokenizer, max_length=args.max_length).select()
    lengths, cores = dataset.lengths(), torch.get_num_threads()
    generator = np.random.default_rng(0)
    pool = pick_like_alpaca(dataset, min(len(dataset) // 2, args.batch * (args.rounds + 1)), generator)
    steps = [generator.choice(pool, args.batch, replace=False) for _ in range(args.rounds + 1)]
    with tempfile.TemporaryDirectory() as tmp:
        folder = f"{tmp}/model"
        run_module("engine.export", "--model", "smollm2-135m", "--out", folder)
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        examples = encode_rows([row_as_dict(row) for row in rows], their_tokenizer, args.max_length)
        assert [len(ids) for ids, _ in examples] == lengths.tolist(), "both must train on equal tokens"
        make = {
            "cria": lambda dtype: Ours(source, dataset, dtype, "native"),
            TORCH: lambda dtype: Ours(source, dataset, dtype, "ref"),
            "transformers": lambda dtype: Theirs(folder, examples, dtype),
        }
        probes, best = probe(make, SIZES, lengths, steps[0][:16], args.dtypes)
        settings = {name: {k: best[name][k] for k in ("dtype", "threads", "micro")} for name in SIZES}
        settings[TORCH] = settings["cria"]
        settings["transformers, padded"] = settings["transformers"] | {"micro": PADDED}
        rates = measure_in_turns(make, settings, lengths, steps[1:])
    result = {
        "what": "SmolLM2-135M fine-tuning on CPU, real tokens a second, steps in turn",
        "rows": Path(args.data).name, "batch": args.batch, "rounds": args.rounds, "max_length": args.max_length,
        "tokens_per_row": float(lengths[pool].mean()), "settings": settings,
        "tokens_per_s": {name: summarize(rate)["median"] for name, rate in rates.items()},
        "ratio": {name: summarize_ratios(rates["cria"], rates[name]) for name in settings if name != "cria"},
        "probes": probes, "instruction_set": load_cpu().cria_instruction_set().decode(),
        "cpu": read_cpu_name(), "cores": cores, "torch": torch.__version__,
        "transformers": transformers.__version__, "date": today(),
    }  # fmt: skip
    write_json(args.json, result)
    print(json.dumps({k: result[k] for k in ("settings", "tokens_per_s", "ratio")}, indent=1, default=float))


if __name__ == "__main__":
    run_command(main)
