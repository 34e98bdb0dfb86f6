"""Bytes that are damaged: single bits flipped, ends cut off. The same every time."""

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
