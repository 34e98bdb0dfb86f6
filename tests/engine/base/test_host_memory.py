"""Pieces of the host's memory, and the arenas they come from."""

import os
from itertools import pairwise

import pytest
import torch

from engine.base import host_memory
from engine.base.host_memory import ALIGN, HostMemory, read_free_bytes


@pytest.fixture
def pinned_sizes(monkeypatch):
    """Yield the sizes of the pinned allocations, which are made of ordinary memory: no GPU is needed."""
    real, sizes = torch.empty, []

    def empty(n, dtype, pin_memory):
        assert pin_memory
        sizes.append(n)
        return real(n, dtype=dtype)

    monkeypatch.setattr("engine.base.host_memory.torch.empty", empty)
    return sizes


def test_pinned_memory_is_taken_in_powers_of_two(pinned_sizes):
    memory = HostMemory(pinned=True, arena_bytes=1 << 20)
    pieces = [memory.reserve_piece(n) for n in (800_000, 160_000, 1_600_000, 72_000, 560_000, 0)]
    assert pinned_sizes == memory.sizes == [1 << 20, 1 << 21, 1 << 20]  # small pieces fill what is left of the first
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in pieces)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_pieces_begin_at_multiples_and_fill_an_arena_to_its_last_byte(pinned_sizes):
    memory = HostMemory(pinned=True, arena_bytes=1024)
    first, *_, last = [memory.reserve_piece(n) for n in (1, ALIGN, 3, 1024 - 3 * ALIGN)]
    assert (last.data_ptr() - first.data_ptr()) % ALIGN == 0 and pinned_sizes == [1024]
    memory.reserve_piece(1)
    assert pinned_sizes == [1024, 1024]


def test_the_size_is_known_before_anything_is_allocated(pinned_sizes):
    planned, taken = (HostMemory(pinned=True, arena_bytes=1 << 12) for _ in range(2))
    for n in (100, 5000, 300, 0, 4096, 1):
        planned.place_piece(n)
        taken.reserve_piece(n)
    assert planned.sizes == pinned_sizes and not planned.arenas


def test_memory_that_is_not_pinned_is_allocated_piece_by_piece():
    memory = HostMemory(pinned=False, arena_bytes=1 << 20)
    memory.reserve_piece(1000), memory.reserve_piece(10)
    assert memory.sizes == [1000, 10]


def test_what_is_free_is_part_of_the_machines_memory():
    free = read_free_bytes()
    assert free is None or 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("MemFree: 10 kB\nMemAvailable:   80 kB\nSwapFree: 5 kB\n", 80 << 10), ("MemFree: 1 kB\n", None), (None, None)],
    ids=["told", "not told", "no such file"],
)
def test_memory_that_the_system_would_give_up_for_a_process_is_free(text, n_bytes, tmp_path, monkeypatch):
    """As that of files which it keeps for a next reader; MemFree leaves those out."""
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(host_memory, "Path", lambda _: tmp_path / "meminfo")
    assert read_free_bytes() == n_bytes
