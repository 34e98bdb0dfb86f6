"""GGUF files opened: metadata and tensors, dequantised a few rows at a time."""

import math
import mmap
import struct
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.base.errors import DataError, UsageError
from engine.formats.tensor_files import Stored, first_line

BLOCK_ELEMENTS = 1 << 18  # of GGUF dequantised at a time; gguf's temporaries are a few times that
GGUF_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
GGUF_FLOAT32, GGUF_STRING, GGUF_ARRAY = 6, 8, 9


def open_gguf(path: Path) -> tuple[dict, dict[str, Stored]]:
    """Metadata and tensors, which are dequantised to fp32 a few rows at a time.

    gguf.GGUFReader checks no length against the file: a flipped bit in a count makes it fill memory. Source:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    Raises DataError, and UsageError when the gguf package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            f"{path.name}: reading GGUF wants the gguf package; pip install 'cria-engine[gguf]'"
        ) from error
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return read_gguf(path.name, pages, gguf)
    except (OSError, ValueError, struct.error, RecursionError, OverflowError) as error:
        raise DataError(f"{path.name}: not a sound GGUF file, truncated or corrupt: {first_line(error)}") from error


def read_gguf(file, pages, gguf):
    at = 0

    def take(code):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, pages, at)  # struct.error past the end
        at += struct.calcsize(code)
        return value

    def skip(n_bytes):
        nonlocal at
        if n_bytes > len(pages) - at:
            raise ValueError(f"{n_bytes} bytes wanted at {at}, the file ends at {len(pages)}")
        at += n_bytes
        return at - n_bytes

    def text():
        start = skip(take("Q"))
        return pages[start:at].decode()

    def value(kind):
        if kind in GGUF_SCALARS:
            number = take(GGUF_SCALARS[kind])
            return float(str(np.float32(number))) if kind == GGUF_FLOAT32 else number  # 1e-5, not 9.99999974e-6
        if kind == GGUF_STRING:
            return text()
        if kind != GGUF_ARRAY:
            raise ValueError(f"unknown kind of metadata {kind}")
        element, length = take("I"), take("Q")
        if element in GGUF_SCALARS:
            code = GGUF_SCALARS[element]
            start = skip(length * struct.calcsize(code))
            return list(struct.unpack_from(f"<{length}{code}", pages, start))
        return [value(element) for _ in range(length)]  # ends at the end of the file: each takes some of it

    if pages[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    skip(4)
    version = take("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, wanted 2 or 3, little-endian")
    n_tensors, n_values = take("Q"), take("Q")
    metadata = {}
    for _ in range(n_values):
        name = text()
        metadata[name] = value(take("I"))
    infos = []
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")
        if n_dims > 4:
            raise ValueError(f"{name} has {n_dims} dimensions")
        shape = tuple(take("Q") for _ in range(n_dims))[::-1]
        infos.append((name, shape, take("I"), take("Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    base = at + -at % alignment
    stored = {}
    for name, shape, kind, offset in infos:
        if name in stored:
            raise ValueError(f"two tensors named {name}")
        kind = gguf.GGMLQuantizationType(kind)  # ValueError for one that it does not know
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_elements = math.prod(shape)
        if not shape or 0 in shape or shape[-1] % block_elements:
            raise ValueError(f"{name} of shape {shape} is not made of {kind.name} blocks of {block_elements}")
        if base + offset + n_elements // block_elements * block_bytes > len(pages):
            raise ValueError(f"{name} goes past the end of the file, {len(pages)} bytes")
        rows = partial(dequantised_rows, gguf, pages, kind, base + offset, shape)
        try:
            gguf.dequantize(np.zeros(block_bytes, np.uint8), kind)
            dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
        except NotImplementedError:
            dtype = kind.name
        stored[name] = Stored(file, shape, dtype, rows)
    return metadata, stored


def dequantised_rows(gguf, pages, kind, start, shape):
    n_rows, n_columns = (1, *shape)[-2:]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = n_columns // block_elements * block_bytes
    step = max(1, BLOCK_ELEMENTS // n_columns)
    for row in range(0, n_rows, step):
        n = min(step, n_rows - row)
        raw = np.frombuffer(pages, np.uint8, n * row_bytes, start + row * row_bytes)
        # As one long row: gguf loops over rows in Python. A copy: torch warns of pages that are read-only.
        part = torch.from_numpy(np.array(gguf.dequantize(raw.reshape(1, -1), kind)))
        yield row, 0, part.view(n, n_columns) if len(shape) > 1 else part[0]
