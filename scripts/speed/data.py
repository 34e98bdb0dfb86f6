"""The time that data takes before and between the steps: tokenised once, mapped after that, packed a step at a time.

    python -m scripts.speed.data --json benchmarks/data_speed.json
    python -m scripts.speed.data --rows alpaca.json --tokenizer FOLDER --json benchmarks/data_speed.json

The project does not hold Alpaca itself, so the rows are repeated to 52,002, each copy with other sentences. Such rows
have the lengths of the rows they are made from. Packing is also measured on rows of random tokens that have the lengths
and templates of Alpaca (kernels/measure/alpaca_lengths.json).
"""

import json
import os
import random
import re
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from data_gen.api.prompt import SEED_TASKS
from engine.data import dataset as data
from engine.data.batches import Order, count_steps_per_epoch
from engine.data.packing import Packing, make_micro_batches
from engine.data.rows import read_rows
from engine.formats.find import find_embedded_gguf
from engine.text.tokenizer_files import load_tokenizer
from engine.training.config import FinetuneConfig
from engine.training.datasets import read_tables
from kernels.base.commands import run_command
from kernels.measure.alpaca import ALPACA_ROWS, alpaca_lengths
from scripts.base.results import describe_cpu, new_json_parser, summarize, today, write_json
from scripts.base.rows import random_alpaca_rows, row_as_dict

BATCH, MAX_LENGTH, VOCAB_SIZE = 128, 512, 32_000  # Alpaca's recipe, LLaMA's tokenizer
ALIGN = 64  # tokens, as on a GPU
BUDGETS = (4096, 8320, 16384)
SENTENCE = re.compile(r"\S.*?(?:[.!?\n]+\s*|$)", re.DOTALL)


