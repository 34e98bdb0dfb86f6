"""Exact de-duplication of a stream as long as Alpaca's: data_gen.dedup, and beside it all pairs by rapidfuzz.

    OMP_NUM_THREADS=1 python -m scripts.speed.dedup --json benchmarks/dedup.json
    OMP_NUM_THREADS=1 python -m scripts.speed.dedup --rows alpaca.json --json benchmarks/dedup.json

The two take turns in one run. They must make equal decisions: which texts are dropped, and which kept text is each
one's duplicate. The project does not hold as many instructions as Alpaca, so the stream is made from those of --rows:
whole ones, and the beginning of one with the end of another, with a share of their words replaced by words that occur
as often in --rows. Seconds are CPU seconds of one thread. For all pairs they count only the calls of cdist, without
tokenising and choosing.
"""

import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import rapidfuzz
from rapidfuzz import process
from rapidfuzz.distance import Indel

from data_gen.api.prompt import SEED_TASKS
from data_gen.base.cli import run_for_reader
from data_gen.base.files import read_rows
from data_gen.rows.rouge import Deduplicator, TokenNumbers
from data_gen.rows.tokens import tokenize
from scripts.base.results import describe_cpu, new_json_parser, summarize, summarize_ratios, today, write_json

BLOCK = 512  # texts of one cdist call: 100 MB of scores
MAX_REPLACED = 0.9  # the largest share of a text's words that is replaced
PART = re.compile(r"\w+|\W+")


def make_stream(rows, n, seed):
    """Return n texts made from the rows' instructions. Equal rows and seed give equal texts, and a shorter stream is
    the beginning of a longer one."""
    generator = random.Random(seed)
    instructions = [PART.findall(row["instruction"]) for row in rows]
    words = [word for row in rows for name in ("instruction", "input", "output")
             for word in re.findall(r"\w+", row.get(name, ""))]  # fmt: skip
    texts = []
    for _ in range(n):
        first, second = generator.choice(instructions), generator.choice(instructions)
        parts = first
        if generator.random() < 0.5:
            parts = first[: generator.randint(0, len(first))] + second[generator.randint(0, len(second)) :]
        rate = generator.uniform(0, MAX_REPLACED)
        texts.append("".join(
            generator.choice(words) if part[0].isalnum() and generator.random() < rate else part for part in parts
        ))  # fmt: skip
    return texts


def compare_all_pairs(texts):
    """Return Deduplicator.add's answer for each text, found from the scores of all pairs, and cdist's CPU seconds."""
    numbers, seconds = TokenNumbers(), 0.0
    codes = ["".join(chr(numbers[token]) for token in tokenize(text)) for text in texts]
    kept, answers = [], []

    def find_duplicates(queries, choices):
        """Return for each query the (F, index) of the choices with F >= 0.7, as fractions."""
        nonlocal seconds
        began = time.process_time()
        scores = process.cdist(
            queries, choices, scorer=Indel.normalized_similarity, score_cutoff=0.7 - 1e-6, dtype=np.float32, workers=1
        )
        seconds += time.process_time() - began
        found = [[] for _ in queries]
        for i, j in np.argwhere(scores).tolist():
            total = len(queries[i]) + len(choices[j])
            f = Fraction(round(float(scores[i, j]) * total), total) if total else Fraction(1)
            if f >= Fraction(7, 10):
                found[i].append((f, j))
        return found

    for start in range(0, len(codes), BLOCK):
        block, before = codes[start : start + BLOCK], len(kept)
        earlier = find_duplicates(block, kept) if kept else [[] for _ in block]
        index_of = {}  # place in the block -> index among the kept texts
        for i, within in enumerate(find_duplicates(block, block)):
            found = earlier[i] + [(f, index_of[j]) for f, j in within if j in index_of]
            if found:
                answers.append(min(found, key=lambda pair: (-pair[0], pair[1]))[1])
            else:
                index_of[i] = before + len(index_of)
                answers.append(None)
        kept += [block[i] for i in index_of]
    return answers, seconds


def deduplicate(texts):
    """Return Deduplicator.add's answer for each text."""
    deduplicator = Deduplicator()
    return [deduplicator.add(text) for text in texts]


def read_memory_bytes(name):
    """Return this process's memory in bytes: VmRSS is the present, VmHWM the peak so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure_stream(texts):
    """Return how many texts are kept, CPU and wall seconds, and the memory in bytes before and at the peak."""
    before, wall, cpu = read_memory_bytes("VmRSS"), time.perf_counter(), time.process_time()
    answers = deduplicate(texts)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"kept": answers.count(None), "cpu_s": cpu, "wall_s": wall, "peak_bytes": read_memory_bytes("VmHWM"),
            "bytes_before": before}  # fmt: skip


def measure_in_new_process(texts):
    """Return measure_stream's figures from a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_stream, (texts,))


def measure_in_turns(texts, rounds):
    """Run the Deduplicator and cdist one after the other, so that other load on the machine falls on both."""
    ours, theirs, walls = [], [], []
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        answers = deduplicate(texts)
        ours.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - wall)
        expected, seconds = compare_all_pairs(texts)
        theirs.append(seconds)
        assert answers == expected, "the index and all pairs decide otherwise"
        print(f"{ours[-1]:.2f} s, all pairs {theirs[-1]:.2f} s", flush=True)
    return {
        "texts": len(texts), "kept": answers.count(None), "same_decisions": True, "cpu_s": summarize(ours),
        "wall_s": summarize(walls), "cdist_cpu_s": summarize(theirs), "ratio": summarize_ratios(theirs, ours),
    }  # fmt: skip


def parse_arguments():
    parser = new_json_parser(__doc__)
    parser.add_argument("--rows", default=str(SEED_TASKS), help="Alpaca JSON or JSONL (the embedded seed tasks)")
    parser.add_argument("--n", type=int, default=60_000, help="texts of the stream that all pairs are compared of")
    parser.add_argument("--n-long", type=int, default=63_000, help="texts of the stream of about 52,000 kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: seconds are of one thread")
    return parser.parse_args()


def main():
    args = parse_arguments()
    load = os.getloadavg()[0]  # before this program adds to it
    rows = read_rows(args.rows)
    texts = make_stream(rows, max(args.n, args.n_long), args.seed)
    runs = [measure_in_new_process(texts[: args.n_long]) for _ in range(args.rounds)]
    lengths = [len(tokenize(text)) for text in texts]
    result = {
        "what": "exact ROUGE-L de-duplication of a stream, F >= 0.7; seconds of CPU on one thread; cdist: rapidfuzz's "
        "Indel.normalized_similarity of all pairs, its calls alone",
        "source": {"rows": Path(args.rows).name, "rows_in_it": len(rows), "words_replaced_at_most": MAX_REPLACED,
                   "seed": args.seed, "tokens_a_text": statistics.mean(lengths), "longest": max(lengths)},
        "stream": {
            "texts": args.n_long, "kept": runs[0]["kept"],
            **{name: summarize(run[name] for run in runs)
               for name in ("cpu_s", "wall_s", "peak_bytes", "bytes_before")},
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1), flush=True)
    result["all_pairs"] = measure_in_turns(texts[: args.n], args.rounds)
    result |= {
        **describe_cpu(), "load_average": load, "rounds": args.rounds, "rapidfuzz": rapidfuzz.__version__,
        "numpy": np.__version__, "python": platform.python_version(), "date": today(),
    }  # fmt: skip
    write_json(args.json, result)
    print(json.dumps(result["all_pairs"], indent=1))


if __name__ == "__main__":
    sys.exit(run_for_reader(main))
