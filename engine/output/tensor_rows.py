"""Rows of tensors: which file of a checkpoint holds which rows, copies of them, and reading them into shards."""

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from engine.base.errors import DataError, summarize_error
from engine.base.host_memory import COPY_ARENA_BYTES, HostMemory
from engine.base.watching import Watch, watch_silently
from engine.formats.tensor_files import DTYPE_NAMES, DTYPES, is_finite
from engine.model.shard import Shard, n_rows

T = TypeVar("T")
Description = tuple[str, list[int], int, int]  # dtype, shape of the whole tensor, first row, end of the rows

# ---- which file holds which rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowMap:
    """Tensors whose rows lie in one or several files."""

    tensors: dict[str, dict[str, Any]]  # {tensor: {"dtype": "F32", "shape": [...]}}, dtypes as safetensors names them
    files: dict[str, dict[str, list[int]]]  # {file: {tensor: [first, end]}}, the rows that each file holds


def describe_shards(shards: dict[str, Shard]) -> dict[str, Description]:
    """Return what other writers need to know of these shards. Raises KeyError for a dtype that no file holds."""
    return {n: (DTYPE_NAMES[s.tensor.dtype], list(s.shape), s.first, s.end) for n, s in shards.items()}


def map_rows_to_files(shards_of_files: dict[str, dict[str, Description]]) -> RowMap:
    """Return the layout of files that each hold one writer's shards.

    A file without rows is left out, unless it is the only one. Raises ValueError when the rows do not add up to whole
    tensors.
    """
    tensors: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, list[int]]] = {}
    only_file = len(shards_of_files) == 1
    for file, shards in shards_of_files.items():
        for name, (dtype, shape, _, _) in shards.items():
            entry = {"dtype": dtype, "shape": shape}
            if tensors.setdefault(name, entry) != entry:
                raise ValueError(f"{name}: {file} is to hold rows of {entry}, another one of {tensors[name]}")
        rows = {name: [first, end] for name, (_, _, first, end) in shards.items() if end > first or only_file}
        if rows or only_file:
            files[file] = rows
    row_map = RowMap(tensors, files)
    check_row_map(row_map)
    return row_map


def check_row_map(row_map: RowMap) -> None:
    """Check that every row of every tensor is held once.

    Raises ValueError where it is not; TypeError, LookupError or AttributeError for values of other types.
    """
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in row_map.tensors}
    for rows in row_map.files.values():
        for name, (first, end) in rows.items():
            if type(first) is not int or type(end) is not int or first > end:
                raise ValueError(f"{name}: rows [{first}, {end})")
            spans[name].append((first, end))
    for name, ranges in spans.items():
        dtype, shape = row_map.tensors[name]["dtype"], row_map.tensors[name]["shape"]
        if dtype not in DTYPES or type(shape) is not list or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"{name}: dtype {dtype}, shape {shape}")
        expected = 0
        for first, end in [*sorted(ranges), (n_rows(shape),) * 2]:
            if first != expected:
                times = "by no file" if first > expected else "twice, or are none of it"
                raise ValueError(f"{name}: rows [{min(expected, first)}, {max(expected, first)}) are held {times}")
            expected = end


# ---- copies ---------------------------------------------------------------------------------------------------------


class HostCopy:
    """A copy of shards in the host's memory. The next copy of shards of the same shapes uses the memory again."""

    def __init__(self, pinned: bool):
        self.pinned = pinned
        self.layout: list[tuple[str, torch.Size, torch.dtype]] | None = None
        self.views: dict[str, torch.Tensor] = {}

    def copy_shards(self, shards: dict[str, Shard]) -> dict[str, Shard]:
        """Return the copy. On a GPU it is queued on the current stream.

        Raises OSError when the host has too little memory.
        """
        layout = [(name, s.tensor.shape, s.tensor.dtype) for name, s in shards.items()]
        if layout != self.layout:
            self.layout, self.views = None, {}  # frees the memory of the copy before
            try:
                self.views = self._allocate(layout)
            except RuntimeError as error:
                raise OSError(errno.ENOMEM, f"no memory for a copy of the state: {summarize_error(error)}") from error
            self.layout = layout
        for name, s in shards.items():
            self.views[name].copy_(s.tensor.detach(), non_blocking=True)
        return {name: replace(s, tensor=self.views[name]) for name, s in shards.items()}

    def _allocate(self, layout):
        memory = HostMemory(self.pinned, COPY_ARENA_BYTES)
        pieces = [(name, memory.reserve_piece(s.numel() * dtype.itemsize), s, dtype) for name, s, dtype in layout]
        return {name: piece.view(dtype).view(shape) for name, piece, shape, dtype in pieces}


