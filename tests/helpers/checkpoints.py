"""Small LLaMA checkpoints, made from random weights by us, by transformers, as Meta and as llama.cpp write them."""

import functools
import hashlib
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.base.errors import DataError
from engine.formats.names import list_pieces
from engine.formats.source import open_source
from engine.model.config import ModelConfig, RopeScaling
from engine.model.llama import new_model

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4  # on fp32 logits
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
YARN = RopeScaling(
    kind="yarn", factor=4.0, original_max_seq_len=32, attention_factor=0.1 * math.log(4.0) + 1.0, beta_fast=16.0
)
BASE = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=64, max_seq_len=128, norm_eps=1e-5
)
META = replace(BASE, n_heads=8, n_kv_heads=4, head_dim=4, max_seq_len=4096)
SHAPES = {
    "grouped": BASE,
    "llama3-rope": replace(BASE, rope_theta=5000.0, rope_scaling=LLAMA3),
    "linear-rope": replace(BASE, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "dynamic-rope": replace(BASE, rope_scaling=RopeScaling(kind="dynamic", factor=2.0), max_seq_len=32),
    "yarn-rope": replace(BASE, rope_scaling=YARN),
    "biases": replace(BASE, attention_bias=True, mlp_bias=True),
    "tied": replace(BASE, tied=True),
    "wide-heads": replace(BASE, head_dim=16),  # not dim / n_heads
    "one-kv-head": replace(BASE, n_kv_heads=1),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def random_model(config, dtype=torch.float32, seed=0):
    """Return our model with random weights whose logits are far from 0 and norms from 1."""
    model = new_model(config, "cpu", dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():  # logits far from 0, norms from 1
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator)) if "norm" in name else p.mul_(8)
            if p.ndim == 1 and "norm" not in name:
                p.normal_(std=0.1, generator=generator)
    return model


def make_theirs(config):
    """Return transformers' model of this shape, with weights of its own."""
    scaling = config.rope_scaling
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind in ("llama3", "yarn"):
            rope["original_max_position_embeddings"] = scaling.original_max_seq_len
        fields = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("attention_factor", "beta_fast")}
        rope |= {name: getattr(scaling, name) for name in fields.get(scaling.kind, ())}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, intermediate_size=config.hidden_dim, vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps, head_dim=config.head_dim,
            tie_word_embeddings=config.tied, rope_parameters=rope, initializer_range=0.2,
            attention_bias=config.attention_bias, mlp_bias=config.mlp_bias,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(0.1 * torch.randn_like(p))
    return theirs


def read_model(path, dtype=None):
    """Open a checkpoint and read it into a model that held NaN, so that a forgotten row shows."""
    source = open_source(path)
    model = new_model(source.config, "cpu", dtype or source.dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))  # what read_into forgets shows
    source.read_into(model)
    return model


def make_tokens(config, n=100):
    """Return n random tokens, the same ones each time."""
    return torch.randint(config.vocab_size, (n,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, tokens):
    """Return our model's logits of one document, (T, V)."""
    n = len(tokens)
    return model.logits(model(tokens, torch.arange(n), torch.tensor([[0, n, 0, 0]], dtype=torch.int32)))


@torch.no_grad()
def their_logits(theirs, tokens):
    """Return the logits of transformers' model, (T, V)."""
    return theirs.eval()(tokens[None]).logits[0]


def load_theirs(folder, **options):
    """Load a folder with transformers, which must find every tensor and no other."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return theirs


def hash_files(folder):
    """Return {name: sha256} of the files of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def same_weights(a, b):
    """Return whether two models' parameters are equal, bit for bit."""
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(a, b):
    """Assert that logits agree within TOLERANCE and are not all alike."""
    error = (a - b).abs().max().item()
    assert error <= TOLERANCE, f"logits differ by {error:.2e}"
    assert b.abs().max() > 0.5  # not all alike, so that agreeing says something


def assert_refused(path, *words):
    """Assert that open_source raises one DataError with all these words, and return its text."""
    with pytest.raises(DataError) as caught:
        open_source(path)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)


