"""All that engine.export writes: every file of a folder, every key of a GGUF, every tensor to the bit."""

import json
from dataclasses import replace

import pytest
import torch

from engine import export
from engine.base.errors import run_main
from engine.formats.adapters import hash_base, save_adapter
from engine.formats.save import save_hf
from engine.formats.source import open_source
from engine.model.adapter import AdapterConfig
from engine.model.config import ModelConfig, RopeScaling
from engine.model.llama import new_model
from engine.text.sentencepiece_file import SentencePieceModel, write_model
from tests.helpers.chat_tokenizers import LLAMA3, write_byte_level
from tests.helpers.spm_tokenizers import list_pieces, write_metaspace
from tests.helpers.transcripts import describe_files, describe_gguf, fill_exactly

SHAPE = ModelConfig(
    dim=32, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=264, max_seq_len=128, norm_eps=1e-5
)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


def write_byte_level_base(folder):
    """Write a model with llama3's RoPE and a byte-level tokenizer."""
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)
    write_byte_level(folder, LLAMA3, chat_template=TEMPLATE)
    return write_base(folder, replace(SHAPE, rope_theta=5000.0, rope_scaling=scaling, tied=True), 257, [258, 261])


def write_metaspace_base(folder):
    """Write a model with biases, wide heads and a tokenizer.json of SentencePiece's kind."""
    write_metaspace(folder, "first")
    scaling = RopeScaling(kind="linear", factor=4.0)
    shape = replace(SHAPE, rope_scaling=scaling, attention_bias=True, mlp_bias=True, head_dim=16, vocab_size=460)
    return write_base(folder, shape, 1, [2])


def write_plain_base(folder):
    """Write a model that Meta's layout can hold too, with an untied head and a tokenizer of SentencePiece's kind."""
    tokens, scores, types, _ = list_pieces()
    model = SentencePieceModel(tokens, scores, types, byte_fallback=True, has_prefix=True)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(write_model(model, {"unk": 0, "bos": 1, "eos": 2}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": TEMPLATE}))
    return write_base(folder, replace(SHAPE, vocab_size=416), 1, [2])


def write_base(folder, shape, bos_id, eos_ids):
    model = new_model(shape, "cpu", torch.float32)
    fill_exactly(model.parameters())
    options = {"do_sample": True, "temperature": 0.5, "top_p": 0.75, "top_k": 7}
    save_hf(folder, model, max_shard_bytes=10**9, bos_id=bos_id, eos_ids=eos_ids, generation_config=options)
    return folder


def write_updates(folder, base):
    """Write an adapter of unlike ranks and alphas of a base."""
    source = open_source(base)
    config = AdapterConfig(r=4, alpha=8.0, rank_pattern=(("down_proj", 2),), alpha_pattern=(("q_proj", 2.0),))
    model = new_model(source.config, "cpu", torch.float32, adapter=config)
    fill_exactly(model.trained_parameters().values())
    save_adapter(folder, model, str(base), hash_base(source))
    return folder


EXPORTS = {  # name: the flags and the base
    "shards in bf16": ("--dtype bf16 --max-shard-bytes 9000", write_byte_level_base),
    "hugging face": ("--tokenizer {base}", write_metaspace_base),
    "meta": ("--layout meta --dtype fp16", write_plain_base),
    "gguf": ("--layout gguf", write_byte_level_base),
    "q8_0": ("--layout gguf --gguf-type q8_0", write_plain_base),
    "merged": ("--adapter-dir {adapter} --merge --dtype bf16", write_byte_level_base),
    "gguf of an adapter": ("--adapter-dir {adapter} --layout gguf", write_byte_level_base),
    "narrow gguf of an adapter": ("--adapter-dir {adapter} --layout gguf --gguf-type f16", write_metaspace_base),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_what_an_export_writes_and_tells(name, tmp_path, capsys, snapshot):
    flags, write = EXPORTS[name]
    base = write(tmp_path / "base")
    adapter = write_updates(tmp_path / "adapter", base) if "{adapter}" in flags else None
    out = tmp_path / ("out.gguf" if "gguf" in flags else "out")
    words = f"--model {base} --out {out} {flags}".format(base=base, adapter=adapter).split()
    assert run_main(export.main, words) == 0
    written = describe_gguf(out) if out.suffix == ".gguf" else describe_files(out)
    assert f"{capsys.readouterr().out}{written}".replace(str(tmp_path), "FOLDER") == snapshot


def test_what_an_adapters_folder_holds(tmp_path, snapshot):
    base = write_metaspace_base(tmp_path / "base")
    written = describe_files(write_updates(tmp_path / "adapter", base))
    assert written.replace(str(tmp_path), "FOLDER") == snapshot
