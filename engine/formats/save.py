"""Our Transformer written as other programs read it: as a Hugging Face folder, or as Meta's."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.base.errors import UsageError
from engine.base.watching import Watch, watch_silently
from engine.formats.configs import config_to_hf, config_to_meta, token_ids_to_hf
from engine.formats.folders import make_json_writer, replace_files
from engine.formats.names import Piece, halves_to_pairs, list_pieces
from engine.formats.tensor_files import TensorToWrite, write_pth, write_safetensors
from engine.model.llama import Transformer


def save_hf(
    folder: Path,
    model: Transformer,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    generation_config: dict[str, Any] | None = None,
    watch: Watch = watch_silently,
) -> None:
    """Write config.json, generation_config.json and the weights, byte for byte as transformers' save_pretrained does.

    The weights are one model.safetensors, or several files of at most max_shard_bytes and their index. dtype: None
    keeps the model's. Raise OSError; the folder then holds what it held before.
    """
    tensors = list_tensors(model, "hf", dtype)
    with watch("writing", sum(map(count_elements, tensors))) as advance:
        files = split_into_files(count_loads(tensors, advance), max_shard_bytes)
        names = ["model.safetensors"]
        if len(files) > 1:
            names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        writers: dict[str, Callable[[Path], object]] = dict(zip(names, map(make_weights_writer, files), strict=True))
        if len(files) > 1:
            sizes = {"total_parameters": model.config.n_parameters, "total_size": sum(map(count_bytes, tensors))}
            file_of = {tensor[0]: name for name, file in zip(names, files, strict=True) for tensor in file}
            index = {"metadata": sizes, "weight_map": dict(sorted(file_of.items()))}
            writers["model.safetensors.index.json"] = make_json_writer(index)
        ids = token_ids_to_hf(bos_id, eos_ids)
        writers["generation_config.json"] = make_json_writer({**(generation_config or {}), **ids})
        # The last name: without config.json, a folder is no model (see replace_files).
        writers["config.json"] = make_json_writer(config_to_hf(model.config, tensors[0][2], bos_id, eos_ids))
        replace_files(Path(folder), writers, r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def save_meta(
    folder: Path, model: Transformer, *, dtype: torch.dtype | None = None, watch: Watch = watch_silently
) -> None:
    """Write params.json and consolidated.00.pth, which Meta's code reads. dtype: None keeps the model's.

    Raise UsageError for a shape that params.json cannot express, and OSError; in both cases the folder then holds what
    it held before.
    """
    try:
        params = config_to_meta(model.config)
    except ValueError as error:
        raise UsageError(f"save_meta: {error}; write the Hugging Face layout") from error
    tensors = list_tensors(model, "meta", dtype)
    if model.config.tied:  # Meta's code does not tie them and reads a head
        _, shape, kind, load = tensors[0]
        tensors.append(("output.weight", shape, kind, load))
    with watch("writing", sum(map(count_elements, tensors))) as advance:
        counted = count_loads(tensors, advance)
        writers = {
            "consolidated.00.pth": lambda path: write_pth(path, counted),
            "params.json": make_json_writer(params),
        }
        replace_files(Path(folder), writers, r"consolidated\.\d+\.pth")


def list_tensors(model: Transformer, program: str, dtype: torch.dtype | None) -> list[TensorToWrite]:
    """Return a model's tensors under another program's names, in its order and its layout of rows."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dtype = dtype or parameters["tok_embeddings"].dtype

    def load(piece: Piece) -> torch.Tensor:
        rows = piece.rows_of(parameters)
        if piece.paired_heads:
            rows = halves_to_pairs(rows, piece.paired_heads)
        return rows.to(dtype)

    pieces = list_pieces(model.config, program)
    return [(name, piece.shape, dtype, partial(load, piece)) for name, piece in pieces.items()]


def count_loads(tensors: Sequence[TensorToWrite], advance: Callable[[int], None]) -> list[TensorToWrite]:
    """Return tensors that are counted when they are loaded, which is when the one before has been written."""

    def load_and_count(load: Callable[[], torch.Tensor]) -> torch.Tensor:
        tensor = load()
        advance(tensor.numel())
        return tensor

    return [(name, shape, dtype, partial(load_and_count, load)) for name, shape, dtype, load in tensors]


def count_elements(tensor: TensorToWrite) -> int:
    """Return how many values a tensor has."""
    return torch.Size(tensor[1]).numel()


def count_bytes(tensor: TensorToWrite) -> int:
    """Return the size of a tensor in a file."""
    return count_elements(tensor) * tensor[2].itemsize


def split_into_files(tensors: list[TensorToWrite], max_bytes: int) -> list[list[TensorToWrite]]:
    """Split tensors, in their order, over files of at most max_bytes, as huggingface_hub does.

    A tensor that is larger gets a file of its own.
    """
    files: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in tensors:
        if count_bytes(tensor) > max_bytes:
            files.insert(len(files) - 1, [tensor])  # before the file that is being filled
            continue
        if size + count_bytes(tensor) > max_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += count_bytes(tensor)
    return [file for file in files if file]


def make_weights_writer(tensors: list[TensorToWrite]) -> Callable[[Path], object]:
    """Return a function that writes tensors to a path as transformers does: sorted by name, with "pt" as format."""
    return lambda path: write_safetensors(path, sorted(tensors), {"format": "pt"})
