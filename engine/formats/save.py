"""Our Transformer written as other programs read it: a Hugging Face folder, or Meta's."""

from pathlib import Path

import torch

from engine.base.errors import UsageError
from engine.formats.configs import config_to_hf, config_to_meta, token_ids
from engine.formats.folders import json_writer, replace_files
from engine.formats.names import halves_to_pairs, list_pieces
from engine.formats.tensor_files import write_pth, write_safetensors
from engine.model.llama import Transformer


def save_hf(
    folder: Path,
    model: Transformer,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    bos_id: int | None = None,
    eos_ids: tuple[int, ...] = (),
    generation_config: dict | None = None,
) -> None:
    """Writes config.json, generation_config.json and model.safetensors, or its shards of at most max_shard_bytes and
    their index, byte for byte as transformers' save_pretrained writes the weights. dtype: None keeps the model's.

    Raises OSError; the folder then holds what it held.
    """
    tensors = outgoing(model, "hf", dtype)
    shards = split(tensors, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    writers = {
        name: lambda path, shard=shard: write_safetensors(path, sorted(shard), {"format": "pt"})
        for name, shard in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        sizes = {"total_parameters": model.config.n_parameters, "total_size": sum(map(n_bytes, tensors))}
        where = {tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": sizes, "weight_map": dict(sorted(where.items()))}
        writers["model.safetensors.index.json"] = json_writer(index)
    ids = token_ids(bos_id, eos_ids)
    writers["generation_config.json"] = json_writer({**(generation_config or {}), **ids})
    writers["config.json"] = json_writer(config_to_hf(model.config, tensors[0][2], bos_id, eos_ids))
    replace_files(Path(folder), writers, r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def save_meta(folder: Path, model: Transformer, *, dtype: torch.dtype | None = None) -> None:
    """Writes params.json and consolidated.00.pth, which Meta's code reads. Raises UsageError for a shape that
    params.json cannot say, and OSError; the folder then holds what it held."""
    try:
        params = config_to_meta(model.config)
    except ValueError as error:
        raise UsageError(f"save_meta: {error}; write the Hugging Face layout") from error
    tensors = outgoing(model, "meta", dtype)
    if model.config.tied:  # Meta's code has a head of its own
        _, shape, kind, load = tensors[0]
        tensors.append(("output.weight", shape, kind, load))
    writers = {"consolidated.00.pth": lambda path: write_pth(path, tensors), "params.json": json_writer(params)}
    replace_files(Path(folder), writers, r"consolidated\.\d+\.pth")


def outgoing(model, program, dtype):
    """What write_* take, of the model in another program's names, order and layout."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dtype = dtype or parameters["tok_embeddings"].dtype

    def load(piece):
        rows = piece.of(parameters)
        if piece.paired_heads:
            rows = halves_to_pairs(rows, piece.paired_heads)
        return rows.to(dtype)

    table = list_pieces(model.config, program)
    return [(name, piece.shape, dtype, lambda piece=piece: load(piece)) for name, piece in table.items()]


def n_bytes(tensor):
    _, shape, dtype, _ = tensor
    return torch.Size(shape).numel() * dtype.itemsize


def split(tensors, max_bytes):
    """Shards of whole tensors in order, as huggingface_hub splits; a tensor over the limit has one of its own."""
    shards, size = [[]], 0
    for tensor in tensors:
        if n_bytes(tensor) > max_bytes:
            shards.insert(len(shards) - 1, [tensor])
            continue
        if size + n_bytes(tensor) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n_bytes(tensor)
    return [shard for shard in shards if shard]
