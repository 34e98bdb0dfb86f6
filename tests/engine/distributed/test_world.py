"""What ranks exchange and how they fail together: each rank is a thread here, and a list stands for the collective."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from engine.base.errors import CriaError, OtherRankFailed, UsageError
from engine.distributed import world
from engine.distributed.world import MAIN_FAILED, World, start_ranks


class Rank(World):
    """A rank whose gather is that of threads."""

    def __init__(self, rank, size, store, barrier, values):
        super().__init__(rank)
        self.size, self.store, self.barrier, self.values = size, store, barrier, values

    def gather(self, value, group=None):
        self.values[self.rank] = value
        self.barrier.wait(60)
        found = list(self.values)
        self.barrier.wait(60)
        return found


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A rank that waits in vain fails its test in a minute, not in the day that a run may wait."""
    monkeypatch.setattr(world, "WAIT_SECONDS", 60)


def on_ranks(n, work):
    """Return what work(world) returned or raised on each of n ranks."""
    shared = HashStore(), threading.Barrier(n), [None] * n

    def call(rank):
        try:
            return work(Rank(rank, n, *shared))
        except Exception as error:
            return error

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(call, range(n)))


@pytest.mark.parametrize("values", [(5, 2, 9), (2, 5, 9), (9, 5, 2)])
def test_every_rank_gets_the_smallest_value(values):
    assert on_ranks(3, lambda world: world.min_over_ranks(values[world.rank])) == [2, 2, 2]


@pytest.mark.parametrize("flags", [(False, False, False), (False, True, False), (True, True, True)])
def test_every_rank_knows_of_a_flag(flags):
    assert on_ranks(3, lambda world: world.any_rank(flags[world.rank])) == [any(flags)] * 3


def test_rank_0_gives_its_value_and_works_first():
    order = []
    assert on_ranks(3, lambda world: world.broadcast(f"of {world.rank}")) == ["of 0"] * 3
    assert on_ranks(3, lambda world: world.run_on_main(lambda: order.append(world.rank) or "done")) == ["done"] * 3
    assert order == [0]
    on_ranks(3, lambda world: world.run_on_main_first(lambda: order.append(world.rank)))
    assert order[1] == 0 and sorted(order[1:]) == [0, 1, 2]
    order.clear()

    def work_twice(world):
        world.run_on_main_first(lambda: None)
        world.run_on_main_first(lambda: (world.is_main and time.sleep(0.1), order.append(world.rank)))

    on_ranks(3, work_twice)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("x"), UsageError.exit_code), (CriaError("x"), CriaError.exit_code), (OSError("x"), 1)],
)
@pytest.mark.parametrize("failing", [(0,), (1,), (1, 2)])
def test_a_failure_of_some_ranks_ends_all_with_the_code_of_the_first(error, code, failing):
    def work(world):
        def fail():
            if world.rank in failing:
                raise error
            return world.rank

        return world.run_on_all_ranks(fail)

    for rank, found in enumerate(on_ranks(3, work)):
        if rank == failing[0]:
            assert found is error
        else:
            assert isinstance(found, OtherRankFailed) and found.exit_code == code
            assert str(found) == str(OtherRankFailed(failing[0], code))


@pytest.mark.parametrize("failing", [0, 1])
def test_ranks_that_wait_for_rank_0_can_see_that_it_failed(failing):
    def work(world):
        def fail():
            if world.rank == failing:
                raise OSError("x")

        with pytest.raises((OSError, OtherRankFailed)):
            world.run_on_all_ranks(fail)
        return world.store.check([MAIN_FAILED])

    assert on_ranks(2, work) == [failing == 0] * 2


