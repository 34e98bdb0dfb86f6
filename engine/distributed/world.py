"""Ranks: which one this process is, what all agree on, and what happens when one of them is lost.

torchrun starts the ranks. Each block is one FSDP2 group; embedding, norm and head are another. A group's parameters are
gathered for forward and, but for the last block's and the other group's, again for backward; its gradients are summed
in fp32 and scattered.

With R replicas the ranks stand in R rows of size / R: shards within a row, sums across rows; R = size is plain data
parallelism. A gradient is a sum over ranks, not a mean: the weights of each micro-batch hold its share of the global
batch.

A thread of each rank tells the store every few seconds that the rank lives. It ends the process when another rank has
not done so for --rank-timeout seconds: a rank that froze or died ends the run in bounded time, and is named. A rank
that lives and is stuck is found by the others' collectives, half as long again later; the error names where each rank
was.
"""

import contextlib
import datetime
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from engine.base.errors import CriaError, OtherRankFailed, UsageError

T = TypeVar("T")

BEATS = 10  # signs of life in a --rank-timeout
LOOK_S = 0.05  # between two looks for the others
MAIN_FAILED = "main failed"  # a key of the store
PATIENCE_S = 24 * 3600  # with the others' long work; the watch notices when one of them dies


class World:
    """This process among the ranks of its run. Alone (size 1) it asks nobody, and every method is plain Python."""

    def __init__(
        self, rank: int = 0, size: int = 1, store: Any = None, device: str | None = None, timeout_s: float = 600.0
    ):
        self.rank, self.size, self.replicas, self.store, self.device = rank, size, 1, store, device
        self.watch = Watch(self, timeout_s) if size > 1 else None
        self.mesh: DeviceMesh | None = None
        self.saving_group: Any = None
        self.timeout = collective_timeout(timeout_s)
        self.n_waits = self.n_firsts = 0  # names of keys in the store, equal on all ranks
        if size > 1:
            # The thread that writes states has a group of its own: the collectives of a group keep their order.
            self.saving_group = dist.new_group(backend="gloo", timeout=self.timeout)

    def arrange_replicas(self, replicas: int) -> None:
        """Arrange the ranks in rows that hold one replica's shards each. All ranks call it before sharding anything."""
        self.replicas = replicas
        if self.size > 1:
            shape: tuple[int, ...] = (replicas, self.n_shards)
            names: tuple[str, ...] = ("replicas", "shards")
            if replicas == 1:
                shape, names = shape[1:], names[1:]
            self.mesh = init_device_mesh(str(self.device), shape, mesh_dim_names=names)
            for group in self.mesh.get_all_groups():
                _set_pg_timeout(self.timeout, group)  # else it is half an hour

    def note_place(self, place: str) -> None:
        """Note where this rank is, for the others' error if it is lost there."""
        if self.watch:
            self.watch.place = place

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def n_shards(self) -> int:
        """Return the number of shards that a parameter is cut into."""
        return self.size // self.replicas

    @property
    def writes_checkpoint(self) -> bool:
        """Return whether this rank writes its shards into a checkpoint: those of one replica do."""
        return self.rank < self.n_shards

    # ---- run work ---------------------------------------------------------------------------------------------------

    def on_main(self, work: Callable[[], T]) -> T:
        """Run work() on rank 0 while the others wait, and return its value on every rank.

        Where it fails, every rank fails with its exit code and rank 0 tells why.
        """
        result: Any = self.on_all_ranks(lambda: work() if self.is_main else None)
        return self.broadcast(result)

    def on_all_ranks(self, work: Callable[[], T]) -> T:
        """Run work() on every rank.

        Where it fails on some, all fail with the first one's exit code; that one tells why.
        """
        if self.size == 1:
            return work()
        failure: Any = None
        result: Any = None
        try:
            result = work()
        except (CriaError, OSError) as error:
            failure = error
            if self.is_main:
                self.store.set(MAIN_FAILED, "")
        self.wait_for_all()
        codes: list[Any] = self.gather(getattr(failure, "exit_code", 1) if failure else None)
        failed = [rank for rank, code in enumerate(codes) if code is not None]
        if failed:
            raise failure if self.rank == failed[0] else OtherRankFailed(failed[0], codes[failed[0]])
        return result

    def on_main_first(self, work: Callable[[], T]) -> T:
        """Run work() on rank 0, then on the others, which find what rank 0 cached.

        Call it within on_all_ranks(): where rank 0 fails before it comes here, so do the others.
        """
        if self.size == 1:
            return work()
        self.n_firsts += 1
        key = f"first/{self.n_firsts}"
        while not self.is_main and not self.store.check([key]):
            if self.store.check([MAIN_FAILED]):
                raise OtherRankFailed(0, 1)
            time.sleep(LOOK_S)
        try:
            return work()
        finally:
            if self.is_main:
                self.store.set(key, "done")

    def wait_for_all(self) -> None:
        """Wait until every rank has called this, however long its work takes.

        The rank looks again and again. The store's own wait and a collective would end at --rank-timeout, hold up the
        watch and handle no signal.
        """
        if self.size > 1:
            self.n_waits += 1
            key, end = f"meet/{self.n_waits}", time.monotonic() + PATIENCE_S
            self.store.add(key, 1)
            while self.store.add(key, 0) < self.size:
                if time.monotonic() > end:
                    raise CriaError(f"rank {self.rank}: the others are not there after {PATIENCE_S} s")
                time.sleep(LOOK_S)

    # ---- exchange values --------------------------------------------------------------------------------------------

    def gather(self, value: T, group: Any = None) -> list[T]:
        """Return the values of all ranks in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=group)
        return found

    def gather_beside_training(self, value: T) -> list[T]:
        """Return the values of all ranks. The thread that writes states calls this instead of gather()."""
        return self.gather(value, self.saving_group)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank, however long rank 0 takes to find it."""
        self.wait_for_all()
        found: list[Any] = self.gather(value if self.is_main else None)
        return found[0]

    def min_over_ranks(self, value: int) -> int:
        """Return the least value of all ranks."""
        return min(self.gather(value))

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on some rank."""
        return any(self.gather(flag))

    def sum_over_ranks(self, t: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place, and return it. The host does not wait for a GPU."""
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def error_on_all_ranks(self, error: CriaError) -> CriaError:
        """Return the exception for an error that all ranks hit: rank 0 prints it, the others exit with its code."""
        return error if self.is_main else OtherRankFailed(0, error.exit_code)


