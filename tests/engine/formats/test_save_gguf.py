"""GGUF files that we write: what is read back, bytes that repeat, q8_0's formula, and what GGUF cannot say."""

import dataclasses
import hashlib

import gguf
import numpy as np
import pytest
import torch

from engine import export
from engine.base.errors import UsageError, run_main
from engine.formats.gguf import open_gguf
from engine.formats.save_gguf import KINDS, save_gguf
from engine.formats.source import open_source
from engine.model.config import RopeScaling
from tests.helpers.checkpoints import BASE, SHAPES, random_model, read_model, same_weights

VOCABULARY = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]}
SCALINGS = {
    "llama3": RopeScaling(factor=8.0, original_max_seq_len=32),
    "linear": RopeScaling(kind="linear", factor=4.0),
    "yarn": RopeScaling(
        kind="yarn", factor=4.0, original_max_seq_len=32, attention_factor=1 + 0.1 * float(np.log(4.0))
    ),
}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(tmp_path, config, kind="f32", dtype=torch.float32, name="model.gguf"):
    model = random_model(config).to(dtype)
    save_gguf(tmp_path / name, model, VOCABULARY, kind)
    return model, tmp_path / name


@pytest.mark.parametrize(
    "name", sorted(SHAPES.keys() - {"dynamic-rope", "yarn-rope"})
)  # GGUF cannot say them, see below
def test_every_shape_is_read_back_bit_for_bit(name, tmp_path):
    config = SHAPES[name]
    model, path = write(tmp_path, config)
    source = open_source(path)
    assert source.config == config
    same_weights(read_model(path), model)


@pytest.mark.parametrize("kind", SCALINGS)
def test_scalings(kind, tmp_path):
    config = dataclasses.replace(BASE, max_seq_len=128, rope_scaling=SCALINGS[kind])
    _, path = write(tmp_path, config)
    read = open_source(path).config.rope_scaling
    if kind == "llama3":  # its factors are in the file, from which a length that gives them is found
        assert (read.kind, read.factor) == ("llama3", 8.0)
        return
    assert read == config.rope_scaling


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="dynamic", factor=2.0),
        dataclasses.replace(SCALINGS["yarn"], beta_fast=16.0),
        dataclasses.replace(SCALINGS["yarn"], attention_factor=1.0),
        dataclasses.replace(SCALINGS["yarn"], truncate=False),
    ],
    ids=("dynamic", "beta", "attention", "truncate"),
)
def test_what_llama_cpp_would_run_otherwise_is_refused(scaling, tmp_path):
    with pytest.raises(UsageError, match="knows no RoPE like"):
        write(tmp_path, dataclasses.replace(BASE, rope_scaling=scaling))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_out_in_and_out_again_is_the_same_file(kind, tmp_path):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    _, first = write(tmp_path, dataclasses.replace(BASE, dim=64, hidden_dim=96), kind, dtype)
    save_gguf(tmp_path / "again.gguf", read_model(first), VOCABULARY, kind)
    assert digest(first) == digest(tmp_path / "again.gguf")
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(first).tensors if len(tensor.shape) == 2}
    assert kinds == {KINDS[kind][0]}


def test_codes_of_q8_0(tmp_path):
    """d = max|x| / 127 rounded to fp16, codes round(x / d) in fp32; a matrix that no block divides stays in fp16."""
    config = dataclasses.replace(BASE, dim=64, hidden_dim=88)
    model, path = write(tmp_path, config, "q8_0")
    _, stored = open_gguf(path)
    read = torch.cat([rows for _, _, rows in stored["token_embd.weight"].blocks()])
    blocks = model.tok_embeddings.detach().reshape(-1, 32)
    d = blocks.abs().amax(1, keepdim=True) / 127
    codes = (blocks / d).round()
    assert (read.reshape(-1, 32) - codes * d.half().float()).abs().max() <= d.max() * 1e-6
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"


def test_a_disk_that_refuses_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write(tmp_path, BASE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--layout", "gguf", "--out", "folder"), "a GGUF is a file whose name ends in .gguf"),
        (("--out", "model.gguf"), "a GGUF is a file whose name ends in .gguf"),
        (("--gguf-type", "f16", "--out", "folder"), "--gguf-type is for --layout gguf"),
        (("--layout", "gguf", "--dtype", "bf16", "--out", "a.gguf"), "--dtype is for folders"),
    ],
)
def test_flags_that_do_not_fit(flags, said, capsys):
    assert run_main(export.main, list(flags)) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_there_stays(tmp_path, capsys):
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    assert run_main(export.main, ["--layout", "gguf", "--out", str(path)]) == 2
    assert path.read_text() == "mine" and "choose another name" in capsys.readouterr().err


def test_the_real_model_crosses_with_its_tokenizer(smollm2, tmp_path, capsys):
    """SmolLM2's GGUF of 4 bits, written in bf16: the ids of its tokenizer, and the split that it names."""
    path = tmp_path / "out.gguf"
    assert run_main(export.main, ["--layout", "gguf", "--out", str(path), "--gguf-type", "bf16"]) == 0
    assert "134.5M parameters, bf16" in capsys.readouterr().out
    ours, theirs = open_gguf(path)[0], open_gguf(smollm2)[0]
    for key in ("tokens", "token_type", "merges", "pre", "eos_token_id", "bos_token_id", "add_bos_token"):
        assert ours[f"tokenizer.ggml.{key}"] == theirs[f"tokenizer.ggml.{key}"], key
    assert ours["tokenizer.chat_template"] == theirs["tokenizer.chat_template"]
    assert ours["llama.rope.freq_base"] == theirs["llama.rope.freq_base"]