@pytest.mark.parametrize(
    ("replicas", "shape", "names"),
    [(1, (4,), ("shards",)), (2, (2, 2), ("replicas", "shards")), (4, (4, 1), ("replicas", "shards"))],
)
def test_the_mesh_has_a_row_a_replica_and_the_time_limit_in_each_of_its_groups(replicas, shape, names, monkeypatch):
    """torch gives the groups of a mesh half an hour."""
    limits, groups = {}, [f"group of {name}" for name in names]

    def make_mesh(device, shape, mesh_dim_names):
        return SimpleNamespace(made=(device, shape, mesh_dim_names), get_all_groups=lambda: groups)

    monkeypatch.setattr(world, "init_device_mesh", make_mesh)
    monkeypatch.setattr(world, "_set_pg_timeout", lambda timeout, group: limits.update({group: timeout}))
    one = World(timeout_s=20.0, device="cpu")
    one.size = 4
    one.arrange_replicas(replicas)
    assert one.mesh.made == ("cpu", shape, names) and one.n_shards == 4 // replicas
    assert limits == dict.fromkeys(groups, world.collective_timeout(20.0))


def test_what_is_gathered_beside_training_has_a_group_and_a_limit_of_its_own(monkeypatch):
    """Two threads in one group would take each other's values; and a watchdog names the rank that is late first."""
    monkeypatch.setattr(World, "gather", lambda self, value, group=None: [value, group])
    one = World()
    one.saving_group = "of the saver"
    assert one.gather_beside_training(5) == [5, "of the saver"] and one.gather(5) == [5, None]
    assert world.collective_timeout(20.0).total_seconds() == 30


def test_a_watchdog_that_is_stopped_has_ended():
    """One that is still in the store when Python ends would abort the process."""
    in_store = threading.Event()

    def set_slowly(key, value):
        in_store.set()
        threading.Event().wait(0.1)

    store = SimpleNamespace(set=set_slowly, check=lambda keys: False)
    dog = world.Watchdog(SimpleNamespace(store=store, rank=0, size=1), timeout_s=0.01)
    assert in_store.wait(60)
    dog.stop()
    assert not dog.thread.is_alive()


@pytest.mark.parametrize(("local", "is_taken"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_rank_has_a_gpu_of_its_own_or_is_refused(local, is_taken, monkeypatch):
    """Before it waits for the others, who would wait for it."""
    for name, value in {"WORLD_SIZE": 4, "RANK": local, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, str(value))

    def meet(*_, **__):
        raise ConnectionError("nobody is there")

    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "rendezvous", meet)
    refused = UsageError, f"LOCAL_RANK is {local}, this machine has 2 GPUs"
    error, text = (ConnectionError, "nobody is there") if is_taken else refused
    with pytest.raises(error, match=text), start_ranks("cuda", 1.0):
        pass
    assert taken == ([local] if is_taken else [])


def test_one_rank_works_without_a_store():
    alone = World()
    assert alone.run_on_all_ranks(lambda: 5) == alone.run_on_main(lambda: 5) == alone.run_on_main_first(lambda: 5) == 5


def test_a_failure_of_rank_0_is_printed_by_it_alone():
    error = UsageError("x")
    first, second = on_ranks(2, lambda world: world.error_on_all_ranks(error))
    assert first is error and isinstance(second, OtherRankFailed) and second.exit_code == UsageError.exit_code


def test_the_first_replica_writes_checkpoints():
    def work(world):
        world.replicas = 2
        return world.n_shards, world.writes_checkpoint, world.is_main

    assert on_ranks(6, work) == [(3, rank < 3, rank == 0) for rank in range(6)]


class OfTwoStarts(dict):
    """A store in which rank 1's mark of an earlier start lies, until rank 1 of this start sets its own."""

    def __init__(self):
        self.looks = 0
        self["mark/1"] = b"old"

    def set(self, key, value):
        self[key] = value.encode()
        if key == "answer/new":  # rank 1 hears it, and says so
            self[f"{value}/1"] = b"heard"

    def check(self, keys):
        self.looks += 1
        if self.looks == 4:
            self["mark/1"] = b"new"
        return all(key in self for key in keys)

    def get(self, key):
        return self[key]


def test_rank_0_waits_for_those_of_this_start_though_marks_of_an_earlier_one_are_there():
    store = OfTwoStarts()
    name = world.agree_on_name(store, 0, 2, 60.0)
    assert store["answer/old"] == store["answer/new"] == name.encode() and store[f"{name}/1"] == b"heard"
