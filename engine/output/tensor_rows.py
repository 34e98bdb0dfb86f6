"""Rows of tensors: what one process of several holds, copies, and finds again in files that others wrote.

whole   {tensor: {"dtype": "F32", "shape": [...]}}    of the whole tensors, dtypes as safetensors names them
files   {file: {tensor: [first, end]}}                the rows that each file holds
"""

import errno
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.base.errors import DataError, summarize_error
from engine.base.host_memory import COPY_ARENA_BYTES, HostMemory
from engine.formats.tensor_files import DTYPE_NAMES, DTYPES
from engine.model.shard import Shard, n_rows


def described(shards: dict[str, Shard]) -> dict[str, tuple]:
    """{name: (dtype, whole shape, first, end)}: what others need to know. Raises KeyError for a dtype no file holds."""
    return {n: (DTYPE_NAMES[s.tensor.dtype], list(s.shape), s.first, s.end) for n, s in shards.items()}


# ---- who holds what -------------------------------------------------------------------------------------------------


def lay_out(held: dict[str, dict[str, tuple]]) -> tuple[dict, dict]:
    """(whole, files) from what the writer of each file holds, as described() tells; a file of several that would hold
    no row is none. Raises ValueError when the rows do not add up."""
    whole, files = {}, {}
    for file, tensors in held.items():
        for name, (dtype, shape, _, _) in tensors.items():
            entry = {"dtype": dtype, "shape": shape}
            if whole.setdefault(name, entry) != entry:
                raise ValueError(f"{name}: {file} is to hold rows of {entry}, another one of {whole[name]}")
        alone = len(held) == 1
        rows = {name: [first, end] for name, (_, _, first, end) in tensors.items() if end > first or alone}
        if rows or alone:
            files[file] = rows
    check_layout(whole, files)
    return whole, files


def check_layout(whole: dict, files: dict) -> None:
    """Raises ValueError, TypeError, LookupError or AttributeError unless this is a layout, in which every row of every
    tensor is held once."""
    held = {name: [] for name in whole}
    for rows in files.values():
        for name, (first, end) in rows.items():
            if type(first) is not int or type(end) is not int or first > end:
                raise ValueError(f"{name}: rows [{first}, {end})")
            held[name].append((first, end))
    for name, ranges in held.items():
        dtype, shape = whole[name]["dtype"], whole[name]["shape"]
        if dtype not in DTYPES or type(shape) is not list or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"{name}: dtype {dtype}, shape {shape}")
        at = 0
        for first, end in [*sorted(ranges), (n_rows(shape),) * 2]:
            if first != at:
                times = "by no file" if first > at else "twice, or are none of it"
                raise ValueError(f"{name}: rows [{min(at, first)}, {max(at, first)}) are held {times}")
            at = end


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


def layout_of(path: Path) -> tuple[dict, dict]:
    """(whole, files) of one file of whole tensors. Raises DataError."""
    whole = using(path, lambda parts: {name: entry_of(part) for name, part in parts.items()})
    return whole, {path.name: {name: [0, n_rows(entry["shape"])] for name, entry in whole.items()}}


def read(folder: Path, whole: dict, files: dict, shards: dict[str, Shard], prefix: str = "") -> None:
    """Fills the shards, each with the rows it wants, from a folder of files with that layout.

    prefix: of the tensors that are read; the files may hold others. Files are mapped, one after the other, and only
    those rows read; a file without any is not opened. Raises DataError listing names, shapes or kinds of numbers that
    differ.
    """
    check_fit(folder, whole, shards, prefix)
    for file, rows in files.items():
        wanted = {
            name: (max(first, shards[name].first), min(end, shards[name].end))
            for name, (first, end) in rows.items()
            if name in shards
        }
        wanted = {name: (first, end) for name, (first, end) in wanted.items() if first < end}
        if not wanted:
            continue
        held = {
            name: whole[name] | {"shape": [end - first, *whole[name]["shape"][1:]] if whole[name]["shape"] else []}
            for name, (first, end) in rows.items()
        }

        @torch.no_grad()
        def fill(parts, path=folder / file, rows=rows, wanted=wanted, held=held):
            if {name: entry_of(part) for name, part in parts.items()} != held:
                raise DataError(f"{path}: holds other tensors than its manifest says; choose another checkpoint")
            for name, (first, end) in wanted.items():
                to, here, there = shards[name].tensor, shards[name].first, rows[name][0]
                if to.ndim == 0:
                    to.copy_(parts[name][...])
                else:
                    to[first - here : end - here].copy_(parts[name][first - there : end - there])

        using(folder / file, fill)


def using(path, act):
    """act({name: its slices}) of a safetensors file. Raises DataError for one that is not sound."""
    try:
        with safe_open(path, "pt") as file:
            return act({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: {summarize_error(error)}; choose another checkpoint") from None


def entry_of(part):
    return {"dtype": part.get_dtype(), "shape": list(part.get_shape())}


def check_fit(folder: Path, whole: dict, shards: dict[str, Shard], prefix: str = "") -> None:
    """Raises DataError naming what is not the same here and there, of the tensors whose names begin so. fp32 may become
    bf16; bits are no numbers."""
    held = {name: entry for name, entry in whole.items() if name.startswith(prefix)}
    have = {name: (tuple(entry["shape"]), DTYPES.get(entry["dtype"])) for name, entry in held.items()}
    want = {name: (s.shape, s.tensor.dtype) for name, s in shards.items()}
    wrong = []
    for name in sorted(have.keys() | want.keys()):
        (shape, dtype), (wanted, as_dtype) = have.get(name, (None, None)), want.get(name, (None, None))
        if shape != wanted:
            wrong.append(f"{name} ({shape}, wanted {wanted})")
        elif dtype != as_dtype and not (dtype and dtype.is_floating_point and as_dtype.is_floating_point):
            wrong.append(f"{name} ({dtype}, wanted {as_dtype})")
    if wrong:
        raise DataError(f"{folder}: {len(wrong)} tensors do not fit this model, first {', '.join(wrong[:3])}")
