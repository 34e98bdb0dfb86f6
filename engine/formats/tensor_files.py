"""Files of tensors: safetensors and torch's .pth, read and written one tensor at a time.

open_* checks a file's header against its size and returns {name: Stored} without reading any tensor. write_* takes
functions that make the tensors and holds one tensor at a time, so a model is written without a second copy of it. It
writes no NaN and no infinity.
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
from typing import Any

import torch
from safetensors import safe_open

from engine.base.errors import DataError, NotFiniteError, summarize_error
from engine.base.files import sync_file
from engine.formats.torch_zip import TensorZip

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
DTYPES = {  # by their names in safetensors
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

TensorToWrite = tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]  # name, shape, dtype, load
Block = tuple[int, int, torch.Tensor]  # (row, column) of its first element within the whole tensor, the values


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which blocks() reads part by part."""

    file: str  # name, for messages
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str names a type that is not supported
    blocks: Callable[[], Iterator[Block]]


def as_one_block(load: Callable[[], torch.Tensor]) -> Callable[[], Iterator[Block]]:
    """Return a function for Stored.blocks that yields the whole tensor at once."""
    return lambda: iter([(0, 0, load())])


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds no NaN and no infinity.

    It is read once and not copied: 6 GB/s of bf16 on two CPU cores, where torch.isfinite takes 0.2 and a sum of fp16
    overflows. A NaN anywhere is both the smallest and the largest.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(value) for value in torch.aminmax(tensor.detach()))


# ---- safetensors ----------------------------------------------------------------------------------------------------


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file. They are read as views of the mapped file. Raise DataError."""
    with path.open("rb") as opened:
        length, size = int.from_bytes(opened.read(8), "little"), os.fstat(opened.fileno()).st_size
    # The library would allocate as many bytes as the header claims.
    if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
        raise DataError(f"{path.name}: {size} bytes, of which the header claims {length}; truncated or corrupt")
    try:
        file = safe_open(path, framework="pt")
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
        return {
            name: Stored(
                path.name,
                tuple(view.get_shape()),
                DTYPES.get(view.get_dtype(), view.get_dtype()),
                as_one_block(partial(file.get_tensor, name)),
            )
            for name, view in views.items()
        }
    except Exception as error:
        raise DataError(f"{path.name}: not a sound safetensors file: {summarize_error(error)}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file that open_safetensors() has opened."""
    return safe_open(path, framework="pt").metadata() or {}


def write_safetensors(
    path: Path, tensors: Iterable[TensorToWrite], metadata: dict[str, str] | None = None, *, sha256: bool = False
) -> str | None:
    """Write tensors in the given order, one in memory at a time, and fsync. Return the sha256 when it is asked for.

    Tensors lie in the file in this order. When those of wide dtypes come first, every tensor is aligned. Raise OSError,
    which leaves the file incomplete, as does NotFiniteError, and ValueError when a load() returns another shape or
    dtype than announced.

    safetensors.torch.save_file is not used. It takes all tensors at once, so that converted tensors would be a second
    model in memory. It refuses views of one storage, such as wq, wk and wv of wqkv. Before 0.8 it copies everything to
    bytes first.
    """
    tensors, end = list(tensors), 0
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, shape, dtype, _ in tensors:
        if name in header:
            raise ValueError(f"write_safetensors: two tensors named {name!r}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        parts: Iterator[bytes | memoryview] = chain(
            [len(text).to_bytes(8, "little"), text], (load_bytes(*tensor) for tensor in tensors)
        )
        for part in parts:
            file.write(part)
            if sha256:
                digest.update(part)
            del part  # before the next tensor is loaded
        sync_file(file)
    return digest.hexdigest() if sha256 else None


# ---- torch's .pth ---------------------------------------------------------------------------------------------------


