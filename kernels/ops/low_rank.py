"""Low-rank updates of a frozen weight (LoRA), inside the ops that multiply by the weight.

    y = h W^T,   y[:, rows_i] += scale_i (drop(h) A_i^T) B_i^T        for each part i of W's rows that has an update

A weight of ours may merge the rows of several maps, as wqkv does, each of which has an update of its own. Their A lie
one below the other, so u = drop(h) A^T (T, R) is one GEMM; each B then adds to its own columns of y. With du = [scale_i
dy_i B_i]:

    dh += drop(du A)        dA = du^T drop(h)        dB_i = scale_i dy_i^T u_i

Saved for backward: u, R numbers a token (48 for wqkv at rank 16, beside 4,096 of h in a 7B). W itself gets no gradient.
Bound by memory: each B reads and writes its columns of y once more, 4 bytes an element in bf16.
Source: arXiv:2106.09685.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.native.weight_gradient import write_weight_gradient
from kernels.ops.common import is_by_amx, weight_gradient


@dataclass(frozen=True)
class LowRank:
    """Updates of parts of a weight's rows. N rows, D columns; part i has n_i rows and rank r_i, R is the sum of ranks.

    Raises ValueError for shapes that do not fit each other.
    """

    a: torch.Tensor  # (R, D)
    b: tuple[torch.Tensor, ...]  # (n_i, r_i) of each part
    first_rows: tuple[int, ...]  # of each part, in the weight
    scales: tuple[float, ...]
    dropout: float = 0.0  # share of h's elements that the update does not see
    seed: int | None = None  # of dropout; None: nothing is dropped

    def __post_init__(self):
        ranks = sum(b.shape[1] for b in self.b)
        if not len(self.b) == len(self.first_rows) == len(self.scales) or ranks != len(self.a):
            raise ValueError(f"LowRank: a is {tuple(self.a.shape)}, b {[tuple(b.shape) for b in self.b]}; ranks differ")

    def with_factors(self, factors: Sequence[torch.Tensor]) -> "LowRank":
        """Return the same updates with other factors: A and each B."""
        return dataclasses.replace(self, a=factors[0], b=tuple(factors[1:]))

    def parts(self) -> Iterator[tuple[slice, slice, torch.Tensor, float]]:
        """Yield (rows of the weight, ranks in a, B, scale) of each part."""
        rank = 0
        for b, first, scale in zip(self.b, self.first_rows, self.scales, strict=True):
            yield slice(first, first + len(b)), slice(rank, rank + b.shape[1]), b, scale
            rank += b.shape[1]

    def drop(self, h: torch.Tensor) -> torch.Tensor:
        """Return h with dropout. The same seed drops the same elements, so that backward can drop them again."""
        if self.seed is None or not self.dropout:
            return h
        generator = torch.Generator(h.device).manual_seed(self.seed)
        kept = torch.empty(h.shape, dtype=torch.bool, device=h.device).bernoulli_(1 - self.dropout, generator=generator)
        return h * kept / (1 - self.dropout)


def check_low_rank(op: str, low_rank: LowRank | None, weight_shape: Sequence[int], cut: int = 0) -> None:
    """Raise ValueError where updates do not fit a weight (N, D), or a part lies on both sides of row `cut`."""
    if low_rank is None:
        return
    n, dim = weight_shape
    for rows, _, _, _ in low_rank.parts():
        if low_rank.a.shape[1] != dim or rows.stop > n or rows.start < cut < rows.stop:
            raise ValueError(
                f"{op}: low_rank has A {tuple(low_rank.a.shape)} and a part of rows {rows.start} to {rows.stop}; "
                f"wanted A (R, {dim}), rows up to {n}" + (f", none across {cut}" if cut else "")
            )


# ---- reference: the specification, and the path for dtypes without kernels ------------------------------------------


def low_rank_ref(h: torch.Tensor, low_rank: LowRank, n: int) -> torch.Tensor:
    """Return the updates (T, N) of y in plain torch."""
    h, total = low_rank.drop(h), h.new_zeros(len(h), n)
    for rows, ranks, b, scale in low_rank.parts():
        update = scale * F.linear(F.linear(h, low_rank.a[ranks]), b)
        total = total + F.pad(update, (rows.start, n - rows.stop))
    return total


def linear_ref(h: torch.Tensor, weight: torch.Tensor, low_rank: LowRank | None) -> torch.Tensor:
    """Return h W^T with the updates, if any, in plain torch."""
    y = F.linear(h, weight)
    return y if low_rank is None else y + low_rank_ref(h, low_rank, len(weight))


# ---- what the ops' autograd functions are made of -------------------------------------------------------------------


def list_factors(low_rank: LowRank | None) -> tuple[torch.Tensor, ...]:
    """Return A and each B, () without updates: the last arguments of the ops' autograd functions."""
    return () if low_rank is None else (low_rank.a, *low_rank.b)


