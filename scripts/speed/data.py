"""How long data takes before and between the steps: tokenised once, mapped after that, packed a step at a time.

    python -m scripts.speed.data --json benchmarks/data_speed.json
    python -m scripts.speed.data --rows alpaca.json --tokenizer FOLDER --json benchmarks/data_speed.json

The rows are repeated to 52,002, each copy with other sentences, since Alpaca itself is not at hand. Such rows have the
lengths of those that they are made of; what Alpaca's own lengths make of packing is measured on rows of random tokens
that have the lengths and templates of kernels/measure/alpaca_lengths.json.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from engine.data import dataset as data
from engine.data import packing
from engine.data.rows import read_rows
from engine.formats.find import embedded_gguf
from engine.model.config import FinetuneConfig
from engine.text.tokenizer import load_tokenizer
from engine.training.prepare import SEED_TASKS, read_tables
from kernels.measure.alpaca import alpaca_lengths
from scripts.speed.cpu_step import cpu_name

ROOT = Path(__file__).parents[2]
N_ROWS, BATCH, MAX_LENGTH, ALIGN = 52_002, 128, 512, 64  # Alpaca's rows and recipe; ALIGN as on a GPU
BUDGETS = (4096, 8320, 16384)
SENTENCE = re.compile(r"\S.*?(?:[.!?\n]+\s*|$)", re.DOTALL)


def recombined(rows, n):
    """n rows as dictionaries: the rows themselves, then copies with half of their output's sentences from others and a
    number in their question. The same for the same rows."""
    generator = random.Random(0)
    plain = [{name: value for name, value in asdict(row).items() if name in ("instruction", "input", "output")}
             for row in rows]  # fmt: skip
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
    """Return a dataset of random tokens with Alpaca's lengths and its two templates' common prefixes."""
    alpaca, generator = alpaca_lengths(), np.random.default_rng(0)
    stems = [generator.integers(3, 32000, length) for length in alpaca.shared_prefix]
    drawn = generator.integers(len(alpaca), size=n)
    prompt, response = alpaca.prompt[drawn], alpaca.response[drawn]
    ends = np.cumsum(np.minimum(prompt + response, MAX_LENGTH))
    begins = np.concatenate(([0], ends[:-1]))
    tokens = generator.integers(3, 32000, ends[-1], dtype=np.int32)
    is_target = np.zeros(len(tokens), bool)
    for begin, end, n_prompt, row in zip(begins, ends, prompt, drawn, strict=True):
        stem = stems[alpaca.has_input[row]]
        tokens[begin : begin + len(stem)] = stem
        is_target[begin + n_prompt : end] = True
    has_loss = [bool(is_target[a:b].any()) for a, b in zip(begins, ends, strict=True)]
    begins, ends = begins[has_loss], ends[has_loss]
    return data.Dataset(tokens, is_target, begins, ends, ("",) * len(begins), {})


def timed(function, *args):
    """The result, the seconds that passed, and the CPU seconds of all threads, which other programs cannot stretch."""
    began, spent = time.perf_counter(), time.process_time()
    result = function(*args)
    return result, time.perf_counter() - began, time.process_time() - spent


def summary(times):
    """Of (seconds, CPU seconds) of each repeat."""
    seconds, cpu = zip(*times, strict=True)
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds),
            "cpu_median": statistics.median(cpu)}  # fmt: skip


def quiet(_):
    """What a run says of its data is not measured."""


def packed(dataset, max_tokens):
    """One epoch packed: seconds, and what it is that is computed."""
    n_steps = data.steps_per_epoch(len(dataset), BATCH)
    lengths, times, computed, real, counts = dataset.lengths(), [], 0, 0, []
    for step in range(1, n_steps + 1):
        examples = data.examples_of_step(step, len(dataset), BATCH, seed=42, shuffle=True)
        batches, *took = timed(partial(packing.micro_batches, dataset, examples, max_tokens, align=ALIGN))
        times.append(took)
        counts.append(len(batches))
        computed += sum(len(batch.tokens) for batch in batches)
        real += sum(int((batch.documents[:, 1] - batch.documents[:, 0]).sum()) for batch in batches)
    seconds, cpu = (sum(column) for column in zip(*times, strict=True))
    return {
        "max_tokens": max_tokens,
        "steps": n_steps,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "step_s": summary(times),
        "rows_per_s": len(dataset) / seconds,
        "tokens": int(lengths.sum()),
        "computed_tokens": computed,
        "computed_over_logical": computed / int(lengths.sum()),
        "padding": 1 - real / computed,
        "micro_batches_a_step": sum(counts) / n_steps,
    }


def starts(file, tokenizer, repeats):
    """What a run does with --data: first with an empty cache, then with a full one. Returns the dataset and figures."""
    with tempfile.TemporaryDirectory() as cache:
        config = FinetuneConfig(
            model="tiny", random_init=True, data=(str(file),), max_length=MAX_LENGTH, token_cache=f"{cache}/tokens"
        )
        firsts, seconds = [], []
        for _ in range(min(3, repeats)):
            shutil.rmtree(config.token_cache, ignore_errors=True)
            ((table, _), cached), *took = timed(read_tables, config, tokenizer, quiet)
            assert not cached
            firsts.append(took)
        (rows, _), *reading = timed(read_rows, [file])
        _, *encoding = timed(data.encode, rows, tokenizer, "alpaca", MAX_LENGTH)
        for _ in range(repeats):
            ((table, _), cached), *took = timed(read_tables, config, tokenizer, quiet)
            assert cached
            seconds.append(took)
        size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        dataset, *selecting = timed(table.select)
        _, *hashing = timed(dataset.sha256)
    first, second = summary(firsts), summary(seconds)
    return dataset, {
        "rows": len(table),
        "file_bytes": file.stat().st_size,
        "tokens": dataset.counts["tokens"],
        "tokens_a_row": dataset.counts["tokens"] / len(table),
        "first_start_s": first,
        "first_start_rows_per_s": len(table) / first["median"],
        "cached_start_s": second,
        "cached_start_rows_per_s": len(table) / second["median"],
        "parts_s": {
            "read": summary([reading]),
            "tokenise": summary([encoding]),
            "select": summary([selecting]),
            "sha256 of the tokens": summary([hashing]),
        },
        "entry_bytes": size,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=str(SEED_TASKS), help="Alpaca JSON or JSONL (the embedded seed tasks)")
    parser.add_argument("--tokenizer", default="", help="folder, .gguf or SentencePiece .model (SmolLM2's)")
    parser.add_argument("--n", type=int, default=N_ROWS, help="rows that they are repeated to")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", required=True, help="where the figures go")
    args = parser.parse_args()
    for name in filter(None, (args.rows, args.tokenizer)):
        if not Path(name).exists():
            parser.error(f"{name} is not there; leave --rows and --tokenizer out for what comes with the project")

    load = os.getloadavg()[0]  # before this program adds to it: other programs take their share of the cores
    with tempfile.TemporaryDirectory() as tmp:
        file, source = Path(tmp, "rows.json"), Path(args.tokenizer) if args.tokenizer else embedded_gguf()
        if source.suffix == ".model":
            shutil.copy(source, Path(tmp, "tokenizer.model"))
            tokenizer = load_tokenizer(Path(tmp))
        else:
            tokenizer = load_tokenizer(source)
        rows, _ = read_rows([Path(args.rows)])
        file.write_text(json.dumps(recombined(rows, args.n), indent=4))
        dataset, found = starts(file, tokenizer, args.repeats)
        print(json.dumps(found, indent=1), flush=True)
        epoch = packed(dataset, 8320)
        print(json.dumps(epoch, indent=1), flush=True)
    alpaca = random_rows_like_alpaca(args.n)
    mixes = [packed(alpaca, budget) for budget in BUDGETS]
    result = {
        "what": f"{args.n} rows tokenised at {MAX_LENGTH}, cached, packed {BATCH} a step with shared prefixes, to "
        f"multiples of {ALIGN} tokens",
        "source": {"rows": Path(args.rows).name, "rows_in_it": len(rows), "tokenizer": source.name},
        "start": found,
        "epoch": epoch,
        "alpaca_lengths": {"tokens_a_row": float(alpaca.lengths().mean()), "epochs": mixes},
        "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "load_average": load, "repeats": args.repeats,
        "sentencepiece": sentencepiece.__version__, "tokenizers": tokenizers.__version__, "numpy": np.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(mixes, indent=1))


if __name__ == "__main__":
    main()