def open_pth(path: Path) -> dict[str, Stored]:
    """Return the tensors of a torch.save file of {name: tensor}, mapped. No code in it runs. Raise DataError.

    The first tensor that is read compares the checksums of all, which torch does not.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path.name}: refused by torch.load(weights_only=True), which reads tensors and runs no code: "
            f"{summarize_error(error)}"
        ) from error
    except Exception as error:
        raise DataError(
            f"{path.name}: not a sound torch file: {summarize_error(error)}; if it is of torch before 1.6, load it and "
            "torch.save it again"
        ) from error
    if not isinstance(tensors, dict):
        raise DataError(f"{path.name}: holds a {type(tensors).__name__}, wanted a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise DataError(f"{path.name}: {name!r} is no plain tensor; wanted a flat dict of tensors")
    archive = TensorZip(path)
    archive.check_tensors(tensors)

    def load(tensor: torch.Tensor) -> torch.Tensor:
        archive.check_sums_once()
        return tensor.detach()

    stored = {}
    for name, tensor in tensors.items():
        dtype = tensor.dtype if tensor.dtype in DTYPE_NAMES else str(tensor.dtype)
        stored[str(name)] = Stored(path.name, tuple(tensor.shape), dtype, as_one_block(partial(load, tensor)))
    return stored


@dataclass(frozen=True)
class PickledStorage:
    """The bytes of one tensor: a record of the zip that a pickle refers to by its key."""

    key: str
    dtype: torch.dtype
    n_elements: int


@dataclass(frozen=True)
class PickledTensor:
    """A stand-in for a tensor that fills its storage. It is pickled as the tensor would be, without its bytes."""

    storage: PickledStorage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class TensorPickler(pickle.Pickler):
    """A pickler that writes PickledStorage as torch.save writes a tensor's storage."""

    STORAGES = {  # noqa: RUF012  the classes by which pickles name dtypes
        torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage,
        torch.float64: torch.DoubleStorage,
    }  # fmt: skip

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        """Return torch's description of a storage, and None for other objects, which are pickled as usual."""
        if not isinstance(obj, PickledStorage):
            return None
        return "storage", self.STORAGES[obj.dtype], obj.key, "cpu", obj.n_elements


def write_pth(path: Path, tensors: Iterable[TensorToWrite]) -> None:
    """Write a file that torch.load(weights_only=True) reads as {name: tensor}, and fsync. Its bytes are reproducible.

    torch.save would take all tensors at once, converted and permuted: a second model in memory. The layout is that of
    torch.save (torch/csrc/serialization): an uncompressed zip of data.pkl and data/N, each record aligned to 64 bytes
    so that it can be mapped.
    """
    tensors, text = list(tensors), io.BytesIO()
    state: dict[str, PickledTensor] = {}
    for i, (name, shape, dtype, _) in enumerate(tensors):
        state[name] = PickledTensor(PickledStorage(str(i), dtype, math.prod(shape)), tuple(shape))
    TensorPickler(text, protocol=2).dump(state)
    records: list[tuple[str, Callable[[], bytes | memoryview]]] = [
        ("data.pkl", text.getvalue),
        ("byteorder", lambda: b"little"),
        *((f"data/{i}", partial(load_bytes, *tensor)) for i, tensor in enumerate(tensors)),
        ("version", lambda: b"3\n"),
    ]
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, load in records:
                info = zipfile.ZipInfo(f"archive/{name}")  # its date is 1980, whatever the clock says
                start = file.tell() + 30 + len(info.filename) + 20 + 4  # header, name, zip64, the padding's own header
                info.extra = struct.pack("<HH", 0x4246, -start % 64) + b"Z" * (-start % 64)
                with archive.open(info, "w", force_zip64=True) as record:
                    record.write(load())
        sync_file(file)


def load_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], torch.Tensor]) -> memoryview:
    """Load a TensorToWrite and return its bytes, without a copy when it is contiguous on the CPU.

    Raise ValueError when it has another shape or dtype than announced, and NotFiniteError.
    """
    tensor = load()
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: loaded {tuple(tensor.shape)} {tensor.dtype}, wanted {tuple(shape)} {dtype} as announced"
        )
    if not is_finite(tensor):
        raise NotFiniteError(f"{name} holds NaN or an infinity as {str(dtype).removeprefix('torch.')}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
