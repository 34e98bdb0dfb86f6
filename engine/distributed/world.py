"""The ranks of a run: which one this process is, how they exchange values, and what happens when one is lost.

torchrun starts the ranks. Each block of the model is one FSDP2 group; embedding, norm and head together are another. A
group's parameters are gathered for forward and again for backward. Those of the last block and of the embedding's group
are gathered once, because backward begins with them. A group's gradients are summed in fp32 and scattered.

With R replicas the mesh is R rows of size / R ranks. The ranks of a row hold the shards of one replica; gradients are
summed across rows. R = size is plain data parallelism. A gradient is a sum over ranks, not a mean, because the weights
of a micro-batch's losses already divide by the loss tokens of the global batch.

Each rank has a watchdog thread, which reports to the store every few seconds that the rank is alive. When another rank
has not reported for --rank-timeout seconds, the watchdog names it and ends this process. So a rank that froze or died
ends the run in bounded time. A rank that is alive but stuck is noticed when the others' collectives time out, after 1.5
times --rank-timeout; the error says where each rank was.
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

BEATS = 10  # reports of a watchdog within --rank-timeout
POLL_SECONDS = 0.05  # between two looks into the store
MAIN_FAILED = "main failed"  # a key of the store
WAIT_SECONDS = 24 * 3600  # how long a rank waits for others that work; if one dies, the watchdog notices sooner


class World:
    """This process among the ranks of its run. With one rank (size 1), no method communicates."""

    def __init__(
        self, rank: int = 0, size: int = 1, store: Any = None, device: str | None = None, timeout_s: float = 600.0
    ):
        self.rank, self.size, self.replicas, self.store, self.device = rank, size, 1, store, device
        self.watchdog = Watchdog(self, timeout_s) if size > 1 else None
        self.mesh: DeviceMesh | None = None
        self.saving_group: Any = None
        self.timeout = collective_timeout(timeout_s)
        self.n_waits = self.n_firsts = 0  # calls so far, which number the keys in the store; equal on all ranks
        if size > 1:
            # For the thread that saves training states. The collectives of one group must come in one order on all
            # ranks, so two threads cannot share a group.
            self.saving_group = dist.new_group(backend="gloo", timeout=self.timeout)

    def arrange_replicas(self, replicas: int) -> None:
        """Make the mesh of replicas and shards. All ranks call this before anything is sharded."""
        self.replicas = replicas
        if self.size > 1:
            shape: tuple[int, ...] = (replicas, self.n_shards)
            names: tuple[str, ...] = ("replicas", "shards")
            if replicas == 1:
                shape, names = shape[1:], names[1:]
            self.mesh = init_device_mesh(str(self.device), shape, mesh_dim_names=names)
            for group in self.mesh.get_all_groups():
                _set_pg_timeout(self.timeout, group)  # its default is half an hour

    def note_place(self, place: str) -> None:
        """Note what this rank is doing ("step 7"), for the error of the others if it is lost there."""
        if self.watchdog:
            self.watchdog.place = place

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def n_shards(self) -> int:
        """Return the number of shards of a parameter."""
        return self.size // self.replicas

    @property
    def writes_checkpoint(self) -> bool:
        """Return whether this rank writes its shards into a checkpoint. Only the ranks of the first replica do."""
        return self.rank < self.n_shards

    # ---- run work ---------------------------------------------------------------------------------------------------

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Run work() on rank 0 while the others wait, and return its value on every rank.

        If work() fails, every rank fails with the same exit code, and rank 0 prints the reason.
        """
        result: Any = self.run_on_all_ranks(lambda: work() if self.is_main else None)
        return self.broadcast(result)

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        """Run work() on every rank.

        If it fails on some ranks, all fail with the exit code of the first of these, which prints the reason.
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

    def run_on_main_first(self, work: Callable[[], T]) -> T:
        """Run work() on rank 0, and then on the others, which can use what rank 0 put into a cache.

        Call it within run_on_all_ranks(), which tells the others here when rank 0 has failed before this call.
        """
        if self.size == 1:
            return work()
        self.n_firsts += 1
        key = f"first/{self.n_firsts}"
        while not self.is_main and not self.store.check([key]):
            if self.store.check([MAIN_FAILED]):
                raise OtherRankFailed(0, 1)
            time.sleep(POLL_SECONDS)
        try:
            return work()
        finally:
            if self.is_main:
                self.store.set(key, "done")

    def wait_for_all(self) -> None:
        """Wait until every rank has called this, however long its work takes.

        The rank polls the store. A collective, like the store's own wait(), would give up at --rank-timeout and let no
        signal be handled; that wait() would also block the watchdog.
        """
        if self.size > 1:
            self.n_waits += 1
            key, end = f"meet/{self.n_waits}", time.monotonic() + WAIT_SECONDS
            self.store.add(key, 1)
            while self.store.add(key, 0) < self.size:
                if time.monotonic() > end:
                    raise CriaError(f"rank {self.rank}: the others are not there after {WAIT_SECONDS} s")
                time.sleep(POLL_SECONDS)

    # ---- exchange values --------------------------------------------------------------------------------------------

    def gather(self, value: T, group: Any = None) -> list[T]:
        """Return the values of all ranks in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=group)
        return found

    def gather_beside_training(self, value: T) -> list[T]:
        """Return the values of all ranks. For the thread that saves training states."""
        return self.gather(value, self.saving_group)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank, however long rank 0 takes to find it."""
        self.wait_for_all()
        found: list[Any] = self.gather(value if self.is_main else None)
        return found[0]

    def min_over_ranks(self, value: int) -> int:
        """Return the smallest value of all ranks."""
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
        """Return what to raise for an error that all ranks hit: rank 0 prints it, the others exit with its code."""
        return error if self.is_main else OtherRankFailed(0, error.exit_code)


# ---- start and end --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def start_ranks(device: str, timeout_s: float) -> Iterator[World]:
    """Yield the World that torchrun's environment describes. Raise UsageError when it is wrong."""
    if read_environment_number("WORLD_SIZE", 1) == 1:
        yield World()
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = read_environment_number("LOCAL_RANK")
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
    assert world.watchdog is not None
    try:
        yield world
    except RuntimeError as error:
        text, waited = explain_collective_error(error)
        behind = world.watchdog.describe_places() if waited else ""
        raise CriaError(f"rank {rank} of {size}: {behind}{text}") from error
    finally:
        world.watchdog.stop()
    dist.destroy_process_group()


