"""The watchdog names a rank that is silent, and no rank that works long; its thread has ended when stop() returns."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from engine.distributed import world
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


def wait_for(is_so):
    end = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_rank_is_silent_when_its_watchdog_is_and_not_when_it_works_for_long(monkeypatch, capsys):
    """The clock is the test's: it goes on by half of the time-out when each watchdog has reported and looked again."""
    now, ended = [0.0], []

    def end(code):
        ended.append(code)
        dogs[0].stopped.set()

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr(world, "time", clock)
    monkeypatch.setattr(world.os, "_exit", end)
    store, looks = dist.HashStore(), [0, 0]
    dogs = [Watchdog(SimpleNamespace(rank=rank, size=2, store=store), timeout_s=0.1) for rank in (0, 1)]
    for rank, dog in enumerate(dogs):
        real = dog.find_silent

        def look(real=real, rank=rank):
            found = real()
            looks[rank] += 1
            return found

        dog.find_silent = look
    dogs[1].place = "step 7"

    def wait_for_looks(ranks):
        before = list(looks)
        wait_for(lambda: all(looks[rank] > before[rank] + 1 for rank in ranks))
        assert not ended

    for seconds in [0.05] * 20 + [0.0]:  # neither rank's main thread does anything
        wait_for_looks((0, 1))
        now[0] += seconds
    dogs[1].stop()
    wait_for_looks((0,))  # the last report is seen
    now[0] += 0.09
    wait_for_looks((0,))
    now[0] += 0.02
    wait_for(lambda: ended)
    dogs[0].stop()
    assert ended == [1] and "rank 1 has not been heard of for 0 s, last at step 7" in capsys.readouterr().err


@pytest.mark.parametrize("lateness", [(0, 3, 1), (0, 1, 3), (0, 3, 3), (0, 0, 1)])
def test_of_several_silent_ranks_the_one_silent_longest_is_named_with_its_place(lateness, monkeypatch):
    """Ranks that waited for it may have been ended since."""
    now = [0.0]
    monkeypatch.setattr(world, "time", SimpleNamespace(monotonic=lambda: now[0]))
    store = dist.HashStore()
    dog = Watchdog.__new__(Watchdog)  # without its thread
    dog.world, dog.timeout_s, dog.seen = SimpleNamespace(rank=0, size=3, store=store), 10.0, {}
    for second in range(12 + max(lateness)):
        now[0] = float(second)
        for rank in (1, 2):
            if second <= max(lateness) - lateness[rank]:
                store.set(f"beat/{rank}", f"{second} step {second} of {rank}")
        found = dog.find_silent()
    silent = max((1, 2), key=lambda rank: lateness[rank])
    last = max(lateness) - lateness[silent]
    assert found == (silent, f"step {last} of {silent}", now[0] - last)


@pytest.mark.parametrize("timeout_s", [1.0, 60.0, 600.0])
def test_collectives_give_up_after_the_watchdog_which_can_name_the_missing_rank(timeout_s):
    """It looks at each beat, and the last beat of the missing rank may be one old."""
    beat = min(5.0, timeout_s / world.BEATS)
    assert timeout_s + 2 * beat < world.collective_timeout(timeout_s).total_seconds() <= 2 * timeout_s


def test_a_store_that_answers_now_and_then_keeps_the_watchdog():
    """It gives up after as many failures in a row as it has beats in the time of a rank that is lost."""
    for fails, n_reports in ((lambda beat: beat % 3, 4 * world.BEATS), (lambda beat: beat > 5, 5 + world.BEATS)):
        dog, reports = Watchdog.__new__(Watchdog), []
        left = iter([False] * 4 * world.BEATS)
        dog.timeout_s, dog.place, dog.stopped = (
            60.0,
            "here",
            SimpleNamespace(wait=lambda s, left=left: next(left, True)),
        )
        store = SimpleNamespace(set=lambda key, value, reports=reports: reports.append(value))
        dog.world = SimpleNamespace(rank=0, size=2, store=store)

        def find(reports=reports, fails=fails):
            if fails(len(reports)):
                raise RuntimeError("no store")

        dog.find_silent = find
        dog.run()
        assert len(reports) == n_reports


def test_stop_waits_for_a_report_that_is_under_way():
    store = SlowStore()
    watchdog = Watchdog(SimpleNamespace(rank=0, size=2, store=store), timeout_s=0.1)
    assert store.entered.wait(60)
    threading.Timer(0.3, store.leave.set).start()
    watchdog.stop()
    assert not watchdog.thread.is_alive()


def test_the_places_that_are_told_are_those_of_ranks_elsewhere():
    dog = Watchdog.__new__(Watchdog)
    dog.place = "step 7"
    dog.seen = {1: ("3 step 6", 0.0), 2: ("4 step 7", 0.0), 3: ("2 the start", 0.0)}
    assert dog.describe_places() == "rank 1 was last at step 6, rank 3 was last at the start; "
    dog.seen = {2: ("4 step 7", 0.0)}
    assert dog.describe_places() == ""


@pytest.mark.parametrize(("timeout_s", "seconds"), [(600.0, 5.0), (50.0, 5.0), (20.0, 2.0)])
def test_a_rank_reports_ten_times_within_the_timeout_and_every_five_seconds(timeout_s, seconds):
    waited = []
    watchdog = Watchdog.__new__(Watchdog)
    watchdog.timeout_s, watchdog.stopped = timeout_s, SimpleNamespace(wait=lambda s: waited.append(s) or True)
    watchdog.run()
    assert waited == [seconds]
