"""Broken and hostile checkpoints: each is refused in one error that lists all problems, before memory is taken."""

import json
import os
import random
import struct
import tracemalloc
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from engine.base.errors import DataError
from engine.formats.save import save_hf
from engine.formats.source import OPENERS, open_source
from engine.model.llama import new_model
from tests.helpers.checkpoints import (
    BASE,
    META,
    assert_refused,
    make_theirs,
    random_model,
    read_model,
    rewrite_safetensors,
    same_weights,
    write_gguf,
    write_meta,
)


@pytest.fixture
def folder(tmp_path):
    """A sound sharded checkpoint to break."""
    save_hf(tmp_path / "model", random_model(BASE), max_shard_bytes=40_000, bos_id=1, eos_ids=(2,))
    return tmp_path / "model"


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def frame(header: bytes, data=b""):
    return len(header).to_bytes(8, "little") + header + data


def holder(folder, name):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def shard(folder, i=1):
    return sorted(folder.glob("model-*.safetensors"))[i]


def test_truncated_shards_and_bad_headers(folder):
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
        message = assert_refused(folder, shard(folder).name)
        assert "1 problems" not in message and tracemalloc.get_traced_memory()[1] < 2_000_000
        tracemalloc.stop()


def test_a_header_that_claims_a_real_gigabyte(folder):
    """A sparse file big enough for its claim is refused before a byte of it is read."""
    with shard(folder).open("r+b") as file:
        file.write((1_000_000_000).to_bytes(8, "little"))
        file.truncate(2_000_000_000)
    assert_refused(folder, shard(folder).name, "the header claims 1000000000")


def test_every_mismatch_at_once(folder):
    first, last = holder(folder, "model.embed_tokens.weight"), holder(folder, "model.norm.weight")
    assert first != last
    rewrite_safetensors(
        first, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(65, 32), "surprise": torch.zeros(1)})
    )
    rewrite_safetensors(last, lambda t: t.pop("model.norm.weight"))
    rewrite_safetensors(last, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    head = holder(folder, "lm_head.weight")
    rewrite_safetensors(head, lambda t: t.update({"lm_head.weight": torch.zeros(64, 32, dtype=torch.int8)}))
    rewrite_safetensors(head, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(65, 32)}))
    message = assert_refused(
        folder,
        f"{head.name}: model.embed_tokens.weight is in {first.name} too",
        "model.embed_tokens.weight is (65, 32), wanted (64, 32)",
        f"{first.name}: surprise (1,) is not wanted",
        f"model.norm.weight is not in {last.name}",
        "model.norm.weight is missing",
        f"{last.name}: model.layers.0.self_attn.q_proj.bias (32,) is not wanted: the config has no bias there",
        f"{head.name}: lm_head.weight is of type torch.int8",
        "7 problems",
    )
    assert str(folder) in message


def test_shapes_against_the_config_before_allocation(folder):
    edit(folder / "config.json", lambda c: c.update(vocab_size=10**12, num_hidden_layers=3))
    tracemalloc.start()
    assert_refused(folder, "wanted (1000000000000, 32)", "model.layers.2.mlp.up_proj.weight is missing")
    edit(folder / "config.json", lambda c: c.update(num_hidden_layers=10**12))
    assert_refused(folder, "1000000000000 layers")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_missing_shard_and_what_else_is_wrong(folder):
    names = set(load_file(shard(folder)))
    gone = shard(folder).name
    shard(folder).unlink()
    rewrite_safetensors(shard(folder, 0), lambda t: t.update(surprise=torch.zeros(1)))
    message = assert_refused(folder, f"{gone} is missing", "surprise (1,) is not wanted", "2 problems")
    assert not any(name in message for name in names)  # told by their file


def test_no_weights_no_config(tmp_path):
    assert_refused(tmp_path, "wanted a folder with config.json")
    assert_refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "config.json").write_text("{}")
    assert_refused(tmp_path, "only LLaMA is read", "no weights", "2 problems")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "c:x", "a\0b", "\ud800"]
)
def test_index_with_paths(folder, name):
    (folder.parent / "x.safetensors").write_bytes(shard(folder).read_bytes())
    edit(folder / "model.safetensors.index.json", lambda i: i["weight_map"].update({"model.norm.weight": name}))
    assert_refused(folder, repr(name), "refused")


def test_links_that_lead_out(folder):
    outside = folder.parent / "outside.safetensors"
    link = shard(folder)
    os.rename(link, outside)
    link.symlink_to("../outside.safetensors")
    assert_refused(folder, "a link out of the folder")
    for name in ("config.json", "generation_config.json"):
        os.rename(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)
    assert_refused(folder, "config.json is a link out of", "generation_config.json is a link out of")


def test_links_that_may_be_followed(folder):
    link = shard(folder)
    os.rename(link, folder / "real.safetensors")
    link.symlink_to("real.safetensors")
    linked = folder.parent / "linked"
    linked.symlink_to(folder)
    assert same_weights(read_model(linked), random_model(BASE))
    link.unlink()
    link.symlink_to(link.name)  # a loop
    assert_refused(folder, "a link to nothing")


