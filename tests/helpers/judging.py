"""Answer files of two or three models, judges that a fake server plays, and annotations read without our code."""

import json
import math
import random
import re

QUESTIONS, CANARIES = 24, 6


def write_answers(folder, names=("base", "model"), n=QUESTIONS, seed=0, length=lambda name, question: 20):
    """Write FOLDER/NAME.json of each model. An answer's worth, which a fair judge sees, stands in it as <w=0.42>."""
    rng, paths = random.Random(seed), []
    for name in names:
        rows = []
        for question in range(n):
            words = " ".join(["word"] * length(name, question))
            text = f"<w={rng.random():.3f}> {words}"
            rows.append({"instruction": f"Say it in {question} words.", "output": text, "generator": name})
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(rows))
    return paths


def read_prompt(body):
    """Return (instruction, answer 1, answer 2) of a request to the judge."""
    text = body["messages"][-1]["content"]
    fence = re.search(r"^=== instruction (\w{8}) ===$", text, re.M)[1]
    return re.split(rf"^=== (?:instruction|answer 1|answer 2|end) {fence} ===$", text, flags=re.M)[1:4]


def say(winner, reason="It is the better one."):
    return json.dumps({"reason": reason, "winner": winner})


def read_worth(text):
    found = re.search(r"<w=([\d.]+)>", text)
    return float(found[1]) if found else -1


def judge_fairly(key, body):
    _, first, second = read_prompt(body)
    return say("1" if read_worth(first) > read_worth(second) else "2")


def judge_mostly_fairly(key, body):
    """Answer like a fair judge who is unsure where the worths are near, and then takes what is shown first."""
    _, first, second = read_prompt(body)
    gap = read_worth(first) - read_worth(second)
    return say("tie" if abs(gap) < 0.03 else "1" if gap > -0.15 else "2")


def judge_first(key, body):
    return say("1")


def judge_longer(key, body):
    _, first, second = read_prompt(body)
    return say("1" if len(first) > len(second) else "2")


ALPACA_EVAL_KEYS = [
    "instruction", "output_1", "generator_1", "dataset", "output_2", "generator_2", "annotator", "preference",
    "price_per_example", "time_per_example", "raw_completion",
]  # fmt: skip


def read_annotations(path):
    """Return (win rate, standard error, discrete win rate, n) as alpaca_eval 0.6.6 computes them, in plain Python."""
    rows = json.loads(path.read_text())
    assert all(list(row) == ALPACA_EVAL_KEYS for row in rows)
    known = [row["preference"] for row in rows if row["preference"] is not None]
    assert all(1 <= preference <= 2 for preference in known)
    scores = [preference - 1 for preference in known]
    mean = sum(scores) / len(scores)
    error = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
    discrete = [0.5 if preference == 1.5 else round(preference) - 1 for preference in known]
    return 100 * mean, 100 * error, 100 * sum(discrete) / len(discrete), len(known)


def bootstrap(scores, draws=4000, seed=1):
    """Return the interval of 95% of the mean of scores, in percent, drawn one by one."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(scores, k=len(scores))) / len(scores) for _ in range(draws))
    return 100 * means[int(0.025 * draws)], 100 * means[int(0.975 * draws)]
