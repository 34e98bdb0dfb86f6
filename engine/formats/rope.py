"""RopeScaling from and to the settings of other programs: config.json, params.json, GGUF."""

import math
from collections.abc import Iterator
from typing import Any

import torch

import kernels
from engine.formats.settings import REQUIRED, Settings
from engine.formats.tensor_files import Stored
from engine.model.config import ROPE_KINDS, ModelConfig, RopeScaling
from engine.model.rope import frequencies, yarn_attention_factor

NEAR = 1e-6  # relative: fp32 numbers that another program computed

# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def rope_from_hf(settings: Settings, max_seq_len: int | None) -> tuple[float | None, RopeScaling | None]:
    """Return (theta, scaling) of a config.json; theta is None after a fault, scaling None for plain RoPE.

    Transformers' own reading where keys contradict each other: rope_scaling goes before rope_parameters, which is then
    not read at all, theta in either before theta beside it, and original_max_position_embeddings beside them before
    that within.
    """
    raw, key = settings.get("rope_parameters", dict, {}) or {}, "rope_parameters"
    if settings.raw.get("rope_scaling"):
        raw, key = settings.get("rope_scaling", dict, {}) or {}, "rope_scaling"
    rope = Settings(raw, f"config.json, {key}", settings.problems)
    theta = get_unless_null(rope if "rope_theta" in raw else settings, "rope_theta", float, 10000.0)
    rope.refuse("partial_rotary_factor", 1)
    for name, value in raw.items():
        if isinstance(value, dict):
            rope.add_problem(f"{name[:80]} is an object: layers that differ in RoPE are not supported")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_KINDS:
        rope.add_problem(f"RoPE of type {str(kind)[:80]!r} is not supported; wanted default, {', '.join(ROPE_KINDS)}")
        return theta, None
    before = len(settings.problems)
    if kind in ("linear", "dynamic"):
        fields = {"factor": rope.get("factor", float)}
    else:
        original = get_unless_null(rope, "original_max_position_embeddings", int, max_seq_len)
        original = get_unless_null(settings, "original_max_position_embeddings", int, original)
        read = yarn_from_hf if kind == "yarn" else llama3_from_hf
        fields = {"original_max_seq_len": original, **read(rope, original, max_seq_len)}
    return theta, RopeScaling(kind=kind, **fields) if len(settings.problems) == before else None


def get_unless_null(settings: Settings, key: str, kind: type, default: Any) -> Any:
    """Return the value of a key, or the default when it is absent. A key that is null is a problem, and None."""
    return settings.get(key, kind, REQUIRED if key in settings.raw else default)


def llama3_from_hf(rope: Settings, original: int | None, max_seq_len: int | None) -> dict[str, Any]:
    """Return the fields of llama3's RopeScaling that are in rope_scaling, adding faults to its problems."""
    names = ("factor", "low_freq_factor", "high_freq_factor")
    fields = {name: rope.get(name, float) for name in names}
    _, low, high = fields.values()
    if low and high and low >= high:
        rope.add_problem(f"low_freq_factor {low} must be under high_freq_factor {high}")
    return fields


