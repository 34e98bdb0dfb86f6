"""Statistics of a dataset: medians, bins of histograms, kinds of rows."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from data_gen.page.run_files import Row

Bin: TypeAlias = tuple[float, float, int]  # first, end, number of values

LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])\s+\S", re.MULTILINE)
TABLE_LINE = re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE)
NUMBER_ALONE = re.compile(r"[-+\u2212$€£]?\s?\d[\d.,\s]*%?")


def compute_median(values: Sequence[float]) -> float | None:
    """Return the median, or None of no values."""
    return statistics.median(values) if values else None


def find_percentile(values: Sequence[int], share: float) -> int:
    """Return the smallest of the sorted values that at least this share of them do not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def round_width(width: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is not under width."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= width * 0.999)


def bin_whole_numbers(values: Sequence[int], most: int = 26) -> tuple[list[Bin], bool]:
    """Return bins of sorted whole numbers from 1 up, and whether their widths grow because of a long tail."""
    low, high = values[0], values[-1]
    grows = high > 6 * statistics.median(values)
    if grows:
        # 1 2 3 4 6 8 11 16 23 ...
        edges = sorted({round(2 ** (half / 2)) for half in range(2 * high.bit_length() + 2)})
        first = max(i for i, edge in enumerate(edges) if edge <= low)
        edges = edges[first : 1 + next(i for i, edge in enumerate(edges) if edge > high)]
    else:
        width = max(1, int(round_width((high - low + 1) / most)))
        first = low // width * width
        end = max(high + 1, first + 8 * width)
        edges = list(range(first, end + width, width))
    return count_in_bins(edges, values), grows


def bin_evenly(values: Iterable[float], low: float, high: float, width: float) -> list[Bin]:
    """Return bins of equal width from low to high. A value outside counts in the nearest bin."""
    steps = round((high - low) / width)
    counts = Counter(min(steps - 1, max(0, math.floor((value - low) / width + 1e-6))) for value in values)
    return [(round(low + i * width, 6), round(low + (i + 1) * width, 6), counts[i]) for i in range(steps)]


def count_in_bins(edges: Sequence[int], values: Iterable[int]) -> list[Bin]:
    """Return the bins between the edges, with the number of sorted values in each."""
    counts, place = [0] * (len(edges) - 1), 0
    for value in values:
        while value >= edges[place + 1]:
            place += 1
        counts[place] += 1
    return list(zip(edges, edges[1:], counts, strict=False))


def count_kinds(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Return [(kind, rows)] by falling count, of simple patterns. A row may be of several kinds or none."""
    outputs = Counter(row.output.strip() for row in rows)
    tests: dict[str, Callable[[Row], bool]] = {
        "asked as a question": lambda row: row.instruction.rstrip().endswith(("?", "\uff1f")),
        "output with a list": lambda row: len(LIST_LINE.findall(row.output)) > 1,
        "output with code (```)": lambda row: "```" in row.output,
        "output with a table": lambda row: len(TABLE_LINE.findall(row.output)) > 1,
        "output of paragraphs": lambda row: "\n\n" in row.output.strip(),
        "output of one number": lambda row: NUMBER_ALONE.fullmatch(row.output.strip()) is not None,
        "output of one word": lambda row: len(row.output.split()) == 1,
        "output seen in another row": lambda row: outputs[row.output.strip()] > 1,
        "output empty": lambda row: not row.output.strip(),
    }
    counts = [(name, sum(map(test, rows))) for name, test in tests.items()]
    return sorted(((name, n) for name, n in counts if n), key=lambda pair: -pair[1])
