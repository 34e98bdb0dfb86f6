"""SIGTERM and SIGINT: before training they end the run at once; during training they wait for the end of a step."""

import os
import signal
from types import FrameType

from engine.base.errors import Stopped


class Signals:
    """The signals SIGTERM and SIGINT of this process.

    Before training, the first signal ends the run at once, as there is nothing to save. During training it is noted,
    and the training loop asks for it with pending(). A second signal ends the process at once; files on disk are
    complete.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal as the class describes. Python calls this."""
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
