"""SIGTERM and SIGINT: noted while a run trains, obeyed at once before that."""

import os
import signal
from types import FrameType

from engine.base.errors import Stopped


class Signals:
    """The signals SIGTERM and SIGINT of this process.

    Before training the first one ends the run at once, with nothing to save. In training it is noted, and the loop asks
    for it with pending(). A second one ends the process there and then: what is on disk is whole.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal or end the process, as the class says. Python calls this."""
        name = signal.Signals(number).name
        if self.received:
            os.write(2, f"{name} again: leaving at once, the last saved state is whole\n".encode())
            os._exit(1)
        self.received = name
        if not self.training:
            raise Stopped(f"stopped by {name} before the first step; there is nothing to save")

    def pending(self) -> bool:
        """Return whether a signal has been noted."""
        return self.received is not None