def to_meta_rows(weight, heads):
    """Return rows of which i and i + Dh/2 of a head have become 2i and 2i + 1; by a loop, unlike the engine."""
    head_dim = len(weight) // heads
    half = head_dim // 2
    return weight[[h * head_dim + side * half + i for h in range(heads) for i in range(half) for side in (0, 1)]]


def write_meta(folder, theirs, config, n, *, embedding_by_rows=False, **params):
    """Write a Meta folder of a transformers model, split over n model-parallel ranks as fairscale does."""
    state = theirs.state_dict()
    names = {
        "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
        "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
        "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
        "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
        "post_attention_layernorm": ("ffn_norm", None), "model.norm": ("norm", None), "lm_head": ("output", 0),
        "embed_tokens": ("tok_embeddings", 0 if embedding_by_rows else 1),
    }  # fmt: skip
    shards = [{"rope.freqs": torch.ones(config.head_dim // 2)} for _ in range(n)]
    for name, tensor in state.items():
        key = name.removesuffix(".weight")
        prefix, _, rest = key.removeprefix("model.").partition(".") if ".layers." in key else ("", "", key)
        if ".layers." in key:
            number, _, rest = rest.partition(".")
            prefix = f"layers.{number}."
        new, dim = names[rest.removeprefix("model.") if rest != "model.norm" else rest]
        if "wq" in new or "wk" in new:
            tensor = to_meta_rows(tensor, config.n_heads if "wq" in new else config.n_kv_heads)
        for shard, part in zip(shards, [tensor] * n if dim is None else tensor.chunk(n, dim), strict=True):
            shard[f"{prefix}{new}.weight"] = part.clone()
    folder.mkdir(exist_ok=True)
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "multiple_of": 32,
              "norm_eps": config.norm_eps, "n_kv_heads": config.n_kv_heads, "vocab_size": -1, **params}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))


def add_odd_tokenizer(writer, config):
    """Give a GGUF tokens that spell no text."""
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])


def write_gguf(
    path, theirs, config, *, quantise=None, add=None, drop=(), arch="llama", add_tokenizer=add_odd_tokenizer, **metadata
):
    """Write a GGUF as llama.cpp's converter does: q and k in Meta's order, through the gguf package's own writer."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch)
    add_tokenizer(writer, config)
    values = {
        "block_count": config.n_layers, "embedding_length": config.dim, "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads, "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim, "context_length": config.max_seq_len,
        "vocab_size": config.vocab_size, **metadata,
    }  # fmt: skip
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"llama.{key}", value)
        elif value is not None:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_theta)
    scaling = config.rope_scaling
    if scaling and scaling.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling and scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)
        writer.add_rope_scaling_yarn_attn_factor(scaling.attention_factor)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
    for name, new in zip(list_pieces(config, "hf"), list_pieces(config, "gguf"), strict=True):
        tensor = theirs.state_dict()[name]
        if "attn_q" in new or "attn_k" in new:
            tensor = to_meta_rows(tensor, config.n_heads if "attn_q" in new else config.n_kv_heads)
        array = np.ascontiguousarray(tensor.numpy())
        if new in drop:
            continue
        if quantise and array.ndim == 2:
            kind = getattr(gguf.GGMLQuantizationType, quantise)
            writer.add_tensor(new, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(new, array)
    for name, array in (add or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rewrite_safetensors(path, change):
    """Write a file again after change(its tensors)."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@functools.cache
def cached_gguf_tools():
    """Return the functions of the gguf package that transformers calls again and again, each with a cache."""
    gguf = pytest.importorskip("gguf")
    return {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}


def cache_gguf_parsing(monkeypatch):
    """Make transformers parse a GGUF once; else it does so twice, and looks up the same names 400 times."""
    for name, cached in cached_gguf_tools().items():
        monkeypatch.setattr(sys.modules["gguf"], name, cached)
