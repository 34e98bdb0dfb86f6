"""Our Transformer, or an adapter of one, written as a GGUF file, which llama.cpp and what is built on it read.

    type    matrices                          vectors (norms, biases, factors of RoPE)
    f32     fp32                              fp32
    f16     fp16                              fp32
    bf16    bf16                              fp32
    q8_0    blocks of 32: an fp16 scale d and   fp32
            codes round(x / d), d = max|x| / 127

Rows of q and k stand in neighbouring pairs, as llama.cpp rotates them. A matrix whose rows are no multiple of 32 stays
in fp16 under q8_0. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from engine.base.errors import UsageError
from engine.base.files import sync_file
from engine.base.watching import Watch, watch_silently
from engine.formats.folders import replace_files
from engine.formats.names import LAYER_NAMES, Piece, halves_to_pairs, list_pieces
from engine.model.adapter import AdapterConfig, Update, list_updates
from engine.model.config import ModelConfig, RopeScaling
from engine.model.llama import Transformer
from engine.model.rope import frequencies, yarn_attention_factor

KINDS = {"f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "bf16": ("BF16", "MOSTLY_BF16"),
         "q8_0": ("Q8_0", "MOSTLY_Q8_0")}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to write: its shape, slowest axis first, and a function that makes its values."""

    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


def save_gguf(
    path: Path, model: Transformer, vocabulary: dict[str, Any], kind: str, watch: Watch = watch_silently
) -> None:
    """Write a model as one file. vocabulary: the tokenizer's metadata; kind: one of KINDS.

    Raise UsageError for a shape that GGUF cannot express and where the gguf package is missing, and OSError; the path
    then holds what it held before.
    """
    write_gguf(path, list_gguf_tensors(model), describe_model(model.config) | vocabulary, kind, watch)


def save_gguf_adapter(
    path: Path, config: ModelConfig, adapter: AdapterConfig, factors: Mapping[str, torch.Tensor], kind: str
) -> None:
    """Write the updates of a model of this shape as llama.cpp's --lora reads them. kind: one of KINDS but q8_0.

    factors: {our parameter: its values}. llama.cpp scales an update by alpha / rank with one alpha for all, so B of an
    update of another alpha is multiplied by the quotient. Raise UsageError as save_gguf(), and for parameters that were
    trained whole.
    """
    if adapter.saved:
        raise UsageError(f"--layout gguf: a GGUF adapter cannot hold {', '.join(adapter.saved)}; add --merge")
    if kind == "q8_0":
        raise UsageError("--gguf-type q8_0: factors are narrower than its blocks of 32; choose f16, bf16 or f32")
    updates = list_updates(config, adapter)
    alpha = updates[0].scale * updates[0].rank
    heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}
    names = {  # {path in a layer at Hugging Face: llama.cpp's name}
        theirs[0].removesuffix(".weight"): theirs[2] for theirs in LAYER_NAMES.values()
    }

    def load_b(update: Update) -> torch.Tensor:
        b = factors[update.b].float() * (update.scale * update.rank / alpha)
        return halves_to_pairs(b, heads[update.path]) if update.path in heads else b

    tensors = {}
    for u in updates:
        name = f"blk.{u.layer}.{names[u.path]}"
        a = factors[u.a][u.first_rank : u.first_rank + u.rank]
        tensors[f"{name}.lora_a"] = GGUFTensor((u.rank, u.columns), a.clone)
        tensors[f"{name}.lora_b"] = GGUFTensor((u.rows, u.rank), partial(load_b, u))
    write_gguf(path, tensors, {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}, kind)


def describe_model(config: ModelConfig) -> dict[str, Any]:
    """Return the metadata of a shape. Raise UsageError for one that GGUF cannot express."""
    return {
        "general.type": "model",
        "llama.block_count": config.n_layers,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.rope.freq_base": float(config.rope_theta),
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.vocab_size": config.vocab_size,
        "llama.rope.dimension_count": config.head_dim,
        **describe_rope(config.rope_scaling),
    }


