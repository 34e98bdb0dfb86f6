"""SIGTERM and SIGINT: noted while a run trains, obeyed at once before that."""

import os
import signal

from engine.base.errors import Stopped


class Signals:
    """SIGTERM and SIGINT. Before training the first one ends the run at once, with nothing to save; in training it is
    noted, and the loop asks with `pending`. A second one ends the process there and then: what is on disk is whole."""

    def __init__(self):
        self.received = None
        self.training = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        name = signal.Signals(number).name
        if self.received:
            os.write(2, f"{name} again: leaving at once, the last saved state is whole\n".encode())
            os._exit(1)
        self.received = name
        if not self.training:
            raise Stopped(f"stopped by {name} before the first step; there is nothing to save")

    def pending(self) -> bool:
        return self.received is not None
