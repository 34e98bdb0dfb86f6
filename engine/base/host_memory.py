"""Pinned memory of the host, which a GPU copies to and from while it computes.

torch rounds each allocation of pinned memory up to a power of two of bytes. So tensors do not get an allocation each:
they are pieces of a few large ones, the arenas.
"""

from pathlib import Path

import torch

ALIGN = 128  # bytes; every piece of an arena begins at a multiple
SLOTS = 3  # of device memory, through which offloaded optimizer states pass: see engine.training.offload
STATE_ARENA_BYTES = 1 << 30  # arenas of optimizer states that live in the host's memory
COPY_ARENA_BYTES = 1 << 28  # arenas of the copy of a training state that is being saved


class HostMemory:
    """Pieces of the host's memory, each in the first arena with enough free bytes.

    A pinned arena has arena_bytes, or the power of two that holds a larger piece. Memory that is not pinned needs no
    arenas: each piece is an allocation of its own size.
    """

    def __init__(self, pinned: bool, arena_bytes: int):
        self.pinned, self.arena_bytes = pinned, arena_bytes
        self.sizes: list[int] = []  # bytes of each arena
        self.taken: list[int] = []  # bytes of each arena that belong to a piece
        self.arenas: list[torch.Tensor] = []

    def place_piece(self, n_bytes: int) -> tuple[int, int]:
        """Return (arena, first byte) of a new piece. Nothing is allocated; self.sizes has the sizes of the arenas."""
        free = [size - taken for size, taken in zip(self.sizes, self.taken, strict=True)]
        arena = next((i for i, left in enumerate(free) if n_bytes <= left), len(free))
        if arena == len(free):
            self.sizes.append(max(self.arena_bytes, round_up_to_power_of_two(n_bytes)) if self.pinned else n_bytes)
            self.taken.append(0)
        first = self.taken[arena]
        self.taken[arena] += round_up(n_bytes)
        return arena, first

    def reserve_piece(self, n_bytes: int) -> torch.Tensor:
        """Return a new piece as an uninitialised uint8 tensor (n_bytes,). Raise RuntimeError when memory runs out."""
        arena, first = self.place_piece(n_bytes)
        if arena == len(self.arenas):
            self.arenas.append(torch.empty(self.sizes[arena], dtype=torch.uint8, pin_memory=self.pinned))
        return self.arenas[arena][first : first + n_bytes]


def read_free_bytes() -> int | None:
    """Return the bytes of the host's memory that a process may still take, or None where the system does not tell."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def round_up(n_bytes: int) -> int:
    """Return the least multiple of ALIGN that is n_bytes or more."""
    return -(-n_bytes // ALIGN) * ALIGN


def round_up_to_power_of_two(n: int) -> int:
    """Return the least power of two that is n or more, and 1 for 0."""
    return 1 << max(0, n - 1).bit_length()
