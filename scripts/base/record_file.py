"""A measurement's result on disk, complete after every change, and the time until which more may be measured."""

import time
from collections.abc import Callable
from pathlib import Path

from scripts.base.results import write_json


class RecordFile:
    """A result that is written again after every change, so that an interruption costs one measurement at most.

    path None keeps the result in memory. minutes None sets no limit. clock: returns seconds since any moment.
    """

    def __init__(
        self, path: str | Path | None, minutes: float | None, result: dict, clock: Callable[[], float] = time.monotonic
    ):
        self.path = None if path is None else Path(path)
        self.result = {**result, "left_out": []}
        self.clock = clock
        self.deadline = float("inf") if minutes is None else clock() + 60 * minutes

    def save(self) -> None:
        """Write the result, if it has a path."""
        if self.path:
            write_json(self.path, self.result)

    def seconds_left(self) -> float:
        """Return the seconds until no measurement may begin any more; negative after that."""
        return self.deadline - self.clock()

    def is_time_up(self) -> bool:
        return self.seconds_left() <= 0

    def may_begin(self, name: str) -> bool:
        """Return whether there is time to begin a measurement. If there is none, note the measurement as left out."""
        if self.is_time_up():
            self.result["left_out"].append(name)
            self.save()
            return False
        return True
