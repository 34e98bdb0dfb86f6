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
FLOAT32, BOOL, STRING, ARRAY = 6, 7, 8, 9  # kinds of value
MAX_DIMENSIONS = 4

WHOLE, REAL, BOOLS, STRINGS = "a whole number", "a float", "a bool", "a string"
KINDS = {0: WHOLE, 1: WHOLE, 2: WHOLE, 3: WHOLE, 4: WHOLE, 5: WHOLE, 6: REAL, 7: BOOLS, 8: STRINGS, 10: WHOLE}
KINDS |= {11: WHOLE, 12: REAL}
# The keys that are read, here and in other modules, and their kinds as llama.cpp wants them; lists are of these.
KEYS = {
    WHOLE: (
        "general.alignment", "split.no", "split.count",
        *(f"llama.{name}" for name in (
            "block_count", "context_length", "embedding_length", "feed_forward_length", "expert_count", "vocab_size",
            "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
            "rope.dimension_count", "rope.scaling.original_context_length",
        )),
        *(f"tokenizer.ggml.{name}" for name in (
            "token_type", "bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "eot_token_id",
        )),
    ),
    REAL: (
        "tokenizer.ggml.scores",
        *(f"llama.{name}" for name in (
            "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scale_linear", "rope.scaling.factor",
            "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor",
            "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
        )),
    ),
    BOOLS: ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"),
    STRINGS: (
        "general.architecture", "general.type", "llama.rope.scaling.type", "tokenizer.chat_template",
        *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "merges")),
    ),
}  # fmt: skip
KIND_OF_KEY = {key: kind for kind, keys in KEYS.items() for key in keys}
LISTS = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")}


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
    """Return (metadata, tensors). Raise ValueError, struct.error, RecursionError or OverflowError for a broken file.

    The tensors must fill the file as llama.cpp lays them out: each begins at the padded end of the one before, with
    zeros between, and the last one ends the file. So a flipped bit of a type or an offset loads nothing else.
    """
    if pages[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor = Cursor(pages)
    cursor.skip(4)
    version = cursor.read("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, wanted 2 or 3, little-endian")
    n_tensors, n_values = cursor.read("Q"), cursor.read("Q")
    metadata = read_metadata(cursor, n_values)
    infos = [read_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}, wanted a power of two")
    base = skip_padding(cursor, alignment)
    stored: dict[str, Stored] = {}
    for name, shape, kind, offset in infos:
        if name in stored:
            raise ValueError(f"two tensors named {name}")
        if base + offset != cursor.position:
            wanted = cursor.position - base
            raise ValueError(f"{name} begins at {offset}, wanted {wanted}, behind the tensor before it")
        stored[name] = open_tensor(file, cursor, gguf, name, shape, kind)
        skip_padding(cursor, alignment)
    if cursor.position < len(pages):
        raise ValueError(f"its tensors end at {cursor.position}, the file at {len(pages)}")
    return metadata, stored


def skip_padding(cursor: Cursor, alignment: int) -> int:
    """Move to the next multiple of the alignment, or to the end of the file, and return the position there."""
    n_bytes = min(-cursor.position % alignment, len(cursor.pages) - cursor.position)
    start = cursor.skip(n_bytes)
    if any(cursor.pages[start : cursor.position]):
        raise ValueError(f"bytes that belong to no tensor at {start}")
    return cursor.position


def read_metadata(cursor: Cursor, n_values: int) -> dict[str, Any]:
    """Return the metadata. Raise ValueError for a value whose kind is not that of its key, and a key that is damaged.

    A key is taken as damaged where one bit makes it a key that is read, since the default of that one would count.
    """
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key, kind = cursor.read_text(), cursor.read("I")
        if key in metadata:
            raise ValueError(f"two values of {key}")
        if kind == ARRAY and key in LISTS:
            (kind_of_items,) = struct.unpack_from("<I", cursor.pages, cursor.position)
            got = KINDS.get(kind_of_items, "of no known kind")
        else:
            got = KINDS.get(kind, "a list")
        if key in KIND_OF_KEY and (got != KIND_OF_KEY[key] or (key in LISTS) != (kind == ARRAY)):
            raise ValueError(f"{key} is {got}, wanted {KIND_OF_KEY[key]}{' in a list' if key in LISTS else ''}")
        metadata[key] = cursor.read_value(kind)
    for key in metadata.keys() - KIND_OF_KEY.keys():
        for known in KIND_OF_KEY.keys() - metadata.keys():
            if (
                len(key) == len(known)
                and sum((ord(a) ^ ord(b)).bit_count() for a, b in zip(key, known, strict=True)) == 1
            ):
                raise ValueError(f"the key {key!r} is one bit from {known}")
    return metadata


def read_tensor_info(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return (name, shape, kind of quantisation, offset from the end of the header) of a tensor."""
    name, n_dims = cursor.read_text(), cursor.read("I")
    if n_dims > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {n_dims} dimensions")
    shape = tuple(cursor.read("Q") for _ in range(n_dims))[::-1]
    return name, shape, cursor.read("I"), cursor.read("Q")


def open_tensor(file: str, cursor: Cursor, gguf: ModuleType, name: str, shape: tuple[int, ...], kind: int) -> Stored:
    """Return the tensor that begins here, and move behind it. Raise ValueError when the file cannot hold it."""
    quantisation = gguf.GGMLQuantizationType(kind)  # ValueError for one that the package does not know
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    n_elements = math.prod(shape)
    if not shape or 0 in shape or shape[-1] % block_elements:
        raise ValueError(f"{name} of shape {shape} is not made of {quantisation.name} blocks of {block_elements}")
    try:
        start = cursor.skip(n_elements // block_elements * block_bytes)
    except ValueError as error:
        raise ValueError(f"{name} goes past the end of the file: {error}") from None
    try:
        gguf.dequantize(np.zeros(block_bytes, np.uint8), quantisation)
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(quantisation.name, torch.float32)
    except NotImplementedError:
        dtype = quantisation.name
    return Stored(file, shape, dtype, partial(dequantise_rows, gguf, cursor.pages, quantisation, start, shape))


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
    pages.madvise(mmap.MADV_DONTNEED)  # else the whole file counts as memory of the process while it is open
