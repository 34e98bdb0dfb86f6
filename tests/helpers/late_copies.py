"""Copies between host and device as a GPU may make them: as late as what waits for them allows."""

from collections.abc import Iterable

import torch

Pair = tuple[torch.Tensor, torch.Tensor]  # target, source


class LateCopies:
    """Copies that are made when something waits for them, or for later ones of their lane. Until then sources live."""

    def __init__(self, pairs: list[Pair], before: "LateCopies | None") -> None:
        self.pairs, self.before = pairs, before

    def wait(self) -> None:
        """Make the copies, after those before them. Between tensors without storage nothing is copied."""
        before, self.before = self.before, None
        if before is not None:
            before.wait()
        pairs, self.pairs = self.pairs, []
        for target, source in pairs:
            if not target.is_meta and not source.is_meta:
                target.copy_(source)

    wait_on_host = wait_on_device = wait


class LateLane:
    """Stands for engine.training.host_updates.Lane."""

    def __init__(self) -> None:
        self.copies: list[LateCopies] = []

    def copy(self, pairs: Iterable[Pair]) -> LateCopies:
        """Note copies to be made after the lane's earlier ones."""
        self.copies.append(LateCopies(list(pairs), self.copies[-1] if self.copies else None))
        return self.copies[-1]

    def waiting(self) -> list[Pair]:
        """Return the copies that have not been made."""
        return [pair for copies in self.copies for pair in copies.pairs]