def agree_on_name(store: Any, rank: int, size: int, timeout_s: float) -> str:
    """Return a name for this start of the ranks, new and equal on all of them.

    torchrun keeps one store over restarts, and counts restarts on each machine separately. So a value in the store may
    be left from an earlier start. Therefore each rank sets a new random mark, and rank 0 answers marks with the name
    until every rank has confirmed it.
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
    """Return the time limit of collectives. It is longer than the watchdog's, which can name the missing rank."""
    return datetime.timedelta(seconds=1.5 * timeout_s)


def read_environment_number(name: str, default: int | None = None) -> int:
    """Return an environment variable as a whole number. Raise UsageError when it is none."""
    text: Any = os.environ.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise UsageError(f"{name} is {text!r}, wanted a number: start several ranks by torchrun") from None


def explain_collective_error(error: RuntimeError) -> tuple[str, bool]:
    """Return (the error in a line, whether its cause is another rank that is late or has ended).

    A broken connection means that another rank has ended, and is explained so.
    """
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if gone := re.search(r"Connection (reset|closed) by peer|Broken pipe|Socket closed", text):
        return f"another rank ended ({gone[0]}); torchrun tells which", True
    return f"{type(error).__name__}: {text}", bool(re.search(r"[Tt]imed? ?out", text))


STOP_S = 10  # seconds for a report that is under way


class Watchdog:
    """A thread that reports to the store that this rank is alive and what it is doing, and checks on the others."""

    def __init__(self, world: World, timeout_s: float):
        self.world, self.timeout_s, self.stopped = world, timeout_s, threading.Event()
        self.place = "the start"
        self.seen: dict[int, tuple[str, float]] = {}  # rank -> (its last message, when this rank first saw it)
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread, and wait until it has: one that is still in the store's C++ code when Python ends aborts the
        process. Where the store answers no more, the wait ends too.
        """
        self.stopped.set()
        self.thread.join(STOP_S)

    def run(self) -> None:
        """Report at each beat and check on the others. End the process when one of them is silent for too long."""
        beat = failures = 0
        while failures < BEATS and not self.stopped.wait(min(5.0, self.timeout_s / BEATS)):
            beat += 1
            try:
                self.world.store.set(f"beat/{self.world.rank}", f"{beat} {self.place}")
                silent, failures = self.find_silent(), 0
            except (RuntimeError, ValueError):  # without a store there is no run: torchrun ends the ranks that are left
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
        """Return which ranks were doing something else, by their last reports, which may be seconds old."""
        places = {rank: message.partition(" ")[2] for rank, (message, _) in dict(self.seen).items()}
        behind = [f"rank {rank} was last at {place}" for rank, place in places.items() if place != self.place]
        return ", ".join(behind) + "; " if behind else ""
