"""RoPE of other programs' files, against transformers: which frequencies a config means, and the logits they give."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
import transformers.modeling_rope_utils

from engine.formats import configs
from engine.formats.rope import length_between, round_length
from engine.formats.save import save_hf
from engine.formats.source import open_source
from engine.inference.generation import generate
from engine.model.config import ModelConfig, RopeScaling
from engine.model.rope import frequencies, rope_tables, text_lengths
from tests.helpers.checkpoints import (
    BASE,
    YARN,
    assert_refused,
    load_theirs,
    logits,
    make_theirs,
    make_tokens,
    random_model,
    read_model,
    their_logits,
    write_gguf,
)

transformers = pytest.importorskip("transformers")

ORIGINAL = 32  # tokens of pretraining; the texts are three times as long
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "linear": {"type": "linear", "factor": 4.0},
    "linear 2.5": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "dynamic 2.7": {"rope_type": "dynamic", "factor": 2.7},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn of the ratio": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": ORIGINAL // 4},
    "yarn by max_position_embeddings": {"type": "yarn", "factor": 3},
    "yarn attention_factor": {"type": "yarn", "factor": 4.0, "attention_factor": 1.3, "beta_fast": 8, "beta_slow": 2},
    "yarn mscale": {"rope_type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0, "truncate": False},
    "yarn mscale alone": {"rope_type": "yarn", "factor": 40, "mscale": 0.707, "beta_slow": 0.5},
    "llama3": {**LLAMA3, "original_max_position_embeddings": ORIGINAL},
    "llama3 without a length": LLAMA3,
}  # fmt: skip


def hf_folder(folder, **changes):
    """Write a random model of transformers, with changes of its config.json; None takes a key out."""
    torch.manual_seed(0)
    make_theirs(replace(BASE, head_dim=16, max_seq_len=ORIGINAL)).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(raw | {"rope_theta": 10000.0} | changes))


def assert_logits(folder, n=3 * ORIGINAL):
    """Assert that our logits of a folder are transformers' to 1e-5, up to and past the original length."""
    theirs, tokens = load_theirs(folder), make_tokens(BASE, n)
    for length in (ORIGINAL, n):
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # dynamic ones remember longer texts
        ours, reference = logits(read_model(folder), tokens[:length]), their_logits(theirs, tokens[:length])
        assert reference.abs().max() > 0.5
        assert (ours - reference).abs().max() < 1e-5


@pytest.mark.parametrize("rope", KINDS.values(), ids=KINDS)
def test_logits_before_and_after_the_original_length_are_transformers(rope, tmp_path):
    hf_folder(tmp_path / "theirs", rope_scaling=rope)
    assert_logits(tmp_path / "theirs")
    model = read_model(tmp_path / "theirs")
    save_hf(tmp_path / "ours", model, bos_id=1, eos_ids=(2,))
    assert open_source(tmp_path / "ours").config == model.config
    assert_logits(tmp_path / "ours")


@pytest.mark.parametrize("rope", KINDS.values(), ids=KINDS)
def test_generation_past_the_original_length_is_transformers(rope, tmp_path):
    """With a cache, whose keys keep the angles that they were stored with."""
    hf_folder(tmp_path, rope_scaling=rope)
    theirs, prompts = load_theirs(tmp_path), [make_tokens(BASE, n).tolist() for n in (ORIGINAL - 5, 3, ORIGINAL - 4)]
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = generate(read_model(tmp_path), prompts, (), 20)
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
        ids = torch.tensor([prompt])
        whole = theirs.generate(ids, attention_mask=ids.new_ones(ids.shape), **greedy)
        assert answer == whole[0, len(prompt) :].tolist()


def test_scalings_differ():
    """Else equal logits would not show that a scaling is read."""
    scalings = [RopeScaling(kind=kind, factor=4.0, original_max_seq_len=32) for kind in ("linear", "dynamic", "llama3")]
    tables = [
        rope_tables(replace(BASE, max_seq_len=ORIGINAL, rope_scaling=scaling), torch.arange(64))[0]
        for scaling in (None, YARN, *scalings)
    ]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(tables) for b in tables[:i])


@pytest.mark.parametrize("rope", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("n", [1000, 5000])
def test_tables_far_from_the_start_are_transformers(rope, n):
    """An angle is position times frequency: at 5000, the last bit of a frequency shows."""
    raw = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1,
           "intermediate_size": 96, "vocab_size": 64, "max_position_embeddings": 1024}  # fmt: skip
    config = transformers.LlamaConfig.from_dict(raw | {"rope_scaling": dict(rope)})
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    reference = theirs(torch.zeros(1), torch.arange(n)[None])
    ours = rope_tables(configs.config_from_hf(raw | {"rope_scaling": rope}, []), torch.arange(n))
    for table, wanted in zip(ours, reference, strict=True):
        assert ((table - wanted[0, :, :32]).abs() > 1e-6).float().mean() < 0.01