def test_the_hub_cache(folder):
    """snapshots/<revision>/x -> ../../blobs/<sha> is how Hugging Face keeps models; farther out is not."""
    cache = folder.parent / "models--some--llama"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        os.rename(path, cache / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert same_weights(read_model(snapshot), random_model(BASE))
    os.rename(cache / "blobs" / "0", folder.parent / "config.json")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../config.json")
    assert_refused(snapshot, "config.json is a link out of the folder")


def test_a_fifo_is_no_file(folder):
    path = shard(folder)
    path.unlink()
    os.mkfifo(path)
    assert_refused(folder, "is not a file")


class Payload:
    """An object whose pickle opens a file for writing, when code of a pickle runs."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_malicious_pth(folder, tmp_path, name):
    for path in folder.glob("model*"):
        path.unlink()
    if name.startswith("consolidated"):
        (folder / "config.json").unlink()
        (folder / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 2, "n_heads": 4}))
    torch.save({"model.norm.weight": torch.ones(32), "x": Payload(tmp_path / "ran")}, folder / name)
    assert_refused(folder, name, "weights_only")
    assert not (tmp_path / "ran").exists()
    torch.load(folder / name, weights_only=False)  # and it would have run
    assert (tmp_path / "ran").exists()


def test_meta_shards_and_params(tmp_path):
    theirs = make_theirs(META)

    def fresh(n=4):
        for path in tmp_path.glob("*"):
            path.unlink()
        write_meta(tmp_path, theirs, META, n)

    fresh()
    (tmp_path / "consolidated.01.pth").unlink()
    assert_refused(tmp_path, "consolidated.01.pth is missing")
    fresh()
    (tmp_path / "consolidated.03.pth").unlink()
    assert_refused(tmp_path, "one of 4 shards", "there are 3")
    fresh()
    for i in (1, 2):
        (tmp_path / f"consolidated.0{i}.pth").unlink()
    assert_refused(tmp_path, "consolidated.01.pth, consolidated.02.pth is missing; there are consolidated.00.pth, cons")
    fresh(2)
    (tmp_path / "consolidated.01.pth").rename(tmp_path / "consolidated.03.pth")
    assert_refused(tmp_path, "consolidated.01.pth, consolidated.02.pth is missing; there are consolidated.00.pth, cons")
    fresh(2)
    (tmp_path / "params.json").write_text('{"dim": 32,')
    (tmp_path / "consolidated.01.pth").write_bytes((tmp_path / "consolidated.01.pth").read_bytes()[:5000])
    assert_refused(tmp_path, "params.json: not sound JSON", "consolidated.01.pth: not a sound torch file", "2 problems")
    fresh(2)
    one = torch.load(tmp_path / "consolidated.01.pth")
    one["norm.weight"] = torch.ones(33)
    del one["layers.0.attention.wq.weight"]
    torch.save(one, tmp_path / "consolidated.01.pth")
    assert_refused(
        tmp_path, "norm.weight: shards disagree", "attention.wq.weight is in consolidated.00.pth alone", "2 problems"
    )
    fresh(1)
    edit(tmp_path / "params.json", lambda p: p.update(n_heads="eight", norm_eps=float("nan"), moe_args={"n": 8}))
    assert_refused(tmp_path, "n_heads is 'eight'", "norm_eps", "moe_args", "3 problems")
    edit(tmp_path / "params.json", lambda p: (p.pop("moe_args"), p.update(n_heads=8, norm_eps=1e-5, vocab_size=63)))
    assert_refused(tmp_path, "tok_embeddings.weight is (64, 32), wanted (63, 32)", "output.weight", "2 problems")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "a qwen2 Qwen2ForCausalLM; only LLaMA"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification; only LLaMA"),
        ({"architectures": 7}, "only LLaMA"),
        ({"attention_bias": 1, "mlp_bias": "no", "hidden_act": "gelu", "sliding_window": 4096}, "4 problems"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: weights quantised by gptq"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is float8_e4m3fn; weights of this type are not read"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "sliding_window is 4096"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 32}, "sliding_window is 32"),
        ({"model_type": "mistral", "architectures": ["LlamaForCausalLM"]}, "only LLaMA is read"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "RoPE of type 'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
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
    assert_refused(folder, words)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN', "[" * 100_000, "\xff", '{"a": ' + "9" * 5000 + "}"])
def test_broken_json(folder, text):
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        (folder / name).write_text(text, encoding="latin-1")
    assert_refused(folder, "config.json: ", "generation_config.json: ", "model.safetensors.index.json: ")


def test_an_index_may_name_what_no_reader_wants(folder):
    """As files of 2023 do, whose frequencies are computed now."""
    index = folder / "model.safetensors.index.json"
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(index, lambda raw: raw["weight_map"].update({frequencies: shard(folder).name}))
    open_source(folder)
    edit(index, lambda raw: raw["weight_map"].update({"model.layers.0.more.weight": shard(folder).name}))
    assert_refused(folder, f"index.json: model.layers.0.more.weight is not in {shard(folder).name}")


def test_index_that_is_none(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    assert_refused(folder, "weight_map is missing or not an object of file names")


def test_bit_flips_never_crash(tmp_path):
    """Anything but a sound read or a DataError fails, and so does memory out of proportion."""
    generator, folder = random.Random(0), tmp_path / "model"
    hf, meta = (replace(config, n_layers=1) for config in (BASE, META))
    save_hf(folder, random_model(hf), max_shard_bytes=40_000, bos_id=1, eos_ids=(2,))
    gguf = write_gguf(tmp_path / "m.gguf", make_theirs(hf), hf)
    write_meta(tmp_path / "meta", make_theirs(meta), meta, 1)
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


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), KeyError("dim"), struct.error("short"), ValueError()]
)
def test_whatever_a_reader_raises_of_damage_names_the_model(error, tmp_path, monkeypatch):
    def fail(path, problems):
        raise error

    (tmp_path / "model.gguf").touch()
    monkeypatch.setitem(OPENERS, "gguf", fail)
    with pytest.raises(DataError, match=r"model\.gguf: the model: is damaged, or not what it should be"):
        open_source(tmp_path / "model.gguf")
