"""Everything of data_gen that reads a stranger's text, each as a function of one text, for measuring its time.

python -m tests.helpers.readers NAME ...     prints the growth of these readers, of all without a name
"""

import importlib
import json
import pkgutil
import random
import re
import sys
from functools import cache

import data_gen
from data_gen.api.answers import judge_success
from data_gen.api.cleaner import Cleaner
from data_gen.api.errors import classify_error, extract_message
from data_gen.api.rate import parse_duration, parse_retry_after
from data_gen.base.language import guess_language
from data_gen.judging.verdicts import parse_reason, parse_winner
from data_gen.page.verbs import count_verbs
from data_gen.rows import defects
from data_gen.rows.parse import parse_answer
from data_gen.rows.repairs import repair_item
from data_gen.rows.rouge import Deduplicator
from data_gen.rows.tokens import tokenize, tokenize_again
from tests.helpers.hostile import describe_growth, find_worst, list_units, measure_growth

LEADS = ("", "Summarize the following text ", "Find the given numbers, ", "Draw me a ")
MARKS = [
    "\u0301",
    "\u0316\u0301",
    "\u0344",
    "a\u0301",
    "\u034f\u0301",
    " \ufeff",
    "\u200b ",
    "\u200d",
    "\ufdfa",
    "\u0130",
]
SHORT, UNITS = 800, 10  # characters of the texts from which the worst are chosen; pieces of each pattern
CUT, WHOLE = defects.SCAN, 100_000  # characters of the longest text: what filters see, and of a reader without a cut


def fill_task(check):
    """Return a reader that gives a filter a text in each of its fields."""

    def read(text):
        for lead in LEADS:
            check({"instruction": lead + text, "input": "", "output": "Red."})
        check({"instruction": "Do it now.", "input": text, "output": text})
        check({"instruction": text, "input": text, "output": text})

    return read


def read_error(text):
    for body in (text, json.dumps({"error": text}), json.dumps({"choices": [{"message": {"content": text}}]})):
        judge_success(body)
        extract_message(body)
        classify_error(400, body)


def read_header(text):
    parse_duration(text)
    parse_retry_after({"retry-after": text})


def read_verdict(text):
    parse_winner(text)
    parse_reason(text)


def repair(text):
    for field in ("instruction", "input", "output"):
        repair_item({"instruction": "a", "input": "a", "output": "a"} | {field: text})


def forget_first(read):
    """Return a reader that remembers no tokens of an earlier call: what is measured is reading."""

    def read_anew(text):
        tokenize_again.cache_clear()
        return read(text)

    return read_anew


READERS = {f"filter: {reason}": (fill_task(check), CUT) for reason, check in defects.CHECKS.items()}
READERS |= {
    "filter: wrong language": (fill_task(lambda item: defects.find_wrong_language(item, "en")), CUT),
    "parser": (lambda text: parse_answer(text, True), WHOLE),
    "repairs": (repair, WHOLE),
    "tokenizer": (tokenize, WHOLE),
    "index of duplicates": (lambda text: Deduplicator().add(text), WHOLE),
    "language": (guess_language, WHOLE),
    "verbs": (lambda text: count_verbs([text]), CUT),
    "verdict": (read_verdict, WHOLE),
    "errors": (read_error, WHOLE),
    "headers": (read_header, WHOLE),
    "key": (Cleaner(["sk-test-5f3a9c1e77d04b21"]).clean_body, WHOLE),
}  # fmt: skip
READERS = {name: (forget_first(read), longest) for name, (read, longest) in READERS.items()}


@cache
def find_patterns():
    """Return every regular expression of data_gen by its name."""
    found = {}
    for module in pkgutil.walk_packages(data_gen.__path__, "data_gen."):
        for name, value in vars(importlib.import_module(module.name)).items():
            inner = value.values() if isinstance(value, dict) else (value,)
            for n, one in enumerate(inner):
                one = getattr(one, "pattern", one) if isinstance(one, defects.patterns.Sought) else one
                if isinstance(one, re.Pattern):
                    found.setdefault(one, f"{module.name}.{name}" + (f".{n}" if one is not value else ""))
    return {name: pattern for pattern, name in found.items()}


@cache
def list_all_units():
    """Return the pieces of every pattern, and of text that is costly to normalize or to strip."""
    rng = random.Random(0)
    units = [("", mark, tail) for mark in MARKS for tail in ("", "a")]
    for pattern in find_patterns().values():
        units += list_units(pattern, UNITS)
    rng.shuffle(units)
    return list(dict.fromkeys(units))


def measure_reader(name):
    """Return [(piece, CPU seconds at n and 4 n characters, what is wrong)] for the worst pieces of a reader."""
    read, longest = READERS[name]
    worst = find_worst(read, list_all_units(), SHORT)
    found = [(unit, measure_growth(read, unit, longest // 4)) for unit in worst]
    return [(unit, seconds, describe_growth(seconds, longest)) for unit, seconds in found]


def main(names):
    for name in names or READERS:
        for (lead, unit, tail), seconds, wrong in measure_reader(name):
            told = " ".join(f"{one:8.4f}" for one in seconds)
            print(f"{name:28}{told}  {lead[-20:]!a} + {unit!a} + {tail!a}  {wrong}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
