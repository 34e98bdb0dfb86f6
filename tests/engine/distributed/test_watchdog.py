"""The watchdog's thread has ended when stop() returns: within the store at Python's end it aborts the process."""

import threading
from types import SimpleNamespace

from engine.distributed.world import Watchdog


class SlowStore:
    """A store whose set() is under way until it is let go."""

    def __init__(self):
        self.entered, self.leave = threading.Event(), threading.Event()

    def set(self, key, value):
        self.entered.set()
        self.leave.wait()

    def check(self, keys):
        return False


def test_stop_waits_for_a_report_that_is_under_way():
    store = SlowStore()
    watchdog = Watchdog(SimpleNamespace(rank=0, size=2, store=store), timeout_s=0.1)
    assert store.entered.wait(60)
    threading.Timer(0.3, store.leave.set).start()
    watchdog.stop()
    assert not watchdog.thread.is_alive()