def yarn_from_hf(rope: Settings, original: int | None, max_seq_len: int | None) -> dict[str, Any]:
    """Return the fields of yarn's RopeScaling that are in rope_scaling, adding faults to its problems.

    A factor of null is the ratio of the lengths. The attention factor may be given by mscale and mscale_all_dim.
    """
    ratio = max_seq_len / original if max_seq_len and original and "factor" in rope.raw else REQUIRED
    factor, attention = rope.get("factor", float, ratio), rope.get("attention_factor", float, None)
    mscale, all_dim = (
        rope.get(name, float, None) if rope.raw.get(name) else None for name in ("mscale", "mscale_all_dim")
    )
    if attention is None and factor:
        attention = yarn_attention_factor(factor)
        if mscale and all_dim:
            attention = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all_dim)
    return {
        "factor": factor,
        "attention_factor": attention,
        "beta_fast": rope.get("beta_fast", float, 32.0),
        "beta_slow": rope.get("beta_slow", float, 1.0),
        "truncate": get_unless_null(rope, "truncate", bool, True),
    }


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a config.json that hold RoPE, in the words of transformers 4."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_scaling": None, "rope_theta": config.rope_theta}
    rope: dict[str, Any] = {"factor": scaling.factor, "rope_type": scaling.kind}
    beside = {}
    if scaling.kind == "llama3":
        rope |= {"high_freq_factor": scaling.high_freq_factor, "low_freq_factor": scaling.low_freq_factor}
        if scaling.original_max_seq_len != 8192:  # what llama.cpp's converter takes where the length is not beside
            beside = {"original_max_position_embeddings": scaling.original_max_seq_len}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if not scaling.truncate:
            rope |= {"truncate": False}
        if scaling.attention_factor != yarn_attention_factor(scaling.factor):
            rope |= {"attention_factor": scaling.attention_factor}
    if scaling.kind in ("llama3", "yarn"):
        rope |= {"original_max_position_embeddings": scaling.original_max_seq_len}
    return beside | {"rope_scaling": dict(sorted(rope.items())), "rope_theta": config.rope_theta}


# ---- Meta -----------------------------------------------------------------------------------------------------------


def rope_from_meta(settings: Settings) -> RopeScaling:
    """Return the RopeScaling of a params.json that uses scaled RoPE, adding faults to its problems."""
    settings.refuse("rope_high_freq_factor", 4)
    raw, names = settings.raw, ("rope_scale_factor", "rope_scaling_factor")
    if None not in (given := [raw.get(name) for name in names]) and given[0] != given[1]:
        settings.add_problem(f"{names[0]} is {str(given[0])[:80]}, but {names[1]} is {str(given[1])[:80]}")
    name = names[1] if given[0] is None else names[0]
    return RopeScaling(factor=settings.get(name, float, meta_rope_factor(raw.get("dim"), raw.get("n_layers"))))


def meta_rope_factor(dim: Any, n_layers: Any) -> float:
    """Return the factor of scaled RoPE where params.json has none: 32 for LLaMA 3.2 1B and 3B, 8 for LLaMA 3.1.

    Meta publishes none; these are those of its own conversions for Hugging Face.
    """
    return 32.0 if (dim, n_layers) in ((2048, 16), (3072, 28)) else 8.0


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def rope_from_gguf(settings: Settings, max_seq_len: int | None) -> RopeScaling | None:
    """Return the RopeScaling of GGUF metadata as llama.cpp reads it: without a type it is linear, without a factor 1.

    llama.cpp's converter writes yarn_attn_factor and the betas of other programs' files, which its llama does not read.
    They are read here, so that a model keeps its meaning. Faults are added to problems.
    """
    prefix = "llama.rope.scaling."
    kind = settings.raw.get(f"{prefix}type", "linear")
    if kind not in ("none", "linear", "yarn"):
        settings.add_problem(f"{prefix}type is {str(kind)[:80]!r}, which is not supported; wanted none, linear or yarn")
    old = settings.get("llama.rope.scale_linear", float, 1.0)  # of files of 2023
    factor = settings.get(f"{prefix}factor", float, old)
    attention = settings.get(f"{prefix}attn_factor", float, 1.0)
    if kind == "none" or not factor or not attention:
        return None
    if kind == "linear":
        if attention != 1:
            settings.add_problem(f"{prefix}attn_factor is {attention}, which is not supported without yarn")
        return RopeScaling(kind="linear", factor=factor) if factor != 1 else None
    settings.refuse(f"{prefix}yarn_ext_factor", 1, -1)
    settings.refuse(f"{prefix}yarn_log_multiplier", 0)
    whole = f"{prefix}yarn_attn_factor"
    if attention != 1 and whole in settings.raw:
        settings.add_problem(f"{prefix}attn_factor and {whole} are both there; wanted one")
    before, recommended = len(settings.problems), yarn_attention_factor(factor)
    attention = settings.get(whole, float, attention * recommended)
    fields = {
        "original_max_seq_len": settings.get(f"{prefix}original_context_length", int, max_seq_len),
        "attention_factor": recommended
        if attention and math.isclose(attention, recommended, rel_tol=NEAR)
        else attention,
        "beta_fast": settings.get(f"{prefix}yarn_beta_fast", float, 32.0),
        "beta_slow": settings.get(f"{prefix}yarn_beta_slow", float, 1.0),
    }
    return RopeScaling(kind="yarn", factor=factor, **fields) if len(settings.problems) == before else None


