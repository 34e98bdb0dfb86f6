"""Text that is made to hurt: for a regular expression, strings of repeated pieces of what it nearly matches.

for text in make_texts(pattern, n): ...      # from short to hard, the same every time
seconds = measure_growth(call, unit, n)      # CPU seconds at n and 4 n characters
"""

import gc
import random
import re
import string
import time

try:
    from re import _constants as constants
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as constants
    import sre_parse as parser

SAMPLES = {  # a member or two of each category
    constants.CATEGORY_SPACE: " \n", constants.CATEGORY_NOT_SPACE: "a.", constants.CATEGORY_DIGIT: "1",
    constants.CATEGORY_NOT_DIGIT: "a", constants.CATEGORY_WORD: "a1", constants.CATEGORY_NOT_WORD: " .",
}  # fmt: skip
ANYTHING = string.ascii_lowercase + " .,:\"'\n-1é字"
TAILS = ("", "\0", "\n", "a")
FACTOR = 2800  # by which a reader may be slower than what finds words; a window of 2,000 characters makes it 5,500
MIN_S, ALLOWED = 0.05, 8  # growth for four times the text is judged above MIN_S; linear is 4, quadratic 16


def draw_text(nodes, rng, depth=0):
    """Return a random text that a parsed pattern nearly matches: what looks around is left out."""
    out = []
    for op, value in nodes:
        if op is constants.LITERAL:
            out.append(chr(value))
        elif op is constants.NOT_LITERAL:
            out.append(rng.choice([c for c in ANYTHING if ord(c) != value]))
        elif op is constants.ANY:
            out.append(rng.choice(ANYTHING))
        elif op is constants.IN:
            out.append(draw_member(value, rng))
        elif op is constants.BRANCH:
            out.append(draw_text(rng.choice(value[1]), rng, depth + 1))
        elif op is constants.SUBPATTERN:
            out.append(draw_text(value[-1], rng, depth + 1))
        elif op in (constants.MAX_REPEAT, constants.MIN_REPEAT) or str(op) == "POSSESSIVE_REPEAT":
            low, high, inner = value
            times = min(high, rng.choice((low, low, low + 1, low + 2)), 60)
            out += [draw_text(inner, rng, depth + 1) for _ in range(times)]
        elif op is constants.GROUPREF:
            out.append(out[-1] if out else "")
        elif str(op) == "ATOMIC_GROUP":
            out.append(draw_text(value, rng, depth + 1))
    return "".join(out)


def draw_member(items, rng):
    """Return a random member of a class of characters."""
    kinds, members = [item for item in items if item[0] is not constants.NEGATE], []
    if len(kinds) < len(items):
        pattern = re.compile(f"[{ANYTHING}]")
        inside = {chr(v) for op, v in kinds if op is constants.LITERAL}
        members = [c for c in ANYTHING if c not in inside and pattern.match(c)]
    else:
        for op, value in kinds:
            if op is constants.LITERAL:
                members.append(chr(value))
            elif op is constants.RANGE:
                members += [chr(value[0]), chr(value[1])]
            elif op is constants.CATEGORY:
                members += SAMPLES[value]
    return rng.choice(members or ["a"])


def list_units(pattern, most=160):
    """Return pieces of texts that a pattern nearly matches, (lead, unit, tail), the same every time.

    First come its characters, each alone; then so many random pieces.
    """
    rng, nodes = random.Random(ascii(pattern.pattern)), parser.parse(pattern.pattern, pattern.flags)
    texts = [text for text in (draw_text(nodes, rng) for _ in range(4 * most)) if text]
    units = {("", char, ""): None for char in sorted(set("".join(texts)))}
    for text in texts[:most]:
        start = rng.randrange(len(text))
        unit = text[start : start + rng.choice((1, 2, 3, 5, 8, 13, 40))]
        lead = text[:start] if rng.random() < 0.5 else ""
        units[lead, unit, rng.choice(TAILS)] = None
    return list(units)


def build_text(lead, unit, tail, n):
    """Return lead, unit again and again, tail, in n characters."""
    return lead + (unit * (n // len(unit) + 1))[: max(0, n - len(lead) - len(tail))] + tail


def measure_cpu_s(call, *args, times=3):
    """Return the CPU seconds of the fastest of some calls, in which no garbage of others is collected."""
    seconds, is_collecting = [], gc.isenabled()
    gc.disable()  # a worker of the tests holds millions of objects, and a collection looks through all of them
    try:
        for _ in range(times):
            start = time.process_time()
            call(*args)
            seconds.append(time.process_time() - start)
    finally:
        if is_collecting:
            gc.enable()
    return min(seconds)


def find_worst(call, units, n, most=2):
    """Return the units whose texts take a call the longest, and those whose time grows most from n to 8 n."""
    timed = [(measure_cpu_s(call, build_text(*unit, n), times=1), unit) for unit in units]
    short = sorted(timed, reverse=True)[: 30 * most]
    long = [(measure_cpu_s(call, build_text(*unit, 8 * n), times=1), seconds, unit) for seconds, unit in short]
    slow = [unit for _, _, unit in sorted(long, reverse=True)[:most]]
    growing = sorted(long, key=lambda found: found[0] / max(found[1], 1e-5), reverse=True)
    return list(dict.fromkeys([*slow, *(unit for _, _, unit in growing[:most])]))


def measure_growth(call, unit, n):
    """Return the CPU seconds of a call on texts of n and 4 n characters.

    The short text is read three times, as a chance that slows it would hide growth; the long one again only where it
    seems to take too long.
    """
    short_s, text = measure_cpu_s(call, build_text(*unit, n)), build_text(*unit, 4 * n)
    seconds = [short_s, measure_cpu_s(call, text, times=1)]
    return [short_s, measure_cpu_s(call, text)] if describe_growth(seconds, 4 * n) else seconds


def is_linear(seconds):
    """Return whether the seconds at n characters and, the last ones, at 4 n grow as a line, or are too few to tell."""
    return seconds[-1] < MIN_S or seconds[-1] <= ALLOWED * seconds[0]


def measure_word_s(n):
    """Return the CPU seconds in which plain words of n characters are found, which other readers are compared with."""
    return measure_cpu_s(re.compile("[a-z0-9]+").findall, "lorem " * (n // 6))


def describe_growth(seconds, n):
    """Return what is wrong with the seconds of a reader at n / 4 and n characters, "" if nothing is."""
    if not is_linear(seconds):
        return f"grows faster than a line: {seconds}"
    times = seconds[-1] / measure_word_s(n)
    return f"takes {times:,.0f} times as long as finding words" if times > FACTOR else ""
