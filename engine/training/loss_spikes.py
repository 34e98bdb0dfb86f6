"""Loss spikes: steps whose loss stands out from the losses before.

    loss > median + threshold max(1.4826 MAD, median / 100)       MAD: the median of |loss - median|

over the last WINDOW steps. 1.4826 MAD is the standard deviation of a normal distribution, and no single outlier moves
it. Losses that stand out in a row are one spike. PaLM met such spikes by going back some 100 steps and leaving out the
batches since (Chowdhery et al. 2022, section 5.1).
"""

import statistics
from dataclasses import dataclass

WINDOW, LEAST = 64, 16  # the most earlier losses that a loss is compared with, and the fewest


@dataclass(frozen=True)
class Spike:
    """A step's loss, and the median and robust standard deviation of the losses before it."""

    loss: float
    median: float
    deviation: float


class SpikeDetector:
    """Finds the spikes among the losses of a run, given in order.

    threshold: robust standard deviations over the median; 0 finds nothing.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.losses: list[tuple[int, float]] = []  # (step, loss)
        self.in_spike = False  # the last loss stood out

    def add_loss(self, step: int, loss: float) -> Spike | None:
        """Add a step's loss. Return the spike that it begins, if it begins one."""
        before = [earlier for _, earlier in self.losses[-WINDOW:]]
        self.losses.append((step, loss))
        if not self.threshold or len(before) < LEAST:
            return None
        median = statistics.median(before)
        deviation = max(1.4826 * statistics.median(abs(x - median) for x in before), median / 100)
        was_in_spike, self.in_spike = self.in_spike, loss > median + self.threshold * deviation
        return Spike(loss, median, deviation) if self.in_spike and not was_in_spike else None

    def forget_after(self, step: int) -> None:
        """Drop the losses after a step, because the run has gone back to it."""
        self.losses, self.in_spike = [(at, loss) for at, loss in self.losses if at <= step], False

    def replay(self, lines: list[dict]) -> None:
        """Add the losses in the lines of a resumed run's metrics.jsonl, without those that the run went back from."""
        for line in lines:
            if line["event"] == "train" and line["loss"] is not None:
                self.add_loss(line["step"], line["loss"])
            elif line["event"] == "spike" and line["back_to"] is not None:
                self.forget_after(line["back_to"])