def test_packed_texts_of_dynamic_rope_are_as_alone():
    """Each text's frequencies follow from its own length, not from its neighbours'."""
    model = random_model(replace(BASE, max_seq_len=16, rope_scaling=RopeScaling(kind="dynamic", factor=2.0)))
    lengths = (40, 10, 25)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    tokens, documents = make_tokens(BASE, sum(lengths)), torch.zeros(3, 4, dtype=torch.int32)
    documents[:, 0], documents[:, 1] = torch.tensor([0, *ends[:-1]]), torch.tensor(ends)
    with torch.no_grad():
        packed = model.logits(model(tokens, torch.cat([torch.arange(n) for n in lengths]), documents))
    alone = torch.cat([logits(model, tokens[end - n : end]) for n, end in zip(lengths, ends, strict=True)])
    assert (packed - alone).abs().max() < 1e-5


def test_lengths_of_texts():
    assert text_lengths(torch.tensor([0, 1, 2, 0, 0, 1, 5, 6])).tolist() == [3, 3, 3, 1, 2, 2, 7, 7]
    assert text_lengths(torch.tensor([], dtype=torch.int64)).tolist() == []


# ---- files that contradict themselves -------------------------------------------------------------------------------


def transformers_reading(raw):
    """Return (frequencies, attention factor) of a config.json, or None where transformers does not read it."""
    try:
        config = transformers.LlamaConfig.from_dict(json.loads(json.dumps(raw)))
        rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        return rope.inv_freq, rope.attention_scaling
    except Exception:
        return None


CHOICES = {
    "rope_theta": [500.0, 10000, None],
    "rope_scaling": [
        None, {}, 7, "linear", *KINDS.values(), {"type": "default"}, {"factor": 8.0}, {"rope_theta": 300.0},
        {"type": "linear", "rope_type": "llama3", "factor": 2.0}, {"rope_type": None, "type": "linear", "factor": 2.0},
        {"type": "yarn", "rope_type": "linear", "factor": 2.0, "rope_theta": 700.0},
        {**LLAMA3, "original_max_position_embeddings": None}, {"type": "linear", "factor": None},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": None, "truncate": None, "attention_factor": None},
        {"type": "linear", "factor": "4"},
    ],
    "rope_parameters": [
        None, {"rope_type": "default", "rope_theta": 900.0}, {"rope_theta": None}, [], 7,
        {**LLAMA3, "rope_theta": 800.0, "original_max_position_embeddings": 16},
        {"full_attention": {"rope_type": "linear", "factor": 2.0}},
    ],
    "original_max_position_embeddings": [64, 16, None, "64"],
    "max_position_embeddings": [128, 32],
}  # fmt: skip


def test_contradictions_are_read_as_transformers_reads_them_or_refused():
    """Never a third reading, over random choices of the keys that hold RoPE."""
    chooser, outcomes = random.Random(0), {"as transformers": 0, "refused": 0}
    for _ in range(1500):
        raw = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1,
               "intermediate_size": 96, "vocab_size": 64}  # fmt: skip
        raw |= {key: chooser.choice(values) for key, values in CHOICES.items() if chooser.random() < 0.6}
        problems, theirs = [], transformers_reading(raw)
        config = configs.config_from_hf(raw, problems)
        if config is None:
            assert problems
            outcomes["refused"] += 1
            continue
        assert theirs is not None, f"transformers does not read {raw}"
        ours, scaling = frequencies(16, config.rope_theta, config.rope_scaling), config.rope_scaling
        assert torch.allclose(ours, theirs[0], rtol=1e-6), raw
        assert (scaling.attention_factor if scaling else 1.0) == pytest.approx(theirs[1]), raw
        outcomes["as transformers"] += 1
    assert min(outcomes.values()) > 300, outcomes


def test_rope_scaling_goes_before_rope_parameters_with_the_theta_beside_it(tmp_path):
    hf_folder(
        tmp_path, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0},
        rope_parameters={"rope_type": "default", "rope_theta": 9000.0},
    )  # fmt: skip
    config = open_source(tmp_path).config
    assert (config.rope_theta, config.rope_scaling) == (500.0, RopeScaling(kind="linear", factor=4.0))
    assert_logits(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rope_scaling": {"full_attention": {"rope_type": "linear", "factor": 2}}}, "full_attention is an object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}, "rope_theta": 1}, "wanted more than 1 with yarn"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "wanted default, linear, dynamic, yarn, llama3"),
        ({"rope_theta": None}, "rope_theta is missing"),
    ],
    ids=str,
)
def test_what_is_refused_says_why(changes, words, tmp_path):
    hf_folder(tmp_path, **changes)
    assert_refused(tmp_path, words)


