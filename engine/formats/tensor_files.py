"""Files full of tensors: safetensors and torch's .pth. Opened by their header, read and written piece by piece.

open_*() checks a file's header against its size and returns {name: Stored}; nothing is read but that. write_*() take
tensors as functions and hold one at a time, so a model is written without a second copy of it.
"""

import hashlib
import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open

from engine.base.errors import DataError
from engine.base.files import sync_file

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip  # in safetensors' words
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Tensors = Iterable[tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]]  # name, shape, dtype, load


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. blocks() gives (row, column, part): parts that cover it, each placed by its first element."""

    file: str  # name, for messages
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str names one that is no tensor's we read
    blocks: Callable[[], Iterator[tuple[int, int, torch.Tensor]]]


def whole(load):
    return lambda: iter([(0, 0, load())])


# ---- safetensors ----------------------------------------------------------------------------------------------------


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Tensors are views of the mapped file. Raises DataError."""
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:  # before anyone allocates what the file claims
        raise DataError(f"{path.name}: {size} bytes, of which the header claims {length}; truncated or corrupt")
    try:
        file = safe_open(path, framework="pt")
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
        return {
            name: Stored(
                path.name,
                tuple(view.get_shape()),
                DTYPES.get(view.get_dtype(), view.get_dtype()),
                whole(lambda name=name: file.get_tensor(name)),
            )
            for name, view in views.items()
        }
    except Exception as error:
        raise DataError(f"{path.name}: not a sound safetensors file: {first_line(error)}") from error


def write_safetensors(
    path: Path, tensors: Tensors, metadata: dict[str, str] | None = None, *, sha256: bool = False
) -> str | None:
    """Writes tensors in the order given, one in memory at a time, and fsyncs.

    Offsets follow the order: wide dtypes first keeps every tensor aligned. sha256: return the file's digest, computed
    on the way. Raises OSError (the file is then incomplete) and ValueError when a load() gives another shape or dtype.

    Not safetensors.torch.save_file: it wants all tensors at once, so converted ones are a second model; it refuses
    views of one storage, which wq, wk, wv of wqkv are; and before 0.8 it copies everything to bytes first.
    """
    tensors = list(tensors)
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape, dtype, _ in tensors:
        if name in header:
            raise ValueError(f"write_safetensors: two tensors named {name!r}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in chain([len(text).to_bytes(8, "little"), text], (raw_bytes(*tensor) for tensor in tensors)):
            file.write(part)
            if sha256:
                digest.update(part)
            del part  # before the next is loaded
        sync_file(file)
    return digest.hexdigest() if sha256 else None


# ---- torch's .pth ---------------------------------------------------------------------------------------------------


def open_pth(path: Path) -> dict[str, Stored]:
    """A pickled {name: tensor}, mapped; no code of the pickle runs. Raises DataError."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path.name}: refused by torch.load(weights_only=True), which reads tensors and runs no code: "
            f"{first_line(error)}"
        ) from error
    except Exception as error:
        raise DataError(
            f"{path.name}: not a sound torch file: {first_line(error)}; if it is of torch before 1.6, load it and "
            "torch.save it again"
        ) from error
    if not isinstance(tensors, dict):
        raise DataError(f"{path.name}: holds a {type(tensors).__name__}, wanted a dict of tensors")
    stored = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise DataError(f"{path.name}: {name!r} is no plain tensor; wanted a flat dict of tensors")
        dtype = tensor.dtype if tensor.dtype in DTYPE_NAMES else str(tensor.dtype)
        stored[str(name)] = Stored(path.name, tuple(tensor.shape), dtype, whole(lambda tensor=tensor: tensor.detach()))
    return stored


@dataclass(frozen=True)
class PickledStorage:
    key: str
    dtype: torch.dtype
    n_elements: int


@dataclass(frozen=True)
class PickledTensor:
    storage: PickledStorage
    shape: tuple[int, ...]

    def __reduce__(self):
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class TensorPickler(pickle.Pickler):
    STORAGES = {  # noqa: RUF012  the names by which pickles know dtypes
        torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage,
        torch.float64: torch.DoubleStorage,
    }  # fmt: skip

    def persistent_id(self, obj):
        if isinstance(obj, PickledStorage):
            return "storage", self.STORAGES[obj.dtype], obj.key, "cpu", obj.n_elements


def write_pth(path: Path, tensors: Tensors) -> None:
    """A file that torch.load(weights_only=True) reads as {name: tensor}; the same bytes each time; fsyncs.

    torch.save would want all tensors at once, converted and permuted: a second model. The layout is its own
    (torch/csrc/serialization: a stored zip of data.pkl and data/N, each aligned to 64 bytes so that it can be mapped).
    """
    tensors, state, text = list(tensors), {}, io.BytesIO()
    for i, (name, shape, dtype, _) in enumerate(tensors):
        state[name] = PickledTensor(PickledStorage(str(i), dtype, math.prod(shape)), tuple(shape))
    TensorPickler(text, protocol=2).dump(state)
    records = [("data.pkl", text.getvalue), ("byteorder", lambda: b"little"), ("version", lambda: b"3\n")]
    records[2:2] = [(f"data/{i}", partial(raw_bytes, *tensor)) for i, tensor in enumerate(tensors)]
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, load in records:
                info = zipfile.ZipInfo(f"archive/{name}")  # its date is 1980, whatever the clock says
                start = file.tell() + 30 + len(info.filename) + 20 + 4  # header, name, zip64, padding's own
                info.extra = struct.pack("<HH", 0x4246, -start % 64) + b"Z" * (-start % 64)
                with archive.open(info, "w", force_zip64=True) as record:
                    record.write(load())
        sync_file(file)


def raw_bytes(name, shape, dtype, load):
    """The bytes of a tensor, uncopied where it already lies packed in memory."""
    tensor = load()
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: loaded {tuple(tensor.shape)} {tensor.dtype}, wanted {tuple(shape)} {dtype} as announced"
        )
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
