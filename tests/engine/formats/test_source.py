"""Hugging Face's and Meta's checkpoints, read as transformers reads them. SmolLM2's test skips without its package."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.base.errors import DataError
from engine.formats.find import find_model
from engine.formats.names import list_pieces
from engine.formats.save import save_hf
from engine.formats.source import add_prefixes, is_equal, most_common_dtype, open_source
from engine.model.batch import MicroBatch
from engine.model.config import RopeScaling
from tests.helpers.checkpoints import (
    BASE,
    META,
    SHAPES,
    TOLERANCE,
    assert_close,
    assert_refused,
    cache_gguf_parsing,
    load_theirs,
    logits,
    make_theirs,
    make_tokens,
    random_model,
    read_model,
    rewrite_safetensors,
    same_weights,
    shapes,
    their_logits,
    write_meta,
)

transformers = pytest.importorskip("transformers")


@shapes
def test_reads_what_transformers_writes(config, tmp_path):
    theirs = make_theirs(config)
    theirs.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())  # transformers 5's form
    source = open_source(tmp_path)
    assert (source.kind, source.config, source.dtype) == ("hf", config, torch.float32)
    tokens = make_tokens(config)
    assert_close(logits(read_model(tmp_path), tokens), their_logits(theirs, tokens))


def test_llama3_scaling_matters():
    """Else the parity above would not show that it is read."""
    config, tokens = SHAPES["llama3-rope"], make_tokens(BASE)
    scaled, plain = random_model(config), random_model(replace(config, rope_scaling=None))
    assert (logits(scaled, tokens) - logits(plain, tokens)).abs().max() > 100 * TOLERANCE


@pytest.fixture(scope="module")
def smollm2_model(smollm2):
    pytest.importorskip("gguf")
    return smollm2, read_model(smollm2)


def test_smollm2_exported_is_smollm2(smollm2_model, tmp_path):
    path, model = smollm2_model
    source = open_source(path)
    assert (source.kind, source.dtype) == ("gguf", torch.float32)
    assert source.config == replace(source.config, dim=576, n_heads=9, n_kv_heads=3, rope_theta=1e5, norm_eps=1e-5)
    save_hf(tmp_path, model, bos_id=1, eos_ids=(2,))
    tokens = make_tokens(source.config, 40)
    assert_close(logits(model, tokens), their_logits(load_theirs(tmp_path), tokens))


def test_smollm2_as_transformers_reads_the_gguf(smollm2_model, monkeypatch):
    """Independent of all our code: transformers dequantises and permutes by itself."""
    path, model = smollm2_model
    cache_gguf_parsing(monkeypatch)
    # It asks for accelerate, which this path does not use on one CPU.
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda *_: True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = make_tokens(model.config, 40)
    assert_close(logits(model, tokens), their_logits(theirs, tokens))


# ---- Meta -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_rows", [False, True], ids=["llama2-embedding", "llama3-embedding"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_reads_meta(n, by_rows, tmp_path):
    theirs = make_theirs(META)
    write_meta(tmp_path, theirs, META, n, embedding_by_rows=by_rows)
    source = open_source(tmp_path)
    assert (source.kind, source.config, source.dtype) == ("meta", META, torch.float32)
    tokens = make_tokens(META)
    assert_close(logits(read_model(tmp_path), tokens), their_logits(theirs, tokens))


def test_meta_rope_settings(tmp_path):
    theirs = make_theirs(META)
    write_meta(tmp_path, theirs, META, 1, rope_theta=500000.0, use_scaled_rope=True, vocab_size=64)
    config = open_source(tmp_path).config
    assert (config.rope_theta, config.rope_scaling, config.max_seq_len) == (
        5e5,
        RopeScaling(8.0, 1.0, 4.0, 8192),
        131072,
    )
    write_meta(tmp_path, theirs, META, 1, rope_theta=500000.0, use_scaled_rope=True, rope_scale_factor=32)
    assert open_source(tmp_path).config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)


# ---- old checkpoints ------------------------------------------------------------------------------------------------


def test_reads_a_checkpoint_of_2023(tmp_path):
    """pytorch_model-*.bin with inv_freq, "LLaMAForCausalLM", no max_position_embeddings, no num_key_value_heads."""
    config = replace(BASE, n_kv_heads=4, norm_eps=1e-6, max_seq_len=2048)
    theirs = make_theirs(config)
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
    assert_close(
        logits(read_model(tmp_path, torch.float32), make_tokens(config)), their_logits(theirs, make_tokens(config))
    )
    torch.save(state, tmp_path / "pytorch_model-00001-of-00002.bin", _use_new_zipfile_serialization=False)
    assert_refused(tmp_path, "pytorch_model-00001-of-00002.bin", "torch.save it again")


def test_a_head_that_repeats_the_embedding_is_accepted(tmp_path):
    config = SHAPES["tied"]
    save_hf(tmp_path, random_model(config))
    rewrite_safetensors(
        tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert same_weights(read_model(tmp_path), random_model(config))


@pytest.mark.parametrize("cuts", [([3], [2, 6]), ([2, 6], [3]), ([], [5]), ([1, 7], [])])
def test_matrices_are_equal_however_each_is_cut_into_blocks(cuts):
    """Every number counts, also in the last rows of the longer block."""
    matrix = torch.arange(40.0).view(8, 5)

    def stored(values, rows):
        ends = zip([0, *rows], [*rows, 8], strict=True)
        blocks = [(a, b, values[a:z, b:c]) for a, z in ends for b, c in ((0, 2), (2, 5))]
        return SimpleNamespace(shape=(8, 5), dtype=torch.float32, blocks=lambda: iter(blocks))

    assert is_equal(stored(matrix, cuts[0]), stored(matrix.clone(), cuts[1]))
    for row in range(8):
        for column in range(5):
            other = matrix.clone()
            other[row, column] += 1
            assert not is_equal(stored(matrix, cuts[0]), stored(other, cuts[1])), (row, column)
    for changes in ({"shape": (5, 8)}, {"shape": (40,)}, {"dtype": torch.float16}):
        other = stored(matrix, cuts[1])
        other.__dict__.update(changes)
        assert not is_equal(stored(matrix, cuts[0]), other)


# ---- models that are LLaMA by another name --------------------------------------------------------------------------


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_mistral_without_a_window_is_read_and_written(tmp_path):
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=128, sliding_window=None, initializer_range=0.2,
    )  # fmt: skip
    theirs, tokens = transformers.MistralForCausalLM(config), make_tokens(BASE)
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["sliding_window"] is None
    model = read_model(tmp_path / "theirs")
    assert_close(logits(model, tokens), their_logits(theirs, tokens))
    save_hf(tmp_path / "ours", model, bos_id=1, eos_ids=(2,))
    assert_close(their_logits(load_theirs(tmp_path / "ours"), tokens), their_logits(theirs, tokens))
    edit_config(tmp_path / "theirs", sliding_window=64)
    assert_refused(tmp_path / "theirs", "sliding_window is 64, which is not supported")


def test_what_mistral_leaves_out_is_what_transformers_takes(tmp_path):
    """Eight key heads, not as many as queries; 131072 positions."""
    make_theirs(replace(BASE, dim=64, n_heads=16, n_kv_heads=8, head_dim=4)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    del raw["num_key_value_heads"], raw["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = open_source(tmp_path).config
    assert (config.n_kv_heads, config.max_seq_len) == (8, 131072)
    assert load_theirs(tmp_path).config.num_key_value_heads == 8


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_names_without_model(tied, shards, tmp_path):
    """As a LlamaModel, transformers' model without its head, is saved; with the head where it is not tied."""
    theirs, tokens = make_theirs(replace(BASE, tied=tied)), make_tokens(BASE)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    for path in tmp_path.glob("*.safetensors"):
        rewrite_safetensors(path, rename)
    if shards:
        index = tmp_path / "model.safetensors.index.json"
        raw = json.loads(index.read_text())
        raw["weight_map"] = {name.removeprefix("model."): file for name, file in raw["weight_map"].items()}
        index.write_text(json.dumps(raw))
    assert_close(logits(read_model(tmp_path), tokens), their_logits(theirs, tokens))
    if shards:
        next(iter(tmp_path.glob("model-00002*"))).unlink()
        assert assert_refused(tmp_path, "model-00002-of-").count("\n") == 0, "one line: its tensors are not missing too"