def describe_rope(scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the metadata of a scaling. That of llama3 is in a tensor. Raise UsageError for one that GGUF has not."""
    prefix = "llama.rope.scaling."
    if scaling is None or scaling.kind == "llama3":
        return {}
    if scaling.kind == "linear":
        return {f"{prefix}type": "linear", f"{prefix}factor": float(scaling.factor)}
    usual = RopeScaling(
        kind="yarn", factor=scaling.factor, original_max_seq_len=scaling.original_max_seq_len,
        attention_factor=yarn_attention_factor(scaling.factor),
    )  # fmt: skip
    if scaling != usual:
        raise UsageError(
            f"--layout gguf: llama.cpp's llama knows no RoPE like {scaling}; wanted linear, llama3 or the usual yarn"
        )
    return {
        f"{prefix}type": "yarn", f"{prefix}factor": float(scaling.factor),
        f"{prefix}original_context_length": scaling.original_max_seq_len,
    }  # fmt: skip


def write_gguf(
    path: Path,
    tensors: Mapping[str, GGUFTensor],
    metadata: dict[str, Any],
    kind: str,
    watch: Watch = watch_silently,
) -> None:
    """Write the file, one tensor after the other. Raise UsageError without the gguf package."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError("--layout gguf wants the gguf package; pip install 'cria-engine[gguf]'") from error
    quantisation, file_type = KINDS[kind]
    types = {name: choose_type(gguf, quantisation, tensor.shape) for name, tensor in tensors.items()}

    def write(file: Path) -> None:
        writer = gguf.GGUFWriter(file, "llama")
        for key, value in metadata.items():
            add_value(writer, key, value)
        writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, tensor in tensors.items():
            n_elements, n_bytes = gguf.GGML_QUANT_SIZES[types[name]]
            size = int(np.prod(tensor.shape)) // n_elements * n_bytes
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        label = "quantising" if kind == "q8_0" else "writing"
        with watch(label, sum(int(np.prod(tensor.shape)) for tensor in tensors.values())) as advance:
            for name, tensor in tensors.items():
                rows = tensor.load().float().contiguous().numpy()
                writer.write_tensor_data(np.ascontiguousarray(gguf.quantize(rows, types[name])))
                advance(rows.size)
        writer.close()
        with file.open("rb") as written:  # the package waits for no disk
            sync_file(written)

    path = Path(path)
    replace_files(path.parent, {path.name: write}, r"(?!)")


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add a number, a bool, a text, or a list of one kind of these to the metadata."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def choose_type(gguf: Any, quantisation: str, shape: tuple[int, ...]) -> Any:
    """Return how a tensor is stored: vectors in fp32, and a matrix whose rows no block divides in fp16."""
    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    divides = shape[-1] % gguf.GGML_QUANT_SIZES[types[quantisation]][0] == 0
    return types[quantisation] if divides else types.F16


FACTORS = "rope_freqs.weight"


def list_gguf_tensors(model: Transformer) -> dict[str, GGUFTensor]:
    """Return a model's tensors by their names in the file."""
    config, parameters = model.config, {name: p.detach() for name, p in model.named_parameters()}

    def load(piece: Piece) -> torch.Tensor:
        rows = piece.rows_of(parameters)
        return halves_to_pairs(rows, piece.paired_heads) if piece.paired_heads else rows

    tensors = {name: GGUFTensor(p.shape, partial(load, p)) for name, p in list_pieces(config, "gguf").items()}
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        tensors[FACTORS] = GGUFTensor((config.head_dim // 2,), partial(rope_factors, config))
    return tensors


def rope_factors(config: ModelConfig) -> torch.Tensor:
    """Return by what llama3's scaling divides each frequency of RoPE."""
    scaled = frequencies(config.head_dim, config.rope_theta, config.rope_scaling).double()
    return kernels.rope_frequencies(config.head_dim, config.rope_theta).double() / scaled
