"""GGUF files as the gguf package writes them: parity with transformers, every quantisation, every fault refused."""

import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.base.errors import DataError, UsageError
from engine.formats.gguf import open_gguf
from engine.formats.source import open_source
from engine.model.config import RopeScaling
from engine.model.llama import new_model
from tests.helpers.checkpoints import (
    BASE,
    assert_close,
    assert_refused,
    logits,
    make_theirs,
    make_tokens,
    read_model,
    shapes,
    their_logits,
    write_gguf,
)


@shapes
def test_reads_gguf(config, tmp_path):
    factors = {}
    llama3 = config.rope_scaling and config.rope_scaling.kind == "llama3"
    if llama3:
        config = replace(config, rope_theta=500000.0, rope_scaling=RopeScaling(factor=32.0))
    if config.rope_scaling and config.rope_scaling.kind == "dynamic":
        pytest.skip("GGUF has no word for it")
    theirs = make_theirs(config)
    if llama3:  # llama.cpp bakes the scaling into a tensor
        plain = 1 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        factors = {"rope_freqs.weight": (plain / theirs.model.rotary_emb.inv_freq.numpy()).astype(np.float32)}
        assert factors["rope_freqs.weight"].max() > 2
    path = write_gguf(tmp_path / "m.gguf", theirs, config, add=factors)
    source, tokens = open_source(path), make_tokens(config)
    assert (source.kind, source.config) == ("gguf", config)
    assert_close(logits(read_model(path), tokens), their_logits(theirs, tokens))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_gguf(kind, tmp_path):
    gguf, theirs = pytest.importorskip("gguf"), make_theirs(BASE)
    path = write_gguf(tmp_path / "m.gguf", theirs, BASE, quantise=kind)
    want = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    source = open_source(path)
    assert source.dtype == want
    up = theirs.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    number = gguf.GGMLQuantizationType[kind]
    there_and_back = torch.from_numpy(gguf.dequantize(gguf.quantize(up, number), number))
    assert torch.equal(read_model(path, torch.float32).layers[1].w13[BASE.hidden_dim :], there_and_back)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc/self/smaps, which is Linux's")
