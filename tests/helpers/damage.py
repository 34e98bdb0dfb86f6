"""What is damaged: bytes with a bit flipped or the end cut off, values with a wrong one inside. The same every time."""

import copy
import random


def flip_bits(raw, n, seed=0):
    """Yield n copies of the bytes, each with one bit flipped."""
    rng = random.Random(seed)
    for _ in range(n):
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def truncate(raw, n):
    """Yield n beginnings of the bytes, the shortest empty, none whole."""
    for i in range(n):
        yield raw[: i * len(raw) // n]


def with_value(value, path, new):
    """Return a copy of nested dicts and lists with another value at a path of keys and indices."""
    if not path:
        return new
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return whole
