"""Ranks: who they are, what they agree on, and which rows of each parameter each holds.

The only file that imports torch.distributed. torchrun starts the ranks; alone, a World is one that has nobody to ask.

Each block is one FSDP2 group, embedding, norm and head another: its parameters are gathered for forward and, but for
the last block's and the other group's, again for backward, its gradients are summed in fp32 and scattered. With R
replicas the ranks stand in R rows of size / R: shards within a row, sums across rows; R = size is plain data
parallelism. A gradient is a sum over ranks, not a mean: each micro-batch's weights hold the share that it has in the
global batch.

A thread of each rank tells the store every few seconds that it lives, and ends the process when another rank has not
for --rank-timeout seconds: a rank that froze or died ends the run in bounded time, and is named. One that lives and is
stuck is found by the others' collectives, half as long again later; where each rank was last is told then.
"""

import contextlib
import datetime
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from engine.base.errors import CriaError, Elsewhere, UsageError

T = TypeVar("T")

BEATS, LOOK_S = 10, 0.05  # beats in a --rank-timeout; seconds between looks for the others
MAIN_FAILED = "main failed"
PATIENCE_S = 24 * 3600  # of ranks for the others' long work; the watch notices when one of them dies


class World:
    """This process among the ranks of its run. Alone (size 1), all calls are plain Python."""

    def __init__(self, rank=0, size=1, store=None, device=None, timeout_s=600.0):
        self.rank, self.size, self.replicas, self.store, self.device = rank, size, 1, store, device
        self.watch = Watch(self, timeout_s) if size > 1 else None
        self.mesh = self.saving = None
        if size > 1:
            self.timeout = patience(timeout_s)
            # Of a thread of its own: collectives of a group keep order.
            self.saving = dist.new_group(backend="gloo", timeout=self.timeout)
            self.meetings = self.firsts = 0

    def arrange_replicas(self, replicas: int) -> None:
        """Stands the ranks in rows of one replica's shards each; all call it, before anything is sharded."""
        self.replicas = replicas
        if self.size > 1:
            shape, names = (replicas, self.n_shards), ("replicas", "shards")
            whole = slice(None) if replicas > 1 else slice(1, None)
            self.mesh = init_device_mesh(self.device, shape[whole], mesh_dim_names=names[whole])
            for group in self.mesh.get_all_groups():
                _set_pg_timeout(self.timeout, group)  # else it is half an hour

    def note_place(self, place: str) -> None:
        """Where this rank is, for whoever has to tell that it went missing there."""
        if self.watch:
            self.watch.note_place(place)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def n_shards(self) -> int:
        """Into how many a parameter is cut."""
        return self.size // self.replicas

    @property
    def writes_checkpoint(self) -> bool:
        """Whether this rank's shards are those that a checkpoint holds: one replica writes."""
        return self.rank < self.n_shards

    # ---- what ranks agree on ----------------------------------------------------------------------------------------

    def wait_for_all(self):
        """Waits for all ranks, however long their work takes. By looking, not in the store's own wait or a collective:
        those end at --rank-timeout, hold the watch up and handle no signal."""
        if self.size > 1:
            self.meetings += 1
            key, end = f"meet/{self.meetings}", time.monotonic() + PATIENCE_S
            self.store.add(key, 1)
            while self.store.add(key, 0) < self.size:
                if time.monotonic() > end:
                    raise CriaError(f"rank {self.rank}: the others are not there after {PATIENCE_S} s")
                time.sleep(LOOK_S)

    def on_all_ranks(self, work):
        """work() on every rank. Where it fails on some, all fail with the first one's exit code; that one tells why."""
        if self.size == 1:
            return work()
        failure = result = None
        try:
            result = work()
        except (CriaError, OSError) as error:
            failure = error
            if self.is_main:
                self.store.set(MAIN_FAILED, "")
        self.wait_for_all()
        codes = self.gather(getattr(failure, "exit_code", 1) if failure else None)
        failed = [rank for rank, code in enumerate(codes) if code is not None]
        if failed:
            raise failure if self.rank == failed[0] else Elsewhere(failed[0], codes[failed[0]])
        return result

    def on_main(self, work: Callable[[], T]) -> T:
        """Run work() on rank 0 while the others wait, and return its value on every rank.

        Where it fails, every rank fails with its exit code and rank 0 tells why.
        """
        return self.broadcast(self.on_all_ranks(lambda: work() if self.is_main else None))

    def on_main_first(self, work):
        """work() on rank 0, then on the others, which find what it cached. Within together(): where rank 0 has failed
        before it came here, so do they."""
        if self.size == 1:
            return work()
        self.firsts += 1
        key = f"first/{self.firsts}"
        while not self.is_main and not self.store.check([key]):
            if self.store.check([MAIN_FAILED]):
                raise Elsewhere(0, 1)
            time.sleep(LOOK_S)
        try:
            return work()
        finally:
            if self.is_main:
                self.store.set(key, "done")

    def gather(self, value, group=None) -> list:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value, group=group)
        return found

    def gather_beside_training(self, value) -> list:
        """gather() for the thread that writes states."""
        return self.gather(value, self.saving)

    def broadcast(self, value):
        """Rank 0's value, however long it takes to find."""
        self.wait_for_all()
        return self.gather(value if self.is_main else None)[0]

    def min_over_ranks(self, value):
        return min(self.gather(value))

    def any_rank(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def sum_over_ranks(self, t: torch.Tensor) -> torch.Tensor:
        """Over all ranks, in place; the host does not wait for a GPU."""
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def error_on_all_ranks(self, error: CriaError) -> CriaError:
        """What to raise for an error that all ranks make: the first one tells it."""
        return error if self.is_main else Elsewhere(0, error.exit_code)


# ---- start and end --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def start_ranks(device: str, timeout_s: float):
    """The World that torchrun's environment describes. Raises UsageError for one that cannot be."""
    if number("WORLD_SIZE", 1) == 1:
        yield World()
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = number("LOCAL_RANK")
    if cuda:
        if local >= torch.cuda.device_count():
            n = torch.cuda.device_count()
            raise UsageError(f"LOCAL_RANK is {local}, this machine has {n} GPUs; start as many ranks a machine")
        torch.cuda.set_device(local)
    timeout = patience(timeout_s)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(name_of_start(store, rank, size, timeout_s), store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    world = World(rank, size, dist.PrefixStore("cria", store), "cuda" if cuda else "cpu", timeout_s)
    try:
        yield world
    except RuntimeError as error:
        text, waited = cause_of(error)
        raise CriaError(f"rank {rank} of {size}: {world.watch.blame() if waited else ''}{text}") from error
    finally:
        world.watch.stop()
    dist.destroy_process_group()


def name_of_start(store, rank, size, timeout_s) -> str:
    """What this start of the ranks is called by all of them. torchrun keeps one store over restarts, which it counts on
    each machine by itself: whatever rank left there may be gone. So each shows a mark that is new, and the first rank
    answers to marks until every rank has heard it."""
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


def patience(timeout_s: float) -> datetime.timedelta:
    """Of collectives: longer than the watch's, which knows who is missing."""
    return datetime.timedelta(seconds=1.5 * timeout_s)


def number(name, default=None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise UsageError(f"{name} is {text!r}, wanted a number: start several ranks by torchrun") from None


def cause_of(error) -> tuple[str, bool]:
    """(in a line; of a connection that broke, what that means; whether it came of waiting for another rank)."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if gone := re.search(r"Connection (reset|closed) by peer|Broken pipe|Socket closed", text):
        return f"another rank ended ({gone[0]}); torchrun tells which", True
    return f"{type(error).__name__}: {text}", bool(re.search(r"[Tt]imed? ?out", text))


class Watch:
    """Tells the store that this rank lives and how far it is, and looks whether the others do."""

    def __init__(self, world: World, timeout_s: float):
        self.world, self.timeout_s, self.done = world, timeout_s, threading.Event()
        self.place = "the start"
        self.thread = threading.Thread(target=self.look, name="watch", daemon=True)
        self.seen = {}  # rank -> (what it told last, when that was new here)
        self.thread.start()

    def note_place(self, place: str) -> None:
        """Where this rank is: told by whoever finds that it is there no more."""
        self.place = place

    def stop(self):
        self.done.set()

    def look(self):
        beat = failures = 0
        while failures < BEATS and not self.done.wait(min(5.0, self.timeout_s / BEATS)):
            beat += 1
            try:
                self.world.store.set(f"beat/{self.world.rank}", f"{beat} {self.place}")
                late, failures = self.late(), 0
            except (RuntimeError, ValueError):  # if the store is gone, so is the run: torchrun ends what is left
                late, failures = None, failures + 1
            if late is not None and not self.done.is_set():
                rank, place, seconds = late
                who = f"rank {rank} has not been heard of for {seconds:.0f} s, last at {place}"
                told = f"error: rank {self.world.rank}: {who}; the run ends here and can be resumed"
                print(told, file=sys.stderr, flush=True)
                os._exit(1)

    def late(self):
        """(rank, where it was, seconds) of the rank that has been silent for too long, or None."""
        now, longest = time.monotonic(), None
        for rank in range(self.world.size):
            if rank == self.world.rank:
                continue
            key = f"beat/{rank}"
            told = self.world.store.get(key).decode() if self.world.store.check([key]) else "0 the start"
            if self.seen.get(rank, (None, 0))[0] != told:
                self.seen[rank] = told, now
            silent = now - self.seen[rank][1]
            if silent > self.timeout_s and (longest is None or silent > longest[2]):
                longest = rank, told.partition(" ")[2], silent
        return longest

    def blame(self) -> str:
        """Who was elsewhere, by what ranks told last, which is some seconds old."""
        with contextlib.suppress(RuntimeError, ValueError):
            places = {rank: told.partition(" ")[2] for rank, (told, _) in self.seen.items()}
            behind = {rank: place for rank, place in places.items() if place != self.place}
            if behind:
                return ", ".join(f"rank {rank} was last at {place}" for rank, place in behind.items()) + "; "
        return ""
