"""Loss spikes: steps whose loss stands out from those before.

    loss > median + threshold max(1.4826 MAD, median / 100)       MAD: the median of |loss - median|

over the last WINDOW steps; 1.4826 MAD is a normal distribution's standard deviation, and no outlier moves it. Losses
that stand out in a row are one spike. PaLM met such spikes by going back some 100 steps and leaving out the batches
since (Chowdhery et al. 2022, section 5.1).
"""

import statistics
from dataclasses import dataclass

WINDOW, LEAST = 64, 16  # steps that are looked back on, and without which nothing stands out


@dataclass(frozen=True)
class Spike:
    """A step's loss, and the median and robust standard deviation of the losses before it."""

    loss: float
    median: float
    deviation: float


class Spikes:
    """Looks at the losses of a run, in order. threshold: in standard deviations; 0 looks at nothing."""

    def __init__(self, threshold: float):
        self.threshold, self.losses, self.within = threshold, [], False

    def look(self, step: int, loss: float) -> Spike | None:
        """The spike that this step begins."""
        before = [earlier for _, earlier in self.losses[-WINDOW:]]
        self.losses.append((step, loss))
        if not self.threshold or len(before) < LEAST:
            return None
        median = statistics.median(before)
        deviation = max(1.4826 * statistics.median(abs(x - median) for x in before), median / 100)
        was, self.within = self.within, loss > median + self.threshold * deviation
        return Spike(loss, median, deviation) if self.within and not was else None

    def forget(self, step: int) -> None:
        """The losses after a step, which the run has gone back to."""
        self.losses, self.within = [(at, loss) for at, loss in self.losses if at <= step], False

    def remember(self, lines: list[dict]) -> None:
        """What metrics.jsonl tells of the run so far."""
        for line in lines:
            if line["event"] == "train" and line["loss"] is not None:
                self.look(line["step"], line["loss"])
            elif line["event"] == "spike" and line["back_to"] is not None:
                self.forget(line["back_to"])
