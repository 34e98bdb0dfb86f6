"""SIGTERM, SIGINT and SIGHUP, of a closed terminal: before training they end the run at once; then, after a step."""

import os
import signal
from types import FrameType

from engine.base.errors import Stopped


class Signals:
    """The signals SIGTERM, SIGINT and SIGHUP of this process.

    Before training, the first signal ends the run at once, as there is nothing to save. During training it is noted,
    and the training loop asks for it with pending(). A second signal ends the process at once; files on disk are
    complete. But a SIGHUP is never a second one: a terminal that is closed sends it by the shell and by the kernel.
    Where it is ignored from the start, as under nohup, it stays ignored.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False
        self.terminals = [number for number in (1, 2) if os.isatty(number)]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal as the class describes. Python calls this."""
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            self.leave_terminals()
            if self.received:
                return
        if self.received:
            os.write(2, f"{name} again: leaving at once, the last saved state is whole\n".encode())
            os._exit(1)
        self.received = name
        if not self.training:
            raise Stopped(f"stopped by {name} before the first step; there is nothing to save")

    def leave_terminals(self) -> None:
        """Send what is printed from now on to /dev/null, in place of a terminal that is gone: writing there fails."""
        null = os.open(os.devnull, os.O_WRONLY)
        for number in self.terminals:
            if not os.isatty(number):
                os.dup2(null, number)
        os.close(null)

    def pending(self) -> bool:
        """Return whether a signal has been noted."""
        return self.received is not None
