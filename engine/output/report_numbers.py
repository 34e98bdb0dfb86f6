"""Numbers and texts of report.html, from lines of metrics.jsonl to what a reader sees."""

from typing import Any

Line = dict[str, Any]  # of metrics.jsonl
Point = tuple[int, float | None]  # step, value
TEXT_CHARS = 4000  # of one sample or setting at most


def read_column(lines: list[Line], key: str) -> list[Point]:
    """Return (step, value) of each line, None for a value that is no finite number."""
    return [(line["step"], finite_number(line.get(key))) for line in lines]


def finite_number(value: Any) -> float | None:
    """Return the value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300 or value != value:
        return None
    return value


def format_figure(value: float | None) -> str:
    """Return a number with as many digits as a reader needs, and "-" for None."""
    if value is None:
        return "-"
    size = abs(value)
    return format_count(value) if size >= 1000 else f"{value:.4f}" if size >= 0.01 or not size else f"{value:.3g}"


def format_tick(value: float, highest: float) -> str:
    """Return the label of a tick on an axis that goes up to `highest`."""
    return format_si(value) if highest >= 10000 else f"{value:.3g}" if abs(value) < 0.001 else f"{value:,.6g}"


def format_count(value: float) -> str:
    """Return a number rounded, with commas between thousands."""
    return f"{round(value):,}"


def format_si(value: float) -> str:
    """Return a number with three digits and k, M, G or T."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def format_time(seconds: float | None) -> str:
    """Return seconds as 1.5s, 2m 05s or 1h 02m, and "-" for none."""
    if not seconds:
        return "-"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{seconds:.1f}s"


def clip_text(text: str) -> str:
    """Return a text, cut after TEXT_CHARS characters with a note of how many more it has."""
    more = len(text) - TEXT_CHARS
    return text if more <= 0 else f"{text[:TEXT_CHARS]} … ({format_count(more)} characters more)"