# ---- read -----------------------------------------------------------------------------------------------------------


def read_file_row_map(path: Path) -> RowMap:
    """Return the layout of one file of whole tensors. Raises DataError."""
    tensors = read_slices(path, lambda slices: {name: describe_slice(part) for name, part in slices.items()})
    return RowMap(tensors, {path.name: {name: [0, n_rows(entry["shape"])] for name, entry in tensors.items()}})


def read_shards(
    folder: Path, row_map: RowMap, shards: dict[str, Shard], prefix: str = "", watch: Watch = watch_silently
) -> None:
    """Fill the shards, each with the rows it wants, from a folder of files with this layout.

    The shards must be of all tensors whose names begin with the prefix; no other is read. Files are mapped, one after
    the other, and only those rows read; a file without any is not opened. Raises DataError that lists the names, shapes
    or kinds of numbers that differ.
    """
    check_fit(folder, row_map, shards, prefix)
    with watch("reading", sum(s.tensor.numel() for s in shards.values())) as advance:
        for file, rows in row_map.files.items():
            wanted = {
                name: (max(first, shards[name].first), min(end, shards[name].end))
                for name, (first, end) in rows.items()
                if name in shards
            }
            wanted = {name: (first, end) for name, (first, end) in wanted.items() if first < end}
            if wanted:
                path = folder / file
                read_slices(path, partial(fill_shards, path, row_map, shards, wanted, advance))


@torch.no_grad()
def fill_shards(
    path: Path,
    row_map: RowMap,
    shards: dict[str, Shard],
    wanted: dict[str, tuple[int, int]],
    advance: Callable[[int], None],
    slices: dict[str, Any],
) -> None:
    """Copy the wanted rows {tensor: (first, end)} of one file's tensors into the shards, and count their values.

    Raises DataError for a file whose tensors are not those of the row map, or not finite.
    """
    rows = row_map.files[path.name]
    expected = {}
    for name, (first, end) in rows.items():
        shape = row_map.tensors[name]["shape"]
        expected[name] = row_map.tensors[name] | {"shape": [end - first, *shape[1:]] if shape else []}
    if {name: describe_slice(part) for name, part in slices.items()} != expected:
        raise DataError(f"{path}: holds other tensors than its manifest says; choose another checkpoint")
    for name, (first, end) in wanted.items():
        target, target_first, file_first = shards[name].tensor, shards[name].first, rows[name][0]
        if target.ndim == 0:
            target.copy_(slices[name][...])
        else:
            target = target[first - target_first : end - target_first]
            target.copy_(slices[name][first - file_first : end - file_first])
        if not is_finite(target):
            raise DataError(f"{path}: {name} holds NaN or an infinity; choose another checkpoint")
        advance(target.numel())


def read_slices(path: Path, read: Callable[[dict[str, Any]], T]) -> T:
    """Return read({tensor: its slice}) of an open safetensors file. Raises DataError for a file that is not sound."""
    try:
        with safe_open(path, "pt") as file:
            return read({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: {summarize_error(error)}; choose another checkpoint") from None


def describe_slice(part: Any) -> dict[str, Any]:
    """Return dtype and shape of a safetensors slice, as a RowMap has them."""
    return {"dtype": part.get_dtype(), "shape": list(part.get_shape())}


def check_fit(folder: Path, row_map: RowMap, shards: dict[str, Shard], prefix: str = "") -> None:
    """Raise DataError that lists where shards and files differ, of the tensors whose names begin with the prefix.

    Floating-point dtypes may differ: fp32 may become bf16. Other dtypes, such as packed bits, must be equal.
    """
    found = {name: entry for name, entry in row_map.tensors.items() if name.startswith(prefix)}
    have = {name: (tuple(entry["shape"]), DTYPES.get(entry["dtype"])) for name, entry in found.items()}
    want = {name: (s.shape, s.tensor.dtype) for name, s in shards.items()}
    wrong = []
    for name in sorted(have.keys() | want.keys()):
        (shape, dtype), (wanted, as_dtype) = have.get(name, (None, None)), want.get(name, (None, None))
        if shape != wanted:
            wrong.append(f"{name} ({shape}, wanted {wanted})")
        elif dtype != as_dtype and not (dtype and as_dtype and dtype.is_floating_point and as_dtype.is_floating_point):
            wrong.append(f"{name} ({dtype}, wanted {as_dtype})")
    if wrong:
        raise DataError(f"{folder}: {len(wrong)} tensors do not fit this model, first {', '.join(wrong[:3])}")
