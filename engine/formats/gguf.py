"""GGUF files of llama.cpp: their metadata, and their tensors, which are dequantised a few rows at a time.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package dequantises the tensors. Its
GGUFReader is not used: it does not compare lengths with the size of the file, so that one flipped bit in a count makes
it fill the memory.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.base.errors import DataError, UsageError, summarize_error
from engine.formats.folders import StandInError, explain_stand_in
from engine.formats.tensor_files import Block, Stored

BLOCK_ELEMENTS = 1 << 18  # dequantised at a time; the gguf package needs a few times their memory on the way
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # kind of value: struct's code
FLOAT32, STRING, ARRAY = 6, 8, 9  # kinds of value
MAX_DIMENSIONS = 4


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Return (metadata, tensors) of a GGUF file; the tensors are dequantised, to fp32, when they are read.

    Raise DataError for a broken file, and UsageError when the gguf package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            f"{path.name}: reading GGUF wants the gguf package; pip install 'cria-engine[gguf]'"
        ) from error
    try:
        with path.open("rb") as file:
            if what := explain_stand_in(file.read(64)):
                raise StandInError(path.name, what)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return read_header(path.name, pages, gguf)
    except (OSError, ValueError, struct.error, RecursionError, OverflowError) as error:
        summary = summarize_error(error)
        raise DataError(f"{path.name}: not a sound GGUF file, truncated or corrupt: {summary}") from error


class Cursor:
    """Values read one after the other from a mapped file. Reading past its end raises ValueError or struct.error."""

    def __init__(self, pages: mmap.mmap):
        self.pages, self.position = pages, 0

    def read(self, code: str) -> Any:
        """Return the little-endian number here, whose type is a struct code."""
        (value,) = struct.unpack_from("<" + code, self.pages, self.position)
        self.position += struct.calcsize(code)
        return value

    def skip(self, n_bytes: int) -> int:
        """Move forward by n_bytes, and return the position before."""
        if n_bytes > len(self.pages) - self.position:
            raise ValueError(f"{n_bytes} bytes wanted at {self.position}, the file ends at {len(self.pages)}")
        self.position += n_bytes
        return self.position - n_bytes

    def read_text(self) -> str:
        """Return a string, which is stored after its length."""
        start = self.skip(self.read("Q"))
        return self.pages[start : self.position].decode()

    def read_value(self, kind: int) -> Any:
        """Return a value of the metadata: a number, a bool, a string or a list."""
        if kind in SCALARS:
            number = self.read(SCALARS[kind])
            return float(str(np.float32(number))) if kind == FLOAT32 else number  # 1e-5, not 9.99999974e-6
        if kind == STRING:
            return self.read_text()
        if kind != ARRAY:
            raise ValueError(f"unknown kind of metadata {kind}")
        element, length = self.read("I"), self.read("Q")
        if element in SCALARS:
            code = SCALARS[element]
            start = self.skip(length * struct.calcsize(code))
            return list(struct.unpack_from(f"<{length}{code}", self.pages, start))
        # A wrong length does not fill the memory: every element takes bytes, and the file ends.
        return [self.read_value(element) for _ in range(length)]


def read_header(file: str, pages: mmap.mmap, gguf: ModuleType) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Return (metadata, tensors). Raise ValueError, struct.error, RecursionError or OverflowError for a broken file."""
    if pages[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor = Cursor(pages)
    cursor.skip(4)
    version = cursor.read("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, wanted 2 or 3, little-endian")
    n_tensors, n_values = cursor.read("Q"), cursor.read("Q")
    metadata = {}
    for _ in range(n_values):
        name = cursor.read_text()
        metadata[name] = cursor.read_value(cursor.read("I"))
    infos = [read_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    base = cursor.position + -cursor.position % alignment
    stored: dict[str, Stored] = {}
    end = 0
    for name, shape, kind, offset in infos:
        if name in stored:
            raise ValueError(f"two tensors named {name}")
        if offset != end:
            raise ValueError(f"{name} begins at {offset}, wanted {end}, behind the tensor before it")
        stored[name] = open_tensor(file, pages, gguf, name, shape, kind, base + offset)
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        end += math.prod(shape) // block_elements * block_bytes
        end += -end % alignment
    return metadata, stored


def read_tensor_info(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return (name, shape, kind of quantisation, offset from the end of the header) of a tensor."""
    name, n_dims = cursor.read_text(), cursor.read("I")
    if n_dims > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {n_dims} dimensions")
    shape = tuple(cursor.read("Q") for _ in range(n_dims))[::-1]
    return name, shape, cursor.read("I"), cursor.read("Q")


def open_tensor(
    file: str, pages: mmap.mmap, gguf: ModuleType, name: str, shape: tuple[int, ...], kind: int, start: int
) -> Stored:
    """Return a tensor that begins at byte start. Raise ValueError when the file cannot hold it."""
    quantisation = gguf.GGMLQuantizationType(kind)  # ValueError for one that the package does not know
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    n_elements = math.prod(shape)
    if not shape or 0 in shape or shape[-1] % block_elements:
        raise ValueError(f"{name} of shape {shape} is not made of {quantisation.name} blocks of {block_elements}")
    if start + n_elements // block_elements * block_bytes > len(pages):
        raise ValueError(f"{name} goes past the end of the file, {len(pages)} bytes")
    try:
        gguf.dequantize(np.zeros(block_bytes, np.uint8), quantisation)
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(quantisation.name, torch.float32)
    except NotImplementedError:
        dtype = quantisation.name
    return Stored(file, shape, dtype, partial(dequantise_rows, gguf, pages, quantisation, start, shape))


def dequantise_rows(
    gguf: ModuleType, pages: mmap.mmap, quantisation: Any, start: int, shape: tuple[int, ...]
) -> Iterator[Block]:
    """Yield the rows of a tensor in fp32, about BLOCK_ELEMENTS elements at a time, as Stored.blocks does."""
    n_rows, n_columns = (1, *shape)[-2:]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    row_bytes = n_columns // block_elements * block_bytes
    step = max(1, BLOCK_ELEMENTS // n_columns)
    for row in range(0, n_rows, step):
        n = min(step, n_rows - row)
        raw = np.frombuffer(pages, np.uint8, n * row_bytes, start + row * row_bytes)
        # All rows are passed as one, since gguf loops over rows in Python. Its result is copied, since torch warns of
        # read-only memory.
        part = torch.from_numpy(np.array(gguf.dequantize(raw.reshape(1, -1), quantisation)))
        yield row, 0, part.view(n, n_columns) if len(shape) > 1 else part[0]