def recombine_rows(rows, n):
    """Return n rows as dictionaries: the rows themselves, then copies with a number in the question and half of the
    answer's sentences from other rows. Equal rows give equal results."""
    generator = random.Random(0)
    plain = [row_as_dict(row) for row in rows]
    sentences = [SENTENCE.findall(row["output"]) for row in plain]
    pool = [sentence for row in sentences for sentence in row]
    made = plain[:n]
    for i in range(len(made), n):
        row, mixed = plain[i % len(plain)], list(sentences[i % len(plain)])
        for at in generator.sample(range(len(mixed)), (len(mixed) + 1) // 2):
            mixed[at] = generator.choice(pool)
        made.append(row | {"instruction": f"{row['instruction']} ({i})", "output": "".join(mixed)})
    return made


def random_rows_like_alpaca(n):
    """Return a dataset of random tokens with n lengths drawn from Alpaca's. Rows that keep no response are left out."""
    alpaca, generator = alpaca_lengths(), np.random.default_rng(0)
    stems = [generator.integers(3, VOCAB_SIZE, length) for length in alpaca.shared_prefix]
    drawn = generator.integers(len(alpaca), size=n)
    return random_alpaca_rows(drawn[alpaca.prompt[drawn] < MAX_LENGTH], VOCAB_SIZE, MAX_LENGTH, generator, stems)


def time_call(function, *args):
    """Return the result, wall seconds, and the CPU seconds of all threads, which other programs cannot stretch."""
    began, spent = time.perf_counter(), time.process_time()
    result = function(*args)
    return result, time.perf_counter() - began, time.process_time() - spent


def summarize_times(times):
    """Return the median and extremes of [(seconds, CPU seconds)], and the median CPU seconds."""
    seconds, cpu = zip(*times, strict=True)
    return summarize(seconds) | {"cpu_median": summarize(cpu)["median"]}


def ignore_message(_):
    """Print nothing: messages about the data are no part of the measurement."""


def pack_epoch(dataset, max_tokens):
    """Pack one epoch and return its seconds, its computed tokens and its padding."""
    n_steps = count_steps_per_epoch(len(dataset), BATCH)
    times, computed, real, counts = [], 0, 0, []
    for step in range(1, n_steps + 1):
        examples = Order(len(dataset), BATCH, seed=42).examples_of(step)
        batches, *took = time_call(
            partial(make_micro_batches, dataset.get_examples(examples), Packing(max_tokens, multiple=ALIGN))
        )
        times.append(took)
        counts.append(len(batches))
        computed += sum(len(batch.tokens) for batch in batches)
        real += sum(int((batch.documents[:, 1] - batch.documents[:, 0]).sum()) for batch in batches)
    seconds, cpu = (sum(column) for column in zip(*times, strict=True))
    n_tokens = int(dataset.lengths().sum())
    return {
        "max_tokens": max_tokens, "steps": n_steps, "seconds": seconds, "cpu_seconds": cpu,
        "step_s": summarize_times(times), "rows_per_s": len(dataset) / seconds, "tokens": n_tokens,
        "computed_tokens": computed, "computed_over_logical": computed / n_tokens, "padding": 1 - real / computed,
        "micro_batches_a_step": sum(counts) / n_steps,
    }  # fmt: skip


def measure_starts(file, tokenizer, repeats):
    """Read the data as a run does, first with an empty token cache and then with a full one. Return the dataset and
    figures."""
    with tempfile.TemporaryDirectory() as cache:
        config = FinetuneConfig(
            model="tiny", random_init=True, data=(str(file),), max_length=MAX_LENGTH, token_cache=f"{cache}/tokens"
        )
        firsts, seconds = [], []
        for _ in range(min(3, repeats)):
            shutil.rmtree(config.token_cache, ignore_errors=True)
            ([(table, *_)], cached), *took = time_call(read_tables, config, tokenizer, ignore_message)
            assert not cached
            firsts.append(took)
        (rows, _), *reading = time_call(read_rows, [file])
        _, *encoding = time_call(data.encode_rows, rows, tokenizer, "alpaca", MAX_LENGTH)
        for _ in range(repeats):
            ([(table, *_)], cached), *took = time_call(read_tables, config, tokenizer, ignore_message)
            assert cached
            seconds.append(took)
        size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        dataset, *selecting = time_call(table.select)
        _, *hashing = time_call(dataset.sha256)
    first, second = summarize_times(firsts), summarize_times(seconds)
    parts = {"read": reading, "tokenise": encoding, "select": selecting, "sha256 of the tokens": hashing}
    return dataset, {
        "rows": len(table), "file_bytes": file.stat().st_size, "tokens": dataset.counts["tokens"],
        "tokens_a_row": dataset.counts["tokens"] / len(table),
        "first_start_s": first, "first_start_rows_per_s": len(table) / first["median"],
        "cached_start_s": second, "cached_start_rows_per_s": len(table) / second["median"],
        "parts_s": {name: summarize_times([took]) for name, took in parts.items()}, "entry_bytes": size,
    }  # fmt: skip


def parse_arguments():
    parser = new_json_parser(__doc__)
    parser.add_argument("--rows", default=str(SEED_TASKS), help="Alpaca JSON or JSONL (the embedded seed tasks)")
    parser.add_argument("--tokenizer", default="", help="folder, .gguf or SentencePiece .model (SmolLM2's)")
    parser.add_argument("--n", type=int, default=ALPACA_ROWS, help="rows that they are repeated to")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    for name in filter(None, (args.rows, args.tokenizer)):
        if not Path(name).exists():
            parser.error(f"{name} is not there; leave --rows and --tokenizer out for what comes with the project")
    return args


def main():
    args = parse_arguments()
    load = os.getloadavg()[0]  # before this program adds to it: other programs take their share of the cores
    with tempfile.TemporaryDirectory() as tmp:
        file, source = Path(tmp, "rows.json"), Path(args.tokenizer) if args.tokenizer else find_embedded_gguf()
        if source.suffix == ".model":
            shutil.copy(source, Path(tmp, "tokenizer.model"))
            tokenizer = load_tokenizer(Path(tmp))
        else:
            tokenizer = load_tokenizer(source)
        rows, _ = read_rows([Path(args.rows)])
        file.write_text(json.dumps(recombine_rows(rows, args.n), indent=4))
        dataset, start = measure_starts(file, tokenizer, args.repeats)
        print(json.dumps(start, indent=1), flush=True)
        epoch = pack_epoch(dataset, 8320)
        print(json.dumps(epoch, indent=1), flush=True)
    alpaca = random_rows_like_alpaca(args.n)
    mixes = [pack_epoch(alpaca, budget) for budget in BUDGETS]
    result = {
        "what": f"{args.n} rows tokenised at {MAX_LENGTH}, cached, packed {BATCH} a step with shared prefixes, to "
        f"multiples of {ALIGN} tokens",
        "source": {"rows": Path(args.rows).name, "rows_in_it": len(rows), "tokenizer": source.name},
        "start": start, "epoch": epoch,
        "alpaca_lengths": {"tokens_a_row": float(alpaca.lengths().mean()), "epochs": mixes},
        **describe_cpu(), "load_average": load, "repeats": args.repeats, "sentencepiece": sentencepiece.__version__,
        "tokenizers": tokenizers.__version__, "numpy": np.__version__, "date": today(),
    }  # fmt: skip
    write_json(args.json, result)
    print(json.dumps(mixes, indent=1))


if __name__ == "__main__":
    run_command(main)
