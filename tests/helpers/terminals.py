"""Processes in a terminal of their own: what they show, and what is typed. Forked as in tests.helpers.forks."""

import codecs
import os
import pty
import select
import time

from tests.helpers.forks import Started

# The process as a shell would have started it: its session's leader, whose terminal the first argument names; the
# second one names the standard files that are the terminal. A fork has kept objects for the files of its parent.
INSIDE = """
import fcntl, os, sys, termios
os.setsid()
terminal = os.open(sys.argv.pop(1), os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for fd in map(int, sys.argv.pop(1)):
    os.dup2(terminal, fd)
os.close(terminal)
sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", 1), open(2, "w", 1)
"""


class Terminal:
    """`python -c CODE ARGS` in a terminal. stderr: whether it is the terminal too, or what communicate() returns."""

    def __init__(self, code, *args, env=None, stderr=True):
        self.ours, theirs = pty.openpty()
        self.process = Started(INSIDE + code, os.ttyname(theirs), "012" if stderr else "01", *args, env=env)
        self.said, self.decoder = "", codecs.getincrementaldecoder("utf-8")("replace")
        while not select.select([self.ours], [], [], 0.02)[0] and self.process.poll() is None:
            pass
        os.close(theirs)  # the process has it open now

    def write(self, text):
        self.said = ""
        os.write(self.ours, text.encode())

    def read_until(self, text):
        """Return what is said up to a text."""
        end = time.monotonic() + 120
        while text not in self.said:
            assert select.select([self.ours], [], [], max(0, end - time.monotonic()))[0], self.said
            data = self._read()
            assert data or text in self.said, self.said
        return self.said

    def read_all(self):
        """Return everything that is said until the process has closed the terminal."""
        while self._read():
            pass
        return self.said

    def close(self):
        """Hang up and end the process."""
        os.close(self.ours)
        self.process.kill()
        self.process.communicate()

    def _read(self):
        try:
            data = os.read(self.ours, 65536)
        except OSError:  # Linux says EIO when the last writer has gone
            return b""
        self.said += self.decoder.decode(data)
        return data