def take_factors(h: torch.Tensor, low_rank: LowRank) -> torch.Tensor:
    """Return u = drop(h) A^T (T, R)."""
    return F.linear(low_rank.drop(h), low_rank.a)


def add_updates(y: torch.Tensor, u: torch.Tensor, low_rank: LowRank, first_row: int = 0) -> None:
    """Add the updates to y (T, N'), the columns from first_row of a weight's output: those of parts that lie in it."""
    for rows, ranks, b, scale in _parts_in(low_rank, first_row, y.shape[1]):
        y[:, rows].addmm_(u[:, ranks], b.T, alpha=scale)


def gradient_of_u(dy: torch.Tensor, low_rank: LowRank, first_row: int = 0) -> torch.Tensor:
    """Return du (T, R) of dy (T, N'), the gradient of the columns from first_row; 0 for the ranks of other columns."""
    du = dy.new_zeros(len(dy), len(low_rank.a))
    for rows, ranks, b, scale in _parts_in(low_rank, first_row, dy.shape[1]):
        _set_product(du[:, ranks], scale, dy[:, rows], b)
    return du


def gradients_of_b(dy: torch.Tensor, u: torch.Tensor, low_rank: LowRank, first_row: int = 0) -> list[torch.Tensor]:
    """Return dB (n_i, r_i) of each part that lies in dy (T, N'), the columns from first_row."""
    return [
        _gradient_of_b(dy[:, rows], u[:, ranks], b, scale)
        for rows, ranks, b, scale in _parts_in(low_rank, first_row, dy.shape[1])
    ]


def add_gradient_of_h(dh: torch.Tensor | None, du: torch.Tensor, low_rank: LowRank) -> torch.Tensor | None:
    """Add drop(du A) to dh (T, D), in place; None, where h's gradient is not wanted, stays None."""
    if dh is None:
        return None
    return dh.addmm_(du, low_rank.a) if low_rank.seed is None else dh.add_(low_rank.drop(du @ low_rank.a))


def gradient_of_a(du: torch.Tensor, h: torch.Tensor, low_rank: LowRank) -> torch.Tensor:
    """Return dA (R, D) = du^T drop(h)."""
    grad = weight_gradient(du, low_rank.drop(h), None)
    assert grad is not None
    return grad


def _gradient_of_b(dy, u, b, scale):
    """Return scale dy^T u, like b. AMX takes it turned, u^T dy: its right operand needs no transposition."""
    grad = torch.empty_like(b)
    if not is_by_amx(u, dy):
        return _set_product(grad, scale, dy.T, u)
    turned = torch.empty(u.shape[1], dy.shape[1])
    write_weight_gradient(turned, u, dy, is_added=False)
    return torch.mul(turned.T, scale, out=grad)


def _set_product(out, scale, x, y):
    return torch.addmm(out, x, y, beta=0, alpha=scale, out=out)  # beta 0: out's values are not read


def _parts_in(low_rank, first_row, n):
    for rows, ranks, b, scale in low_rank.parts():
        if first_row <= rows.start and rows.stop <= first_row + n:
            yield slice(rows.start - first_row, rows.stop - first_row), ranks, b, scale
