"""Settings of other programs: known shapes, and configs that are refused."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from engine.formats import configs
from engine.formats.configs import config_from_gguf, config_from_hf, config_from_meta, config_to_hf, config_to_meta
from engine.model.config import ModelConfig, RopeScaling

SHAPE = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=192, vocab_size=50, max_seq_len=256, norm_eps=1e-4,
    rope_theta=5000.0, head_dim=32, tied=True, attention_bias=True, mlp_bias=True,
)  # fmt: skip
HF = config_to_hf(SHAPE, torch.float32, 1, (2,))
OF_HF = {  # key: (our field, another value, what is taken where the key is not there)
    "num_key_value_heads": ("n_kv_heads", 1, 4), "max_position_embeddings": ("max_seq_len", 512, 2048),
    "rms_norm_eps": ("norm_eps", 1e-3, 1e-6), "rope_theta": ("rope_theta", 7000.0, 10000.0),
    "head_dim": ("head_dim", 8, 16), "tie_word_embeddings": ("tied", False, False),
    "attention_bias": ("attention_bias", False, False), "mlp_bias": ("mlp_bias", False, False),
    "hidden_size": ("dim", 128, None), "num_hidden_layers": ("n_layers", 3, None),
    "num_attention_heads": ("n_heads", 8, None), "vocab_size": ("vocab_size", 9, None),
    "intermediate_size": ("hidden_dim", 64, None),
}  # fmt: skip


def read(function, *args):
    """Return (the config, the problems) that a function finds."""
    problems = []
    return function(*args, problems), "\n".join(problems)


@pytest.mark.parametrize("key", OF_HF)
def test_each_key_of_a_config_json_decides_its_own_field(key):
    field, other, default = OF_HF[key]
    assert read(config_from_hf, HF) == (SHAPE, "")
    changed, told = read(config_from_hf, HF | {key: other})
    assert (changed, told) == (dataclasses.replace(SHAPE, **{field: other}), "")
    missing, told = read(config_from_hf, {name: value for name, value in HF.items() if name != key})
    if default is None:
        assert missing is None and told == f"config.json: {key} is missing"
    else:
        assert (missing, told) == (dataclasses.replace(SHAPE, **{field: default}), "")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is gelu"), ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"model_type": "gemma"}, "only LLaMA is read"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights quantised by awq are not read"),
        ({"torch_dtype": "int8"}, "torch_dtype is int8"), ({"dtype": "float8_e4m3fn"}, "dtype is float8_e4m3fn"),
    ],
)  # fmt: skip
def test_another_model_of_the_same_keys_is_refused(changes, told):
    found, problems = read(config_from_hf, HF | changes)
    assert found is None and told in problems and len(problems.splitlines()) == 1


def test_a_mistral_has_the_defaults_of_its_own_class():
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    plain = {k: v for k, v in (HF | mistral).items() if k not in ("attention_bias", "mlp_bias")}
    found, told = read(config_from_hf, plain)
    assert told == "" and not found.attention_bias
    bare = {k: v for k, v in plain.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    found, told = read(config_from_hf, bare | {"num_attention_heads": 8})
    assert (found.n_kv_heads, found.max_seq_len, told) == (8, 131072, "")
    del plain["sliding_window"]
    assert "sliding_window is 4096" in read(config_from_hf, plain)[1]
    assert "attention_bias is True" in read(config_from_hf, HF | mistral)[1]
    told = read(config_from_hf, HF | mistral | {"attention_bias": False, "mlp_bias": True})[1]
    assert "mlp_bias is True" in told and "attention_bias" not in told


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_written_config_names_its_dtype_and_ends(dtype):
    made = config_to_hf(SHAPE, dtype, 1, (2, 3))
    assert f"torch.{made['torch_dtype']}" == str(dtype)
    assert (made["bos_token_id"], made["eos_token_id"]) == (1, [2, 3])


META = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 50}
SHAPES = {"tok_embeddings.weight": (50, 64), "layers.0.feed_forward.w1.weight": (192, 64)}


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {}), ({"n_kv_heads": 2}, {"n_kv_heads": 2}), ({"vocab_size": -1}, {}),
        ({"norm_eps": 1e-6}, {"norm_eps": 1e-6, "max_seq_len": 2048}), ({"head_dim": 8}, {"head_dim": 8}),
        ({"rope_theta": 500000.0}, {"rope_theta": 500000.0, "max_seq_len": 8192}),
        ({"use_scaled_rope": False}, {"rope_theta": 500000.0, "max_seq_len": 8192}),
        ({"use_scaled_rope": True}, {"rope_theta": 500000.0, "max_seq_len": 131072, "rope_scaling": RopeScaling()}),
    ],
)  # fmt: skip
def test_a_params_json_is_read_by_the_release_that_wrote_it(changes, fields):
    want = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=192, vocab_size=50, max_seq_len=4096,
                       norm_eps=1e-5, tied=True)  # fmt: skip
    assert read(config_from_meta, META | changes, SHAPES) == (dataclasses.replace(want, **fields), "")
    untied, _ = read(config_from_meta, META | changes, SHAPES | {"output.weight": (50, 64)})
    assert untied == dataclasses.replace(want, **fields, tied=False)


@pytest.mark.parametrize("factor", [8.0, 32.0, 4.0])
@pytest.mark.parametrize(("dim", "layers"), [(64, 2), (2048, 16), (3072, 28)])
def test_a_factor_that_is_not_the_releases_is_written(dim, layers, factor):
    c = ModelConfig(dim=dim, n_layers=layers, n_heads=4, n_kv_heads=4, hidden_dim=256, vocab_size=9, norm_eps=1e-5,
                    rope_theta=500000.0, rope_scaling=RopeScaling(factor=factor), max_seq_len=131072)  # fmt: skip
    made = config_to_meta(c)
    assert ("rope_scale_factor" in made) == (factor != (8.0 if dim == 64 else 32.0))
    shapes = {
        "tok_embeddings.weight": (9, dim),
        "layers.0.feed_forward.w1.weight": (256, dim),
        "output.weight": (9, dim),
    }
    assert read(config_from_meta, made, shapes) == (c, "")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"head_dim": 32}, "head_dim 32 is not dim / n_heads"),
        ({"attention_bias": True}, "it has biases"),
        ({"mlp_bias": True}, "it has biases"),
        ({"hidden_dim": 65}, None),
        ({"rope_scaling": RopeScaling(kind="yarn")}, "its RoPE is yarn"),
        ({"rope_scaling": RopeScaling(low_freq_factor=2.0)}, "its rope_scaling"),
    ],
)
def test_a_shape_that_params_json_has_no_words_for_is_refused(changes, told):
    c = dataclasses.replace(SHAPE, **{"head_dim": 16, "attention_bias": False, "mlp_bias": False} | changes)
    if told is None:
        assert config_to_meta(c)["dim"] == 64
        return
    with pytest.raises(ValueError, match=told):
        config_to_meta(c)


GGUF = {
    "general.architecture": "llama", "llama.embedding_length": 64, "llama.block_count": 2,
    "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.feed_forward_length": 192,
    "llama.context_length": 256, "llama.attention.layer_norm_rms_epsilon": 1e-4, "llama.rope.freq_base": 5000.0,
    "llama.attention.key_length": 32, "llama.vocab_size": 50,
}  # fmt: skip
OF_GGUF = {"token_embd.weight": SimpleNamespace(shape=(50, 64))}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"split.count": 2, "split.no": 0}, "part 1 of 2 of a split GGUF"),
        ({"split.count": 1}, None),
        ({"general.type": "adapter"}, "a GGUF of type adapter, not a model"),
        ({"general.type": "model"}, None),
        ({"general.architecture": "qwen2"}, "only llama is read"),
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.expert_count": 0}, None),
        ({"llama.attention.value_length": 16}, "value_length is 16"),
        ({"llama.rope.dimension_count": 16}, "rope.dimension_count is 16"),
        ({"llama.rope.dimension_count": 32}, None),
    ],
)
def test_a_gguf_of_something_else_is_refused(changes, told):
    want = dataclasses.replace(SHAPE, attention_bias=False, mlp_bias=False)
    found, problems = read(config_from_gguf, GGUF | changes, dict(OF_GGUF))
    assert (found, problems) == (want, "") if told is None else (found is None and told in problems)


def test_meta_feed_forward_of_known_models():
    for dim, hidden in [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (4096, 14336), (8192, 28672),
                        (2048, 8192), (3072, 8192), (576, 1536), (64, 192), (2048, 5632), (96, 131)]:  # fmt: skip
        assert configs.meta_hidden_dim(dim, **configs.meta_feed_forward(dim, hidden)) == hidden
    assert configs.meta_feed_forward(4096, 11008) == {"multiple_of": 256}  # as Meta has it
    base = int(8 * 96 / 3)  # 257 comes out of no multiple, so of the first size that some factor takes there: 1
    assert configs.meta_feed_forward(96, 257) == {"multiple_of": 1, "ffn_dim_multiplier": 257 / base}
    assert configs.meta_feed_forward(1, 2) == {"multiple_of": 2} and configs.meta_feed_forward(0, 5) is None


@pytest.mark.parametrize(
    "bos, eos, found", [(1, (2,), (1, 2)), (1, [2, 3], (1, [2, 3])), (None, (), (None, None)), (0, [0], (0, 0))]
)
def test_ids_that_begin_and_end_a_text(bos, eos, found):
    assert tuple(configs.token_ids_to_hf(bos, eos).values()) == found


def test_a_vocabulary_that_no_file_tells_is_a_fault():
    raw = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1}
    assert "vocab_size is in no file" in read(config_from_meta, raw, {})[1]
    found, told = read(
        config_from_meta, raw, {"tok_embeddings.weight": (77, 64), "layers.0.feed_forward.w1.weight": (96, 64)}
    )
    assert told == "" and found.vocab_size == 77