def test_a_llama_model_of_transformers(tmp_path):
    theirs, tokens = make_theirs(replace(BASE, tied=True)), make_tokens(BASE)
    theirs.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert_close(logits(read_model(tmp_path), tokens), their_logits(theirs, tokens))
    edit_config(tmp_path, tie_word_embeddings=False)
    assert_refused(tmp_path, "lm_head.weight is missing")


def test_a_name_with_and_without_model_is_refused(tmp_path):
    make_theirs(BASE).save_pretrained(tmp_path)
    rewrite_safetensors(
        tmp_path / "model.safetensors", lambda t: t.update({"embed_tokens.weight": t["model.embed_tokens.weight"] + 1})
    )
    assert_refused(tmp_path, "embed_tokens.weight and model.embed_tokens.weight are both there")


@pytest.mark.parametrize("names", [("layers.0.w", "model.layers.0.w"), ("model.layers.0.w", "layers.0.w")])
def test_two_names_of_one_tensor_are_told_in_either_order(names):
    problems = []
    add_prefixes({name: SimpleNamespace(file="m.safetensors") for name in names}, problems)
    assert problems == ["m.safetensors: layers.0.w and model.layers.0.w are both there"]


def test_the_type_of_a_model_is_that_of_most_of_its_numbers():
    """Not of most of its tensors: norms are often in fp32."""
    sizes = {"embed": (torch.bfloat16, (1000, 8)), **{f"norm {i}": (torch.float32, (8,)) for i in range(9)}}
    stored = {name: SimpleNamespace(dtype=dtype, shape=shape) for name, (dtype, shape) in sizes.items()}
    assert most_common_dtype(stored) == torch.bfloat16