def scaling_from_factors(stored: Stored, head_dim: int, theta: float, settings: Settings) -> RopeScaling | None:
    """Return the RopeScaling whose frequencies are the unscaled ones divided by the stored (Dh/2,) factors.

    Return None when there is no scaling (all factors are 1). Add a problem and return None when the factors are not
    those of llama3's scaling.
    """
    if stored.shape != (head_dim / 2,) or isinstance(stored.dtype, str):
        settings.add_problem(f"rope_freqs.weight is {stored.shape} {stored.dtype}, wanted fp32 {(head_dim / 2,)}")
        return None
    factors = torch.cat([part for _, _, part in stored.blocks()]).double()
    if torch.all(factors == 1):
        return None
    if torch.isfinite(factors).all() and torch.all(factors > 0):
        turns = kernels.rope_frequencies(head_dim, theta).double() / (2 * math.pi)  # a token
        for scaling in fit_llama3(1 / factors, turns):
            if torch.allclose(frequencies(head_dim, theta, scaling).double() * factors, 2 * math.pi * turns, rtol=1e-5):
                return scaling
    settings.add_problem("rope_freqs.weight holds factors that are not those of LLaMA 3.1's RoPE scaling")
    return None


def fit_llama3(kept: torch.Tensor, turns: torch.Tensor) -> Iterator[RopeScaling]:
    """Yield scalings that may keep these shares (Dh/2,) of the frequencies, which are turns (Dh/2,) a token.

    llama3 keeps 1 of fast pairs, 1 / factor of slow ones, and between them a share that grows evenly with the
    frequency. To double the length and the low and high factors changes nothing, so the low factor is taken as 1.
    """
    if torch.all(kept == kept[0]):
        yield RopeScaling(kind="linear", factor=round(float(1 / kept[0]), 4))
    slow = kept < 1 - NEAR
    shares = [float(kept.min())]
    if slow.sum() > 1:  # where no pair is so slow that it shows the factor
        slope, at_0 = fit_line(turns[slow], kept[slow])
        shares.append((3 * at_0 + 1) / 4)
    shares += [1 / factor for factor in (8, 32, 2, 4, 16, 64)]  # where one pair alone is slowed, several will do
    others = []
    for share in shares:
        blend = (kept - share) / (1 - share) if 0 < share < 1 else -kept
        between = (blend > NEAR) & (blend < 1 - NEAR)
        factor, x, y = round(1 / share, 4) if share else 0.0, turns[between], blend[between]
        if (blend < -NEAR).any():
            continue
        if len(x) == 0:
            length = length_between(4 / float(turns[~slow].min()), 1 / float(turns[slow].max()))
            yield RopeScaling(factor=factor, original_max_seq_len=length)
            continue
        yield RopeScaling(factor=factor, original_max_seq_len=round_length(float(((3 * y + 1) / x).mean())))
        if len(x) > 1:
            slope, at_0 = fit_line(x, y)
            if at_0 < 0:
                others.append((factor, 1.0, round(1 - 1 / at_0, 4), round_length(-slope / at_0)))
    yield from (RopeScaling(*other) for other in others)


def fit_line(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return (slope, value at 0) of the line nearest to points."""
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return slope, float(y.mean()) - slope * float(x.mean())


def round_length(length: float) -> int:
    """Return the whole number of tokens nearest to a length that was computed, a multiple of 64 where one is near."""
    of_64 = 64 * round(length / 64)
    return of_64 if abs(of_64 - length) < NEAR * 10 * length else max(1, round(length))


def length_between(least: float, most: float) -> int:
    """Return a length of at least `least` and at most `most` tokens, a power of two where there is one."""
    power = 2 ** math.floor(math.log2(most))
    return power if power >= least else max(1, round(math.sqrt(least * most)))
