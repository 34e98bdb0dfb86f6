"""LoRA of SmolLM2-135M on a CPU: our step against our own step of all weights and against PEFT's, in one run.

    python -m scripts.speed.cpu_adapter --json benchmarks/cpu_adapter.json

It needs peft and transformers. As in scripts.speed.cpu_step, a probe finds the best dtype, thread count and micro-batch
of each side, then all take equal steps in turn, on rows as long as Alpaca's; padding never counts. Updates have rank 16
and are of every linear map. PEFT's are in the dtype of the weights: in fp32 beside weights in bf16, its default, they
would be cast in every step. Each side then takes steps in a process of its own, which tells the peak of its memory.
"""

import importlib.metadata
import json
import multiprocessing
import tempfile
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers

from data_gen.api.prompt import SEED_TASKS
from engine.data import dataset as data
from engine.data.rows import read_rows
from engine.formats.find import find_embedded_gguf
from engine.formats.source import open_source
from engine.model.adapter import ALL_LINEAR, AdapterConfig
from engine.text.tokenizer_files import load_tokenizer
from kernels.base.commands import run_command
from kernels.native.cpu import load_cpu
from scripts.base.results import describe_cpu, new_json_parser, summarize, summarize_ratios, today, write_json
from scripts.base.rows import row_as_dict
from scripts.parity.curves import run_module
from scripts.parity.transformers_loop import TransformersLoop, encode_rows
from scripts.speed.cpu_step import DTYPES, SIZES, Ours, measure_in_turns, pick_like_alpaca, probe

WHOLE, LORA, PEFT = "all weights", "lora", "peft"
SIZES_OF = {WHOLE: SIZES["cria"], LORA: SIZES["cria"], PEFT: SIZES["transformers"]}  # tokens; rows
ADAPTER = AdapterConfig(r=16, alpha=32.0)


class Peft:
    """Steps of a LoRA by peft and transformers. A micro-batch is a number of rows."""

    def __init__(self, folder, examples, dtype):
        import peft  # not among the tests' packages

        self.examples = examples
        config = peft.LoraConfig(r=ADAPTER.r, lora_alpha=ADAPTER.alpha, target_modules=list(ALL_LINEAR))

        def load(folder, dtype):
            base = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
            return peft.get_peft_model(base, config, autocast_adapter_dtype=False)

        self.loop = TransformersLoop(folder, lr=1e-4, total_steps=1000, dtype=dtype, fused=True, load=load)

    def step(self, examples, micro):
        """Take one optimizer step."""
        self.loop.step([self.examples[i] for i in examples], micro)


@dataclass
class Contest:
    """The rows that all train on, the folder of the exported model, and how a contender is made."""

    data: str
    max_length: int
    folder: str

    @cached_property
    def rows(self):
        return read_rows([Path(self.data)])[0]

    @cached_property
    def dataset(self):
        tokenizer = load_tokenizer(find_embedded_gguf())
        return data.encode_rows(self.rows, tokenizer, max_length=self.max_length).select()

    def make(self, name, dtype):
        """Return the contender with this name, ready to step."""
        if name == PEFT:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
            examples = encode_rows([row_as_dict(row) for row in self.rows], tokenizer, self.max_length)
            assert [len(ids) for ids, _ in examples] == self.dataset.lengths().tolist(), "both train on equal tokens"
            return Peft(self.folder, examples, dtype)
        source = open_source(find_embedded_gguf())
        return Ours(source, self.dataset, dtype, "auto", ADAPTER if name == LORA else None)


def read_peak():
    """Return the most bytes of memory that this process has held. Its ru_maxrss would begin at its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def measure_peak(contest, name, setting, steps):
    """Return the bytes that steps of a contender add to the peak of this process, in which nothing else has run."""
    torch.set_num_threads(setting["threads"])
    _, before = contest.dataset, read_peak()
    stepper = contest.make(name, DTYPES[setting["dtype"]])
    for examples in steps:
        stepper.step(examples, setting["micro"])
    return read_peak() - before


def measure_peaks(contest, settings, steps):
    """Return {contender: the bytes of measure_peak()}, each in a process of its own."""
    peaks = {}
    for name, setting in settings.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[name] = pool.submit(measure_peak, contest, name, setting, steps).result()
        print(f"{name}: peak {peaks[name] / 1e9:.2f} GB", flush=True)
    return peaks


def parse_arguments() -> Namespace:
    parser = new_json_parser(str(__doc__))
    parser.add_argument("--data", default=str(SEED_TASKS), help="Alpaca JSON or JSONL (the embedded seed tasks)")
    parser.add_argument("--batch", type=int, default=32, help="examples a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="that are probed (all)")
    parser.add_argument("--max-length", type=int, default=512)
    return parser.parse_args()


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        run_module("engine.export", "--model", "smollm2-135m", "--out", f"{folder}/model")
        contest = Contest(args.data, args.max_length, f"{folder}/model")
        lengths, generator = contest.dataset.lengths(), np.random.default_rng(0)
        n = min(len(contest.dataset) // 2, args.batch * (args.rounds + 1))
        pool = pick_like_alpaca(contest.dataset, n, generator)
        steps = [generator.choice(pool, args.batch, replace=False) for _ in range(args.rounds + 1)]
        make = {name: lambda dtype, name=name: contest.make(name, dtype) for name in SIZES_OF}
        probes, best = probe(make, SIZES_OF, lengths, steps[0][:16], args.dtypes)
        settings = {name: {k: best[name][k] for k in ("dtype", "threads", "micro")} for name in SIZES_OF}
        rates = measure_in_turns(make, settings, lengths, steps[1:])
        peaks = measure_peaks(contest, settings, steps[:2])
    result = describe_cpu() | {
        "what": "LoRA of SmolLM2-135M on CPU, real tokens a second, steps in turn",
        "rows": Path(args.data).name, "batch": args.batch, "rounds": args.rounds, "max_length": args.max_length,
        "rank": ADAPTER.r, "tokens_per_row": float(lengths[pool].mean()), "settings": settings,
        "tokens_per_s": {name: summarize(rate)["median"] for name, rate in rates.items()},
        "ratio": {name: summarize_ratios(rates[LORA], rates[name]) for name in (WHOLE, PEFT)},
        "peak_bytes": peaks, "probes": probes, "instruction_set": load_cpu().cria_instruction_set().decode(),
        "transformers": transformers.__version__, "peft": importlib.metadata.version("peft"), "date": today(),
    }  # fmt: skip
    write_json(args.json, result)
    print(json.dumps({k: result[k] for k in ("settings", "tokens_per_s", "ratio", "peak_bytes")}, indent=1))


if __name__ == "__main__":
    run_command(main)