# ---- Meta -----------------------------------------------------------------------------------------------------------


def meta_rope(**params):
    """Return (RopeScaling, problems) of a params.json of LLaMA 3.1 8B with changes."""
    raw = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 500000.0,
           "use_scaled_rope": True, "vocab_size": 128256, **params}  # fmt: skip
    shapes = {"tok_embeddings.weight": (128256, raw["dim"]), "layers.0.feed_forward.w1.weight": (8192, raw["dim"])}
    problems = []
    config = configs.config_from_meta(raw, shapes, problems)
    return config and config.rope_scaling, problems


def test_factor_of_meta_models():
    assert meta_rope() == (RopeScaling(factor=8.0), [])
    assert meta_rope(dim=2048, n_layers=16)[0].factor == meta_rope(dim=3072, n_layers=28, n_heads=24)[0].factor == 32
    for name in ("rope_scale_factor", "rope_scaling_factor"):
        assert meta_rope(dim=2048, n_layers=16, **{name: 16})[0].factor == 16
    assert "rope_scale_factor is 8, but rope_scaling_factor is 16" in str(
        meta_rope(rope_scale_factor=8, rope_scaling_factor=16)
    )
    assert "rope_high_freq_factor is 1" in str(meta_rope(rope_high_freq_factor=1))


def test_theta_that_params_lack_is_that_of_metas_code():
    raw = {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 64}
    shapes = {"tok_embeddings.weight": (64, 32), "layers.0.feed_forward.w1.weight": (96, 32)}
    for more, theta in (({}, 10000.0), ({"use_scaled_rope": True}, 500000.0), ({"use_scaled_rope": False}, 500000.0)):
        assert configs.config_from_meta(raw | more, shapes, []).rope_theta == theta
    scaled = replace(BASE, rope_scaling=RopeScaling(8.0))
    assert configs.config_from_meta(configs.config_to_meta(scaled), shapes, []).rope_theta == scaled.rope_theta == 10000


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("dim, layers", [(2048, 16), (3072, 28), (4096, 32)])
def test_a_factor_comes_back_from_meta(factor, dim, layers):
    config = replace(
        BASE, dim=dim, n_layers=layers, head_dim=dim // 4, hidden_dim=4 * dim, rope_scaling=RopeScaling(factor)
    )
    shapes = {"tok_embeddings.weight": (64, dim), "layers.0.feed_forward.w1.weight": (4 * dim, dim)}
    assert configs.config_from_meta(configs.config_to_meta(config), shapes, []).rope_scaling == RopeScaling(factor)


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def llama_cpp_factors(dim, theta, factor, low, high, length):
    """Return rope_freqs.weight as llama.cpp's converter computes it for these settings of llama3."""
    factors = []
    for frequency in 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelength = 2 * math.pi / frequency
        smooth = (length / wavelength - low) / (high - low)
        slowed = factor if wavelength > length / low else 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if wavelength < length / high else slowed)
    return torch.tensor(factors, dtype=torch.float32).numpy()


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [8, 16, 64, 128])
@pytest.mark.parametrize("factor", [2.0, 2.5, 8.0, 32.0])
@pytest.mark.parametrize("length", [64, 1000, 2048, 8192, 16384, 131072])
def test_factors_of_any_original_length_are_read(theta, head_dim, factor, length, gguf_file):
    want = RopeScaling(factor=factor, original_max_seq_len=length)
    path = gguf_file(head_dim, theta, want)
    got = open_source(path).config.rope_scaling or RopeScaling(kind="linear", factor=1.0)
    ours, theirs = (frequencies(head_dim, theta, scaling) for scaling in (got, want))
    assert torch.allclose(ours, theirs, rtol=1e-5), got
    if head_dim >= 64 and length < 131072:
        assert got == want


@pytest.mark.parametrize("low, high", [(1.0, 2.0), (2.0, 8.0), (1.5, 3.0)])
def test_factors_of_other_bounds_are_read(low, high, gguf_file):
    want = RopeScaling(8.0, low, high, 6000)
    got = open_source(gguf_file(128, 500000.0, want)).config.rope_scaling
    assert torch.allclose(*(frequencies(128, 500000.0, scaling) for scaling in (got, want)), rtol=1e-5)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder, models = tmp_path_factory.mktemp("gguf"), {}

    def write(head_dim, theta, scaling):
        config = replace(BASE, n_layers=1, head_dim=head_dim, rope_theta=theta)
        model = models.setdefault(head_dim, make_theirs(config))
        factors = llama_cpp_factors(
            head_dim,
            theta,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_seq_len,
        )
        return write_gguf(folder / "m.gguf", model, config, add={"rope_freqs.weight": factors})

    return write


