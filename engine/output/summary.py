"""What a run comes to in a few lines: the end of a run and its report say the same."""

import statistics
from collections.abc import Sequence

from engine.output.report_numbers import Line, finite_number

MOST_MEANS = 10  # losses that the mean at either end of a run is of, at most


def summarize_run(events: dict[str, list[Line]]) -> list[str]:
    """Return the lines that say what a run came to: its losses, and its scores where there are any."""
    return [line for line in (summarize_losses(events), summarize_scores(events["score"])) if line]


def summarize_losses(events: dict[str, list[Line]]) -> str:
    """Return "held-out loss 2.1034 -> 1.8412" of a run's events, or "train loss ..." where nothing was held out.

    A train loss at either end is a mean over a quarter of the steps, at most MOST_MEANS. "no loss yet" where none is
    finite.
    """
    held_out = keep_numbers(events["eval"])
    if held_out:
        return f"held-out loss {format_change(held_out)}"
    losses = keep_numbers(events["train"])
    if not losses:
        return "no loss yet"
    n = max(1, min(MOST_MEANS, len(losses) // 4))
    ends = [statistics.fmean(losses[:n]), statistics.fmean(losses[-n:])]
    of = f" (means of {n} steps)" if n > 1 else ""
    return f"train loss {format_change(ends if len(losses) > 1 else losses)}{of}"


def summarize_scores(scores: Sequence[Line]) -> str:
    """Return "held-out answers as wanted: 0 -> 20 of 24" of the lines of the event score, or "" without any."""
    if not scores:
        return ""
    counts = " -> ".join(str(line.get("equal")) for line in ([scores[0], scores[-1]] if len(scores) > 1 else scores))
    return f"held-out answers as wanted: {counts} of {scores[-1].get('answers')}"


def keep_numbers(lines: Sequence[Line]) -> list[float]:
    """Return the finite losses of lines."""
    losses = (finite_number(line.get("loss")) for line in lines)
    return [loss for loss in losses if loss is not None]


def format_change(losses: Sequence[float]) -> str:
    """Return the first and the last of some losses as "2.1034 -> 1.8412", one alone as "2.1034"."""
    return " -> ".join(f"{loss:.4f}" for loss in (losses if len(losses) == 1 else (losses[0], losses[-1])))
