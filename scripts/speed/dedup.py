"""Exact de-duplication of a stream as long as Alpaca's: data_gen.dedup, and beside it all pairs by rapidfuzz.

    OMP_NUM_THREADS=1 python -m scripts.speed.dedup --json benchmarks/dedup.json
    OMP_NUM_THREADS=1 python -m scripts.speed.dedup --rows alpaca.json --json benchmarks/dedup.json

The two take turns in one run and must make the same decisions: which texts are dropped, and for which kept one each.
Instructions as many as Alpaca's are not at hand, so the stream is made of those of --rows: whole ones, and beginnings
of one with ends of another, a share of their words replaced by words as frequent in --rows as they are. Seconds are of
CPU, one thread; those of all pairs are of its calls of cdist alone, without tokenising and choosing.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import rapidfuzz
from rapidfuzz import process
from rapidfuzz.distance import Indel

from data_gen.base.cli import read_rows
from data_gen.dedup import Deduplicator, Numbers, tokenize

SEED_TASKS = Path(__file__).parents[2] / "data_gen" / "seed_tasks.jsonl"
BLOCK = 512  # texts a call of cdist: 100 MB of scores
RATE = 0.9  # up to this share of a text's words is replaced
PART = re.compile(r"\w+|\W+")


def stream_of(rows, n, seed):
    """n texts made of the rows' instructions; the same for the same rows and seed, and shorter ones begin alike."""
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
        rate = generator.uniform(0, RATE)
        texts.append("".join(
            generator.choice(words) if part[0].isalnum() and generator.random() < rate else part for part in parts
        ))  # fmt: skip
    return texts


def all_pairs(texts):
    """What Deduplicator.add returns for each text, from the scores of all pairs, and the CPU seconds of cdist."""
    numbers, seconds = Numbers(), 0.0
    codes = ["".join(chr(numbers[token]) for token in tokenize(text)) for text in texts]
    kept, answers = [], []

    def duplicates(queries, choices):
        """Of each query the (F, place) of the choices with F >= 0.7, as fractions."""
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
        earlier = duplicates(block, kept) if kept else [[] for _ in block]
        index_of = {}  # place in the block -> index, where it is kept
        for i, within in enumerate(duplicates(block, block)):
            found = earlier[i] + [(f, index_of[j]) for f, j in within if j in index_of]
            if found:
                answers.append(min(found, key=lambda pair: (-pair[0], pair[1]))[1])
            else:
                index_of[i] = before + len(index_of)
                answers.append(None)
        kept += [block[i] for i in index_of]
    return answers, seconds


def added(texts):
    deduplicator = Deduplicator()
    return [deduplicator.add(text) for text in texts]


def memory(name):
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured(texts):
    """In a process of its own: kept, CPU seconds, seconds, and bytes at the peak and before."""
    before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    answers = added(texts)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"kept": answers.count(None), "cpu_s": cpu, "wall_s": wall, "peak_bytes": memory("VmHWM"),
            "bytes_before": before}  # fmt: skip


def alone(texts):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (texts,))


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def turns(texts, rounds):
    """Deduplicator and cdist one after the other, so that what else the machine does falls on both."""
    ours, theirs, walls = [], [], []
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        answers = added(texts)
        ours.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - wall)
        expected, seconds = all_pairs(texts)
        theirs.append(seconds)
        assert answers == expected, "the index and all pairs decide otherwise"
        print(f"{ours[-1]:.2f} s, all pairs {theirs[-1]:.2f} s", flush=True)
    return {
        "texts": len(texts),
        "kept": answers.count(None),
        "same_decisions": True,
        "cpu_s": spread(ours),
        "wall_s": spread(walls),
        "cdist_cpu_s": spread(theirs),
        "ratio": spread([b / a for a, b in zip(ours, theirs, strict=True)]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=str(SEED_TASKS), help="Alpaca JSON or JSONL (the embedded seed tasks)")
    parser.add_argument("--n", type=int, default=60_000, help="texts of the stream that all pairs are compared of")
    parser.add_argument("--n-long", type=int, default=63_000, help="texts of the stream of about 52,000 kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", required=True, help="where the figures go")
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: seconds are of one thread")

    load = os.getloadavg()[0]  # before this program adds to it
    rows = read_rows(args.rows)
    texts = stream_of(rows, max(args.n, args.n_long), args.seed)
    runs = [alone(texts[: args.n_long]) for _ in range(args.rounds)]
    lengths = [len(tokenize(text)) for text in texts]
    result = {
        "what": "exact ROUGE-L de-duplication of a stream, F >= 0.7; seconds of CPU on one thread; cdist: rapidfuzz's "
        "Indel.normalized_similarity of all pairs, its calls alone",
        "source": {"rows": Path(args.rows).name, "rows_in_it": len(rows), "words_replaced_at_most": RATE,
                   "seed": args.seed, "tokens_a_text": statistics.mean(lengths), "longest": max(lengths)},
        "stream": {
            "texts": args.n_long,
            "kept": runs[0]["kept"],
            **{name: spread([run[name] for run in runs]) for name in ("cpu_s", "wall_s", "peak_bytes")},
            "bytes_before": spread([run["bytes_before"] for run in runs]),
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1), flush=True)
    result["all_pairs"] = turns(texts[: args.n], args.rounds)

    from scripts.speed.cpu_step import cpu_name  # last: it brings torch, whose memory is not what is measured

    result |= {
        "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "load_average": load, "rounds": args.rounds,
        "rapidfuzz": rapidfuzz.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["all_pairs"], indent=1))


if __name__ == "__main__":
    main()
