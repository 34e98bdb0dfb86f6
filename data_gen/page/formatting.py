"""Values of JSON files as texts and numbers, and numbers as people read them."""

import json
import math
from typing import Any


def as_text(value: Any) -> str:
    """Return any JSON value as text: a string as it is, null as ""."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def as_number(value: Any) -> int | float | None:
    """Return the value if it is a finite number up to 1e15, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15 or math.isnan(value):
        return None
    return value


def clip_text(text: str, most: int) -> str:
    """Return the first characters of a text and, if it is longer, how many more it has."""
    more = len(text) - most
    return text if more <= 0 else f"{text[:most]} … ({format_count(more)} characters more)"


def format_count(value: float) -> str:
    """Return a count with thousands separators: 52,000."""
    return f"{round(value):,}"


def format_rows(n: int) -> str:
    """Return a number of rows: 1 row, 52,000 rows."""
    return f"{format_count(n)} row{'' if n == 1 else 's'}"


def format_percent(part: float, whole: float) -> str:
    """Return the share of part in whole: 0%, <0.1%, 12.3%, 100%."""
    share = 100 * part / whole if whole else 0
    if not part:
        return "0%"
    if share < 0.1:
        return "<0.1%"
    return f"{share:.0f}%" if share > 99.95 else f"{share:.1f}%"


def format_dollars(value: float) -> str:
    """Return dollars: $1,234.50, or two digits for a small fraction of a dollar, $0.0012."""
    size = abs(value)
    return f"${value:,.2f}" if size >= 0.1 or abs(value - round(value, 2)) < 1e-9 else f"${value:.2g}"


def format_duration(seconds: float) -> str:
    """Return a duration with its units: 1h 02m, 3m 04s, 5.6s."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{seconds:.1f}s"


def shorten_number(value: float) -> str:
    """Return a number for an axis: 1,500, 12k, 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % (size / 10) == 0):
            return f"{value / size:.3g}{letter}"
    return f"{value:,.6g}"