# ---- start and end --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def start_ranks(device: str, timeout_s: float) -> Iterator[World]:
    """Yield the World that torchrun's environment describes. Raises UsageError for one that cannot be."""
    if read_number("WORLD_SIZE", 1) == 1:
        yield World()
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = read_number("LOCAL_RANK")
    if cuda:
        if local >= torch.cuda.device_count():
            n = torch.cuda.device_count()
            raise UsageError(f"LOCAL_RANK is {local}, this machine has {n} GPUs; start as many ranks a machine")
        torch.cuda.set_device(local)
    timeout = collective_timeout(timeout_s)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(agree_on_name(store, rank, size, timeout_s), store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    world = World(rank, size, dist.PrefixStore("cria", store), "cuda" if cuda else "cpu", timeout_s)
    assert world.watch is not None
    try:
        yield world
    except RuntimeError as error:
        text, waited = explain_collective_error(error)
        behind = world.watch.describe_places() if waited else ""
        raise CriaError(f"rank {rank} of {size}: {behind}{text}") from error
    finally:
        world.watch.stop()
    dist.destroy_process_group()


def agree_on_name(store: Any, rank: int, size: int, timeout_s: float) -> str:
    """Return a name for this start of the ranks, new and equal on all of them.

    torchrun keeps one store over restarts, which it counts on each machine by itself: a value in the store may come
    from a rank that is gone. So each rank sets a new mark, and rank 0 answers marks until every rank has heard the
    name.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + timeout_s
    store.set(f"mark/{rank}", mine)
    if rank:
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/{rank}", "heard")
        return name
    silent = set(range(1, size))
    while silent:
        if time.monotonic() > end:
            raise CriaError(f"ranks {', '.join(map(str, sorted(silent)))} did not start in {timeout_s:.0f} s")
        for other in [other for other in silent if store.check([f"mark/{other}"])]:
            store.set(f"answer/{store.get(f'mark/{other}').decode()}", mine)
        silent -= {other for other in silent if store.check([f"{mine}/{other}"])}
        time.sleep(0.05)
    return mine


def collective_timeout(timeout_s: float) -> datetime.timedelta:
    """Return the time limit of collectives. It is longer than the watch's, which knows who is missing."""
    return datetime.timedelta(seconds=1.5 * timeout_s)


def read_number(name: str, default: int | None = None) -> int:
    """Return an environment variable that is a number. Raises UsageError."""
    text: Any = os.environ.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise UsageError(f"{name} is {text!r}, wanted a number: start several ranks by torchrun") from None


def explain_collective_error(error: RuntimeError) -> tuple[str, bool]:
    """Return (the error in a line, whether it came of waiting for another rank).

    A broken connection is explained by what it means: another rank ended.
    """
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if gone := re.search(r"Connection (reset|closed) by peer|Broken pipe|Socket closed", text):
        return f"another rank ended ({gone[0]}); torchrun tells which", True
    return f"{type(error).__name__}: {text}", bool(re.search(r"[Tt]imed? ?out", text))


class Watch:
    """A thread that tells the store that this rank lives and where it is, and looks whether the others live."""

    def __init__(self, world: World, timeout_s: float):
        self.world, self.timeout_s, self.stopped = world, timeout_s, threading.Event()
        self.place = "the start"
        self.seen: dict[int, tuple[str, float]] = {}  # rank -> (its last message, when that was new here)
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread."""
        self.stopped.set()

    def run(self) -> None:
        """Send a sign of life at each beat and look for the others', until one is missing, which ends the process."""
        beat = failures = 0
        while failures < BEATS and not self.stopped.wait(min(5.0, self.timeout_s / BEATS)):
            beat += 1
            try:
                self.world.store.set(f"beat/{self.world.rank}", f"{beat} {self.place}")
                silent, failures = self.find_silent(), 0
            except (RuntimeError, ValueError):  # if the store is gone, so is the run: torchrun ends what is left
                silent, failures = None, failures + 1
            if silent is not None and not self.stopped.is_set():
                rank, place, seconds = silent
                who = f"rank {rank} has not been heard of for {seconds:.0f} s, last at {place}"
                text = f"error: rank {self.world.rank}: {who}; the run ends here and can be resumed"
                print(text, file=sys.stderr, flush=True)
                os._exit(1)

    def find_silent(self) -> tuple[int, str, float] | None:
        """Return (rank, its last place, seconds) of the rank that has been silent longest, None if none is late."""
        now, longest = time.monotonic(), None
        for rank in range(self.world.size):
            if rank == self.world.rank:
                continue
            key = f"beat/{rank}"
            message = self.world.store.get(key).decode() if self.world.store.check([key]) else "0 the start"
            if rank not in self.seen or self.seen[rank][0] != message:
                self.seen[rank] = message, now
            silent_s = now - self.seen[rank][1]
            if silent_s > self.timeout_s and (longest is None or silent_s > longest[2]):
                longest = rank, message.partition(" ")[2], silent_s
        return longest

    def describe_places(self) -> str:
        """Return which ranks were elsewhere, by their last messages, which are some seconds old."""
        places = {rank: message.partition(" ")[2] for rank, (message, _) in dict(self.seen).items()}
        behind = [f"rank {rank} was last at {place}" for rank, place in places.items() if place != self.place]
        return ", ".join(behind) + "; " if behind else ""