def test_a_tied_model_that_stores_its_head_alone(tmp_path):
    theirs, tokens = make_theirs(replace(BASE, tied=True)), make_tokens(BASE)
    theirs.save_pretrained(tmp_path)
    rewrite_safetensors(
        tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})
    )
    assert_close(logits(read_model(tmp_path), tokens), their_logits(theirs, tokens))


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_alone(bias, tmp_path):
    theirs, tokens = make_theirs(replace(BASE, **{bias: True})), make_tokens(BASE)
    theirs.save_pretrained(tmp_path)
    model = read_model(tmp_path)
    assert model.config == replace(BASE, **{bias: True})
    assert model.config.n_parameters == sum(p.numel() for p in model.parameters())
    assert_close(logits(model, tokens), their_logits(theirs, tokens))


def test_gradients_of_biases_are_transformers(tmp_path):
    config, tokens = SHAPES["biases"], make_tokens(BASE, 50)
    theirs = make_theirs(config)
    theirs.save_pretrained(tmp_path)
    theirs(tokens[None], labels=tokens[None]).loss.backward()
    model, n = read_model(tmp_path), len(tokens)
    documents = torch.tensor([[0, n, 0, 0]], dtype=torch.int32)
    model.loss(
        MicroBatch(
            tokens, torch.arange(n), documents, torch.arange(n - 1), tokens[1:], torch.full((n - 1,), 1 / (n - 1))
        )
    ).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, piece in list_pieces(config, "hf").items():
        ours, reference = piece.rows_of(gradients), theirs.get_parameter(name).grad
        assert (ours - reference).abs().max() < 1e-5 * max(1, reference.abs().max()), name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("meta-llama/Llama-3.2-1B", "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B, then --model"),
        ("/models/llama", None),
        ("a/b/c", None),
        ("../x", None),
    ],
)
def test_a_name_of_the_hub_is_told_how_to_come_here(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such folder or file") as error:
        find_model(name)
    assert said in str(error.value) if said else "hf download" not in str(error.value)
