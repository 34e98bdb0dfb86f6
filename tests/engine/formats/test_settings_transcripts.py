"""What the settings of other programs come to, key by key: the fields of our shape, and what is told of faults."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from engine.formats.configs import config_from_gguf, config_from_hf, config_from_meta, config_to_hf, config_to_meta
from engine.formats.rope import rope_to_hf
from engine.formats.save_gguf import describe_model
from engine.model.config import ModelConfig, RopeScaling

SHAPE = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=192, vocab_size=50, max_seq_len=256, norm_eps=1e-4,
    rope_theta=5000.0,
)  # fmt: skip
GONE = object()  # the value of a key that is taken out


def say(config, problems, base=SHAPE):
    """Return in lines by which fields a config differs from a base, and the problems."""
    lines = [f"  {problem}" for problem in problems]
    if config is None:
        return ["  none", *lines]
    for field in dataclasses.fields(config):
        ours, other = getattr(config, field.name), getattr(base, field.name)
        if ours != other and dataclasses.is_dataclass(ours):
            usual = RopeScaling()
            parts = {f.name: getattr(ours, f.name) for f in dataclasses.fields(ours)}
            parts = {name: float(f"{v:.6g}") if type(v) is float else v for name, v in parts.items()}
            ours = {name: value for name, value in parts.items() if value != getattr(usual, name)} or "usual"
        if ours != other:
            lines.append(f"  {field.name} = {ours!r}")
    return lines or ["  the same"]


def tell(read, raw, cases):
    """Return what each change of some settings comes to, as one text."""
    lines = []
    for changes in cases:
        problems = []
        changed = {key: value for key, value in (raw | changes).items() if value is not GONE}
        shown = {key: "(gone)" if value is GONE else value for key, value in changes.items()}
        lines += [f"{shown}", *say(read(changed, problems), problems)]
    return "\n".join(lines) + "\n"


HF = config_to_hf(SHAPE, torch.float32, 1, (2,))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
OF_HF = [
    {}, {"architectures": GONE}, {"architectures": []}, {"architectures": "LlamaForCausalLM"},
    {"architectures": ["LlamaModel"]}, {"architectures": ["LLaMAForCausalLM"]}, {"architectures": {"a": 1}},
    {"architectures": ["LlamaForCausalLM", "LlamaModel"]}, {"model_type": GONE}, {"model_type": "llama4"},
    {"model_type": "mistral"}, {"hidden_act": None}, {"hidden_act": "SiLU"}, {"sliding_window": 0},
    {"partial_rotary_factor": 1.0}, {"quantization_config": "gptq"}, {"quantization_config": {"bits": 4}},
    {"torch_dtype": None}, {"torch_dtype": "torch.float64"}, {"torch_dtype": "half"}, {"torch_dtype": "auto"},
    {"torch_dtype": "int4"}, {"torch_dtype": GONE, "dtype": "int4"}, {"torch_dtype": "int4", "dtype": "int5"},
    {"num_attention_heads": 0}, {"num_attention_heads": 8, "num_key_value_heads": GONE, "head_dim": GONE},
    {"head_dim": GONE}, {"head_dim": 3}, {"head_dim": 1}, {"hidden_size": 66, "head_dim": None},
    {"num_key_value_heads": 3}, {"max_position_embeddings": 300.0}, {"max_position_embeddings": 300.5},
    {"vocab_size": "50", "rms_norm_eps": 0, "mlp_bias": 1},
]  # fmt: skip
OF_HF_ROPE = [
    {"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_scaling": {"type": "dynamic", "factor": 2.5}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.5}, "head_dim": 2}, {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": {"rope_type": "default", "factor": 4}}, {"rope_scaling": {"factor": 4}},
    {"rope_scaling": {"type": "su", "factor": 4}}, {"rope_scaling": LLAMA3},
    {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4}}, {"rope_scaling": []}, {"rope_scaling": 3},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 32},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": None},
    {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, {"rope_scaling": {**LLAMA3, "low_freq_factor": None}},
    {"rope_scaling": LLAMA3, "max_position_embeddings": GONE}, {"rope_scaling": YARN},
    {"rope_scaling": {**YARN, "factor": 1.0}}, {"rope_scaling": {"rope_type": "yarn"}},
    {"rope_scaling": {**YARN, "factor": None, "original_max_position_embeddings": 64}},
    {"rope_scaling": {**YARN, "original_max_position_embeddings": 64, "attention_factor": 1.5}},
    {"rope_scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.25}}, {"rope_scaling": {**YARN, "mscale": 0.5}},
    {"rope_scaling": {**YARN, "mscale": 0, "mscale_all_dim": 1}}, {"rope_scaling": {**YARN, "mscale": -1}},
    {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
    {"rope_scaling": {**YARN, "beta_fast": 0}}, {"rope_scaling": {**YARN, "truncate": None}},
    {"rope_scaling": YARN, "rope_theta": 1.0}, {"rope_scaling": YARN, "rope_theta": 1.5},
    {"rope_theta": GONE}, {"rope_theta": None}, {"rope_theta": -2},
    {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 70.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 70.0}, "rope_scaling": YARN},
    {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 70.0}, "rope_scaling": {}},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1}},
    {"rope_parameters": {"sliding": {"rope_type": "default"}, "rope_theta": None}}, {"rope_parameters": 3},
]  # fmt: skip
META = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 50, "norm_eps": 1e-4}
META_SHAPES = {"tok_embeddings.weight": (50, 64), "layers.0.feed_forward.w1.weight": (192, 64), "output.weight": ()}
OF_META = [
    {}, {"n_kv_heads": GONE}, {"n_kv_heads": None}, {"norm_eps": GONE}, {"norm_eps": 1e-5}, {"norm_eps": 1e-6},
    {"vocab_size": GONE}, {"vocab_size": -1}, {"vocab_size": 0}, {"vocab_size": 51}, {"head_dim": 8},
    {"rope_theta": 499999.0}, {"rope_theta": 500000.0}, {"rope_theta": 1e6, "norm_eps": 1e-5},
    {"use_scaled_rope": False}, {"use_scaled_rope": None}, {"use_scaled_rope": True}, {"use_scaled_rope": 1},
    {"use_scaled_rope": True, "rope_theta": 7.0, "rope_scale_factor": 32},
    {"use_scaled_rope": True, "rope_scaling_factor": 16}, {"use_scaled_rope": True, "rope_scale_factor": 0},
    {"use_scaled_rope": True, "rope_scaling_factor": 16, "rope_scale_factor": 16},
    {"use_scaled_rope": True, "rope_scaling_factor": 16, "rope_scale_factor": 8},
    {"use_scaled_rope": True, "rope_high_freq_factor": 4}, {"use_scaled_rope": True, "rope_high_freq_factor": 2},
    {"rope_scale_factor": 16}, {"use_biases": False}, {"use_biases": True}, {"moe_args": {}}, {"moe": {"n": 2}},
    {"quantization_args": 1}, {"quantization": 1}, {"lora_args": 1}, {"vision_chunk_size": 1}, {"yarn": 1},
    {"vision_encoder": 1, "sliding_window": 2, "llama_4_scaling": 3, "dim": GONE, "n_heads": "4", "n_layers": 0},
]  # fmt: skip


@pytest.mark.parametrize(("name", "cases"), [("shapes", OF_HF), ("rope", OF_HF_ROPE)])
def test_what_the_keys_of_a_config_json_come_to(name, cases, snapshot):
    assert tell(config_from_hf, HF, cases) == snapshot(name=name)


def test_what_the_keys_of_a_params_json_come_to(snapshot):
    assert tell(lambda raw, problems: config_from_meta(raw, META_SHAPES, problems), META, OF_META) == snapshot
    for lacking, told in (("tok_embeddings.weight", ["vocab_size is in no file"]), ("output.weight", [])):
        problems = []
        shapes = {name: shape for name, shape in META_SHAPES.items() if name != lacking}
        found = config_from_meta(META | {"vocab_size": -1}, shapes, problems)
        assert problems == [f"params.json: {text}" for text in told] and (found is None or found.tied)


PREFIX = "llama.rope.scaling."
GGUF = describe_model(SHAPE) | {"general.architecture": "llama"}
LINEAR, OF_YARN = {f"{PREFIX}type": "linear"}, {f"{PREFIX}type": "yarn", f"{PREFIX}factor": 4.0}
OF_GGUF = [
    {}, {"split.count": 0}, {"split.count": 1, "split.no": 0}, {"split.count": 3}, {"split.count": 3, "split.no": 2},
    {"general.type": GONE}, {"general.type": "mmproj"}, {"general.architecture": GONE}, {"llama.expert_count": 0},
    {"llama.expert_count": 4}, {"llama.attention.key_length": GONE}, {"llama.attention.key_length": 8},
    {"llama.attention.value_length": GONE, "llama.rope.dimension_count": GONE}, {"llama.rope.freq_base": GONE},
    {"llama.attention.value_length": 8, "llama.rope.dimension_count": 4}, {"llama.attention.head_count_kv": GONE},
    {"llama.vocab_size": GONE}, {"llama.vocab_size": 51}, {"llama.context_length": GONE},
    {"llama.feed_forward_length": GONE, "llama.block_count": GONE}, {"llama.embedding_length": GONE},
    {"llama.attention.layer_norm_rms_epsilon": GONE}, {"llama.attention.head_count": GONE},
    LINEAR, LINEAR | {f"{PREFIX}factor": 2.0}, {"llama.rope.scale_linear": 3.0}, {f"{PREFIX}type": "longrope"},
    {"llama.rope.scale_linear": 3.0, f"{PREFIX}factor": 2.0}, {f"{PREFIX}type": "none", f"{PREFIX}factor": 2.0},
    {f"{PREFIX}factor": 1.0, f"{PREFIX}attn_factor": 2.0}, {f"{PREFIX}factor": 0.0}, {f"{PREFIX}attn_factor": 0.0},
    OF_YARN, OF_YARN | {f"{PREFIX}original_context_length": 64}, OF_YARN | {f"{PREFIX}attn_factor": 2.0},
    OF_YARN | {f"{PREFIX}yarn_attn_factor": 2.0}, OF_YARN | {f"{PREFIX}yarn_attn_factor": 1.13862943},
    OF_YARN | {f"{PREFIX}yarn_attn_factor": 2.0, f"{PREFIX}attn_factor": 2.0}, OF_YARN | {f"{PREFIX}factor": GONE},
    OF_YARN | {f"{PREFIX}yarn_ext_factor": 1.0}, OF_YARN | {f"{PREFIX}yarn_ext_factor": -1.0},
    OF_YARN | {f"{PREFIX}yarn_ext_factor": 0.5}, OF_YARN | {f"{PREFIX}yarn_log_multiplier": 0.0},
    OF_YARN | {f"{PREFIX}yarn_log_multiplier": 0.1}, OF_YARN | {f"{PREFIX}yarn_attn_factor": 0.0},
    OF_YARN | {f"{PREFIX}yarn_beta_fast": 16.0, f"{PREFIX}yarn_beta_slow": 2.0},
    OF_YARN | {f"{PREFIX}yarn_beta_slow": 0},
]  # fmt: skip


def test_what_the_keys_of_a_gguf_come_to(snapshot):
    def read(raw, problems, *names):
        stored = {name: SimpleNamespace(shape=(70, 64)) for name in ("token_embd.weight", "output.weight", *names)}
        return config_from_gguf(raw, stored, problems)

    assert tell(read, GGUF, OF_GGUF) == snapshot
    for part in ("q", "k", "v", "output"):
        assert read(GGUF, [], f"blk.0.attn_{part}.bias") == dataclasses.replace(SHAPE, attention_bias=True)
    for part in ("gate", "up", "down"):
        assert read(GGUF, [], f"blk.0.ffn_{part}.bias") == dataclasses.replace(SHAPE, mlp_bias=True)


@pytest.mark.parametrize(
    ("scaling", "written"),
    [
        (None, {"rope_scaling": None}),
        (RopeScaling(kind="linear", factor=4.0), {"rope_scaling": {"factor": 4.0, "rope_type": "linear"}}),
        (RopeScaling(kind="dynamic", factor=4.0), {"rope_scaling": {"factor": 4.0, "rope_type": "dynamic"}}),
        (RopeScaling(), {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}}),
        (
            RopeScaling(original_max_seq_len=64),
            {
                "original_max_position_embeddings": 64,
                "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
            },
        ),
        (
            RopeScaling(kind="yarn", factor=1.0),
            {
                "rope_scaling": {
                    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 1.0, "original_max_position_embeddings": 8192,
                    "rope_type": "yarn",
                }
            },
        ),
        (
            RopeScaling(kind="yarn", factor=1.0, attention_factor=1.5, truncate=False, beta_fast=8.0, beta_slow=2.0),
            {
                "rope_scaling": {
                    "attention_factor": 1.5, "beta_fast": 8.0, "beta_slow": 2.0, "factor": 1.0,
                    "original_max_position_embeddings": 8192, "rope_type": "yarn", "truncate": False,
                }
            },
        ),
    ],
)  # fmt: skip
def test_what_a_config_json_says_of_rope(scaling, written):
    config = dataclasses.replace(SHAPE, rope_scaling=scaling)
    assert rope_to_hf(config) == written | {"rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({}, {"n_kv_heads": 2, "rope_theta": 5000.0}),
        ({"n_kv_heads": 4, "rope_theta": 10000.0}, {}),
        ({"rope_scaling": RopeScaling()}, {"n_kv_heads": 2, "rope_theta": 5000.0, "use_scaled_rope": True}),
        (
            {"rope_scaling": RopeScaling(factor=32.0), "rope_theta": 10000.0},
            {"n_kv_heads": 2, "rope_theta": 10000.0, "use_scaled_rope": True, "rope_scale_factor": 32.0},
        ),
    ],
)
def test_what_a_params_json_says(changes, written):
    rest = {
        "dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 50, "norm_eps": 1e-4, "multiple_of": 64,
    }  # fmt: skip
    assert config_to_meta(dataclasses.replace(SHAPE, **changes)) == rest | written
