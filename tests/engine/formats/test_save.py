"""Checkpoints written for other programs: what they read, bytes that repeat, and a save that fails or is killed."""

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.base.errors import DataError, UsageError
from engine.formats import configs, save
from engine.formats.save import save_hf, save_meta
from engine.formats.source import open_source
from engine.formats.tensor_files import write_safetensors
from engine.model.config import RopeScaling
from tests.helpers.checkpoints import (
    BASE,
    META,
    SHAPES,
    TOLERANCE,
    assert_close,
    hash_files,
    load_theirs,
    logits,
    make_theirs,
    make_tokens,
    random_model,
    read_model,
    same_weights,
    shapes,
    their_logits,
    to_meta_rows,
)
from tests.helpers.forks import Started


@shapes
def test_transformers_reads_what_we_write(config, tmp_path):
    model = random_model(config)
    save_hf(tmp_path, model, bos_id=1, eos_ids=(2, 3), generation_config={"temperature": 0.7, "do_sample": True})
    theirs, tokens = load_theirs(tmp_path), make_tokens(config)
    assert_close(logits(model, tokens), their_logits(theirs, tokens))
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, [2, 3])
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.temperature) == ([2, 3], 0.7)
    source = open_source(tmp_path)
    assert source.config == config and source.generation_config["temperature"] == 0.7


def test_bytes_are_those_of_save_pretrained(tmp_path):
    """Weights and index, whole and sharded."""
    for limit, bytes_ in {"5GB": 5_000_000_000, "20kB": 20_000, "0KB": 0}.items():  # each tensor is larger than 0
        theirs = make_theirs(BASE)
        theirs.save_pretrained(tmp_path / limit, max_shard_size=limit)
        save_hf(tmp_path / f"ours{limit}", read_model(tmp_path / limit), max_shard_bytes=bytes_)
        a, b = hash_files(tmp_path / limit), hash_files(tmp_path / f"ours{limit}")
        assert a.keys() == b.keys() and (len(a) > 6) == (limit != "5GB")
        assert {name for name in a if a[name] != b[name]} == {"config.json", "generation_config.json"}


@pytest.mark.parametrize("limit", [5_000_000_000, 30_000])
@shapes
def test_export_of_an_import_is_byte_identical(config, limit, tmp_path):
    settings = dict(max_shard_bytes=limit, bos_id=1, eos_ids=(2,), generation_config={"top_p": 0.9})
    save_hf(tmp_path / "a", random_model(config), **settings)
    again = open_source(tmp_path / "a")
    save_hf(tmp_path / "b", read_model(tmp_path / "a"), **settings | {"generation_config": again.generation_config})
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b")


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
    assert same_weights(read_model(tmp_path), model)
    assert their_logits(load_theirs(tmp_path), make_tokens(BASE)).allclose(
        logits(model, make_tokens(BASE)), atol=TOLERANCE
    )


def test_bf16_export(tmp_path):
    model = random_model(SHAPES["tied"])
    save_hf(tmp_path, model, dtype=torch.bfloat16)
    assert open_source(tmp_path).dtype == load_theirs(tmp_path, dtype="auto").dtype == torch.bfloat16
    back = read_model(tmp_path, torch.float32)  # widened on the way
    for ours, p in zip(back.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, p.bfloat16().float())
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


# ---- Meta -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["grouped", "tied", "llama3-rope"])
def test_meta_round_trip_is_bit_equal(shape, dtype, tmp_path):
    config = SHAPES[shape]
    if config.rope_scaling:
        config = replace(config, rope_scaling=RopeScaling(factor=32.0))
    model = random_model(config, dtype)
    save_meta(tmp_path / "a", model)
    back = read_model(tmp_path / "a")
    assert replace(back.config, max_seq_len=config.max_seq_len) == config  # Meta's files do not say it
    assert same_weights(back, model) and back.norm.dtype == dtype
    save_meta(tmp_path / "b", back)
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b")


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


def test_metas_code_finds_a_head_where_the_embedding_is_one(tmp_path):
    tied = replace(META, tied=True)
    model = random_model(tied)
    save_meta(tmp_path, model)
    tensors = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    assert torch.equal(tensors["output.weight"], model.tok_embeddings) and open_source(tmp_path).config.tied


