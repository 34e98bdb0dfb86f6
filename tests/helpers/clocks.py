"""Clocks for measurements: one that moves when it is told to, and one whose every reading is a later moment."""

from types import SimpleNamespace


class Clock:
    """A clock that only moves when a contender lets it."""

    def __init__(self, monkeypatch, module):
        self.now = 0.0
        read = lambda: self.now  # noqa: E731
        times = SimpleNamespace(process_time=read, perf_counter=read, monotonic=read, sleep=lambda _: None)
        monkeypatch.setattr(module, "time", times)

    def take(self, seconds):
        self.now += seconds


class Ticks:
    """A module's clocks, each of which goes on by its own step, and by more at each reading: no two spans are equal.

    All moments are exact in binary, so that sums and differences are the same on every machine.
    """

    def __init__(self, monkeypatch, module):
        self.readings, self.slept = 0, []
        self.now = {"process_time": 0.0, "perf_counter": 0.0, "monotonic": 0.0}
        clocks = {name: self.clock(name, first) for name, first in zip(self.now, (0, 4, 16), strict=True)}
        monkeypatch.setattr(module, "time", SimpleNamespace(**clocks, sleep=self.slept.append))

    def clock(self, name, first):
        """Return a clock's function."""

        def read():
            self.readings += 1
            self.now[name] += first + self.readings / 8
            return self.now[name]

        return read