def test_what_has_been_read_of_a_gguf_counts_as_memory_no_longer(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_theirs(BASE), BASE)
    source = open_source(path)  # holds the file open
    source.read_into(new_model(BASE, "cpu", torch.float32))
    entry = Path("/proc/self/smaps").read_text().partition(str(path))[2]
    assert re.search(r"^Size: +(\d+) kB", entry, re.MULTILINE)[1] == str(-(-path.stat().st_size // 4096) * 4)
    assert re.search(r"^Rss: +(\d+) kB", entry, re.MULTILINE)[1] == "0"


def test_gguf_faults(tmp_path):
    theirs, path = make_theirs(BASE), tmp_path / "m.gguf"

    def fails(words, **options):
        path.unlink(missing_ok=True)
        write_gguf(path, theirs, BASE, **options)
        assert_refused(path, *words)

    fails(["general.architecture is 'falcon'"], arch="falcon")
    fails(["mixtures of experts"], expert_count=8)
    fails(["blk.1.attn_q.bias", "no bias there"], add={"blk.1.attn_q.bias": np.zeros(32, np.float32)})
    fails(["ffn_gate_inp"], add={"blk.0.ffn_gate_inp.weight": np.zeros((8, 32), np.float32)})
    fails(
        ["blk.1.ffn_up.weight is missing", "output_norm.weight is missing"],
        drop=["blk.1.ffn_up.weight", "output_norm.weight"],
    )
    fails(["rope_freqs.weight holds factors"], add={"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)})
    fails(["wanted fp32"], add={"rope_freqs.weight": np.ones(7, np.float32)})
    fails(["rope_freqs.weight is (4,) I8, wanted fp32"], add={"rope_freqs.weight": np.ones(4, np.int8)})
    fails(["scaling.type is 'longrope'"], **{"rope.scaling.type": "longrope"})
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
    assert_refused(path, "m.gguf", "truncated")
    for version in (0, 1, 4, 3 << 24):  # the last is that of a big-endian file
        path.write_bytes(whole[:4] + version.to_bytes(4, "little") + whole[8:])
        assert_refused(path, f"version {version}, wanted 2 or 3")
    path.write_bytes(b"")
    assert_refused(path, "m.gguf")


def test_gguf_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'cria-engine\[gguf\]'"):
        open_source(tmp_path / "m.gguf")


def test_a_bias_that_a_gguf_lacks_is_none(tmp_path):
    """As that of attn_output in models whose q, k and v alone have one."""
    config, path = replace(BASE, attention_bias=True), tmp_path / "m.gguf"
    theirs = make_theirs(config)
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    write_gguf(path, theirs, config, drop=["blk.0.attn_output.bias", "blk.1.attn_output.bias"])
    tokens = make_tokens(config)
    assert_close(logits(read_model(path), tokens), their_logits(theirs, tokens))


def flip(path, raw, at, bit):
    """Write the bytes with one bit changed."""
    changed = bytearray(raw)
    changed[at] ^= 1 << bit
    path.write_bytes(changed)


def find_infos(raw, n_dims_of):
    """Return where the info of each tensor has its number of dimensions, and how many bytes follow."""
    return {raw.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name): 4 + 8 * n_dims + 4 + 8
            for name, n_dims in n_dims_of.items()}  # fmt: skip


@pytest.mark.parametrize("quantise", [None, "Q8_0"])
def test_no_flipped_bit_of_a_tensors_place_loads_other_weights(quantise, tmp_path):
    path, config = tmp_path / "m.gguf", replace(BASE, n_layers=1)
    raw = write_gguf(path, make_theirs(config), config, quantise=quantise).read_bytes()
    _, tensors = open_gguf(path)
    read, n_tried = [], 0
    dims_of = {name: len(tensor.shape) for name, tensor in list(tensors.items())[-4:]}
    for start, length in find_infos(raw, dims_of).items():
        for at in (start, *range(start + length - 12, start + length)):  # dimensions; kind and offset
            for bit in range(8):
                flip(path, raw, at, bit)
                n_tried += 1
                try:
                    open_gguf(path)
                    read.append((at - start, bit))
                except DataError as error:
                    assert "m.gguf" in str(error)
    assert (read, n_tried) == ([], 4 * 13 * 8)


def test_a_damaged_key_is_not_its_default(tmp_path):
    """Of a key's name and of its kind."""
    path, config = tmp_path / "m.gguf", replace(BASE, rope_theta=500000.0)
    raw = write_gguf(path, make_theirs(config), config, **{"rope.scaling.factor": 4.0}).read_bytes()
    for key in (b"llama.rope.freq_base", b"llama.rope.scaling.factor"):
        start = raw.index(key)
        for at in range(start, start + len(key) + 4):
            for bit in range(8):
                flip(path, raw, at, bit)
                try:
                    assert open_source(path).config == replace(config, rope_scaling=RopeScaling(4.0, kind="linear"))
                except DataError as error:
                    assert "m.gguf" in str(error)


def test_a_gguf_ends_with_its_last_tensor_and_has_zeros_between(tmp_path):
    path, config = tmp_path / "m.gguf", replace(BASE, n_layers=1)
    raw = write_gguf(path, make_theirs(config), config, name="tiny").read_bytes()
    path.write_bytes(raw + bytes(32))
    assert_refused(path, "m.gguf", "its tensors end at")
    path.write_bytes(raw)
    _, tensors = open_gguf(path)
    header_end = sum(max(find_infos(raw, {name: len(tensor.shape) for name, tensor in tensors.items()}).items()))
    padding = -header_end % 32
    assert padding
    path.write_bytes(raw[:header_end] + b"\1" * padding + raw[header_end + padding :])
    assert_refused(path, "m.gguf", "belong to no tensor")


def test_an_alignment_of_a_gguf_is_a_power_of_two(tmp_path):
    path = tmp_path / "m.gguf"
    for alignment in (0, 33, 48):
        write_gguf(
            path,
            make_theirs(BASE),
            BASE,
            add_tokenizer=lambda writer, _, n=alignment: writer.add_uint32("general.alignment", n),
        )
        assert_refused(path, f"general.alignment is {alignment}", "a power of two")


def test_what_comes_twice_is_refused(tmp_path):
    """A value, of which one would silently count, and a tensor."""
    path = tmp_path / "m.gguf"
    raw = write_gguf(path, make_theirs(BASE), BASE).read_bytes()
    (n_values,) = struct.unpack_from("<Q", raw, 16)
    key = b"general.architecture"
    twice = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 24) + b"x" * 24  # a text; 64 bytes in all
    path.write_bytes(raw[:16] + struct.pack("<Q", n_values + 1) + twice + raw[24:])
    assert_refused(path, "m.gguf", "two values of general.architecture")
    path.write_bytes(raw.replace(b"blk.0.attn_norm.weight", b"blk.1.attn_norm.weight"))
    assert_refused(path, "m.gguf", "two tensors named blk.1.attn_norm.weight")