def test_the_ids_of_the_tokenizer_go_before_those_of_an_old_generation_config(tmp_path):
    old = {"eos_token_id": 9, "bos_token_id": 8, "top_k": 3}
    save_hf(tmp_path, random_model(BASE), bos_id=1, eos_ids=(2, 4), generation_config=old)
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / name).read_text())
        assert (found["bos_token_id"], found["eos_token_id"]) == (1, [2, 4]), name
    assert found["top_k"] == 3


@pytest.mark.parametrize(
    "shape, words",
    [
        ("wide-heads", "head_dim 16"),
        ("llama3-rope", "rope_scaling"),
        ("yarn-rope", "its RoPE is yarn"),
        ("biases", "biases"),
    ],
)
def test_meta_refuses_what_it_cannot_say(shape, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        save_meta(tmp_path, random_model(SHAPES[shape]))


# ---- over an old model ----------------------------------------------------------------------------------------------


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
    assert same_weights(read_model(tmp_path), new)


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    save_hf(tmp_path, random_model(BASE), max_shard_bytes=20_000)
    before, calls = hash_files(tmp_path), []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write_safetensors(*args)

    monkeypatch.setattr(save, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        save_hf(tmp_path, random_model(BASE, seed=7), max_shard_bytes=20_000)
    assert hash_files(tmp_path) == before


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

    save_hf(tmp_path / "old", old, max_shard_bytes=40_000)
    done, n = False, 0
    while not done:
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "old", folder)
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
            model = read_model(folder)
            outcome = "old" if same_weights(model, old) else "new" if same_weights(model, new) else "mixture"
        except DataError:
            outcome = "none"
        outcomes.add(outcome)
        assert outcome != "mixture" and (not done or outcome == "new")
        save_hf(folder, new, max_shard_bytes=30_000)
        assert same_weights(read_model(folder), new) and not list(folder.glob(".tmp-*"))
        n += 1
    assert outcomes == {"old", "new", "none"} and n > 10


# ---- memory ---------------------------------------------------------------------------------------------------------


PEAK = """
import ctypes, json, sys
from pathlib import Path
import torch
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.formats.save import save_hf, save_meta
from engine.formats.source import open_source

config = ModelConfig(dim=512, n_layers=2, n_heads=8, n_kv_heads=8, hidden_dim=1024, vocab_size=8192, max_seq_len=4096,
                     norm_eps=1e-5)
folder = Path(sys.argv[1])
M_MMAP_THRESHOLD = -3
assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536) == 1

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
    process = Started(PEAK, tmp_path_factory.mktemp("peaks"))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")
@pytest.mark.parametrize(
    "action, copies",  # of the largest tensor in bf16; without a conversion bytes are written from where they are
    [("write-hf", 1), ("write-meta", 1), ("write-hf-fp32", 0), ("read-hf", 0), ("read-meta", 0)],
)
def test_at_most_one_tensor_beside_the_model(action, copies, peaks):
    """An fp32 model of 54 MB whose largest parameter has 17 MB, to and from files."""
    assert peaks["total"] > 3 * peaks["largest"]
    assert peaks["extra"][action] <= copies * peaks["largest"] // 2 + 6_000_000, peaks


@pytest.mark.parametrize(
    ("sizes", "files"),
    [
        ([50, 50, 50], [[50, 50], [50]]),  # of 100 bytes at most: full to the byte
        ([51, 50, 49], [[51], [50, 49]]),
        ([60, 101, 40, 1], [[101], [60, 40], [1]]),  # what is larger has a file of its own, before the one being filled
        ([101], [[101]]),
        ([100, 100], [[100], [100]]),
        ([], []),
    ],
)
def test_files_are_filled_to_the_byte_in_order(sizes, files):
    tensors = [(f"{i}", (size,), torch.int8, None) for i, size in enumerate(sizes)]
    assert [[tensor[1][0] for tensor in file] for file in save.split_into_files(tensors, 100)] == files