def test_gguf_scaling_is_read_as_llama_cpp_reads_it(tmp_path):
    theirs, path = make_theirs(BASE), tmp_path / "m.gguf"

    def scaling(**metadata):
        path.unlink(missing_ok=True)
        write_gguf(path, theirs, BASE, **{f"rope.{key}": value for key, value in metadata.items()})
        return open_source(path).config.rope_scaling

    linear = RopeScaling(kind="linear", factor=4.0)
    assert scaling(**{"scaling.factor": 4.0}) == linear, "without a type it is linear"
    assert scaling(scale_linear=4.0) == scaling(scale_linear=2.0, **{"scaling.factor": 4.0}) == linear
    assert scaling(**{"scaling.type": "none", "scaling.factor": 4.0}) is None
    assert scaling(**{"scaling.type": "linear"}) is None
    yarn = {"scaling.type": "yarn", "scaling.factor": 4.0}
    recommended = 0.1 * math.log(4.0) + 1.0
    by_default = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=128, attention_factor=recommended)
    assert scaling(**yarn) == by_default
    assert scaling(**yarn, **{"scaling.attn_factor": 2.0}) == replace(by_default, attention_factor=2 * recommended)
    assert scaling(**yarn, **{"scaling.yarn_attn_factor": 2.0}) == replace(by_default, attention_factor=2.0)
    betas = {"scaling.yarn_beta_fast": 20.0, "scaling.yarn_beta_slow": 2.0, "scaling.original_context_length": 64}
    own = {"beta_fast": 20.0, "beta_slow": 2.0, "original_max_seq_len": 64}
    assert scaling(**yarn, **betas) == replace(by_default, **own)
    for more, words in (
        ({**yarn, "scaling.attn_factor": 2.0, "scaling.yarn_attn_factor": 3.0}, "are both there"),
        ({**yarn, "scaling.yarn_log_multiplier": 1.0}, "yarn_log_multiplier is 1.0"),
        ({"scaling.type": "longrope"}, "wanted none, linear or yarn"),
        ({"scaling.attn_factor": 2.0}, "attn_factor is 2.0, which is not supported without yarn"),
    ):
        path.unlink()
        write_gguf(path, theirs, BASE, **{f"rope.{key}": value for key, value in more.items()})
        assert_refused(path, words)
    path.unlink()
    factors = {"rope_freqs.weight": np.array([1, 1, 8, 8], np.float32)}
    write_gguf(path, theirs, BASE, add=factors, **{"rope.scaling.factor": 4.0})
    assert_refused(path, "llama.rope.scaling is linear, but rope_freqs.weight scales RoPE too")


@pytest.mark.parametrize("original", [256, 4096, 32768, 10**6])
def test_yarn_slows_the_pairs_between_as_transformers_does_whatever_the_original_length(original):
    """Also where no pair turns as seldom as those that are slowed whole."""
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original, "rope_theta": 1e4}
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=4 * original, rope_parameters=given
    )
    theirs, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = frequencies(16, 1e4, RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=original))
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_the_next_tokens_of_several_texts_are_turned_by_the_length_of_their_own():
    """Though their positions count up, as those of one text do."""
    shape = ModelConfig(
        dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=32, vocab_size=64, max_seq_len=4,
        rope_scaling=RopeScaling(kind="dynamic", factor=2.0),
    )  # fmt: skip
    together = rope_tables(shape, torch.tensor([5, 6, 9]), one_of_each=True)
    alone = [rope_tables(shape, torch.arange(position + 1)) for position in (5, 6, 9)]
    for which in (0, 1):
        assert torch.allclose(together[which], torch.stack([tables[which][-1] for tables in alone]), rtol=1e-6)


@pytest.mark.parametrize(
    ("least", "most", "length"),
    [(100, 200, 128), (128, 200, 128), (65, 127, 91), (100, 128, 128), (0.2, 0.24, 1), (300, 511, 392)],
)  # fmt: skip
def test_a_length_between_two_is_a_power_of_two_or_their_middle(least, most, length):
    assert length_between(least, most) == length


@pytest.mark.parametrize(
    ("computed", "length"),
    [(8192.05, 8192), (128000.7, 128000), (128001.6, 128002), (100.4, 100), (0.2, 1), (65.6, 66)],
)
def test_a_computed_length_is_rounded_to_a_multiple_of_64_where_one_is_near(computed, length):
    assert round_length(computed) == length
