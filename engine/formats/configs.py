"""ModelConfig from and to the settings of other programs: config.json (Hugging Face), params.json (Meta), GGUF."""

from collections.abc import Sequence
from typing import Any

import torch

import kernels
from engine.formats.tensor_files import Stored
from engine.model.config import ModelConfig, RopeScaling

REQUIRED = object()  # the default of a key that must be there
MAX_PROBLEMS = 1000  # lines of one error


class Settings:
    """The settings in another program's file, read with a check of their type.

    Every fault is added to problems, with the name of the file. So one error can list them all.
    """

    def __init__(self, raw: dict[str, Any], file: str, problems: list[str]):
        self.raw, self.file, self.problems = raw, file, problems

    def add_problem(self, text: str) -> None:
        """Add a fault of these settings to the problems."""
        self.problems.append(f"{self.file}: {text}")

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """Return the value of a key: a positive int or float, a bool or a dict.

        When it is missing and has no default, or is not of this kind, add a problem and return None.
        """
        value = self.raw.get(key)
        if value is None:
            if default is REQUIRED:
                self.add_problem(f"{key} is missing")
                return None
            return default
        number = type(value) in (int, float) and 0 < value < 2**63  # so neither NaN nor infinite
        if kind is float and number:
            return float(value)
        if kind is int and number and value == int(value):
            return int(value)
        if kind in (bool, dict) and type(value) is kind:
            return value
        wanted = {int: "a positive whole number", float: "a positive number", bool: "true or false", dict: "an object"}
        self.add_problem(f"{key} is {str(value)[:80]!r}, wanted {wanted[kind]}")
        return None

    def refuse(self, key: str, *harmless: Any, why: str = "") -> None:
        """Add a problem unless the key is absent, None or one of the harmless values."""
        value = self.raw.get(key)
        if value is not None and value not in harmless:
            self.add_problem(f"{key} is {str(value)[:80]}, which is not supported{why}")

    def make_config(self, n_problems_before: int, **fields: Any) -> ModelConfig | None:
        """Return the ModelConfig of these fields, or None when problems were found since n_problems_before."""
        if len(self.problems) > n_problems_before:
            return None
        try:
            return ModelConfig(**fields)
        except ValueError as error:
            self.add_problem(str(error))
            return None


def join_problems(problems: list[str]) -> str:
    """Return the text of an error that names every problem, each on a line of its own when there are several."""
    if len(problems) == 1:
        return problems[0]
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return "\n  ".join([f"{len(problems)} problems", *problems[:MAX_PROBLEMS], *more])


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def config_from_hf(raw: dict[str, Any], problems: list[str]) -> ModelConfig | None:
    """Return the ModelConfig of a config.json; None when faults were added to problems.

    Transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters; both are read.
    """
    before, settings = len(problems), Settings(raw, "config.json", problems)
    architectures = raw.get("architectures") or []
    kinds = [raw.get("model_type"), *(architectures if isinstance(architectures, list) else [architectures])]
    if kinds[0] != "llama" or [str(kind).lower() for kind in kinds[1:]] not in ([], ["llamaforcausallm"]):
        settings.add_problem(f"a {' '.join(map(str, kinds))}; only LLaMA is read (model_type llama, LlamaForCausalLM)")
        return None
    for key in ("attention_bias", "mlp_bias"):
        settings.refuse(key, False, why=": LLaMA has no biases")
    settings.refuse("hidden_act", "silu")
    settings.refuse("quantization_config", why="; save the model unquantised first")
    settings.refuse("sliding_window")
    settings.refuse("partial_rotary_factor", 1)
    n_heads = settings.get("num_attention_heads", int)
    theta, scaling = rope_from_hf(settings)
    return settings.make_config(
        before,
        dim=settings.get("hidden_size", int),
        n_layers=settings.get("num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=settings.get("num_key_value_heads", int, n_heads),
        hidden_dim=settings.get("intermediate_size", int),
        vocab_size=settings.get("vocab_size", int),
        max_seq_len=settings.get("max_position_embeddings", int, 2048),  # 2023 conversions leave it out
        norm_eps=settings.get("rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        head_dim=settings.get("head_dim", int, None),
        tied=settings.get("tie_word_embeddings", bool, False),
    )


def rope_from_hf(settings: Settings) -> tuple[float | None, RopeScaling | None]:
    """Return (theta, scaling) of a config.json; theta is None after a fault, scaling None for plain RoPE."""
    theta = settings.get("rope_theta", float, 10000.0)
    key = "rope_parameters" if settings.raw.get("rope_parameters") else "rope_scaling"
    raw = settings.get(key, dict, {})
    if not raw:
        return theta, None
    rope = Settings(raw, f"config.json, {key}", settings.problems)
    theta = rope.get("rope_theta", float, theta)
    rope.refuse("partial_rotary_factor", 1)
    kind = rope.raw.get("rope_type") or rope.raw.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        rope.add_problem(f"RoPE of type {str(kind)[:80]!r} is not supported; wanted default or llama3")
        return theta, None
    factor, low, high = (rope.get(key, float) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = rope.get("original_max_position_embeddings", int)
    if low and high and low >= high:
        rope.add_problem(f"low_freq_factor {low} must be under high_freq_factor {high}")
    return theta, RopeScaling(factor, low, high, original)


def config_to_hf(config: ModelConfig, dtype: torch.dtype, bos_id: int | None, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Return a config.json in the words of transformers 4, which transformers 5 and vLLM read too."""
    scaling = config.rope_scaling
    rope_scaling = scaling and {
        "factor": scaling.factor,
        "high_freq_factor": scaling.high_freq_factor,
        "low_freq_factor": scaling.low_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
        "rope_type": "llama3",
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **token_ids_to_hf(bos_id, eos_ids),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_seq_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": rope_scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),  # transformers 5 writes "dtype" and reads both
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def token_ids_to_hf(bos_id: int | None, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Return the ids that begin and end a text, with their keys in config.json and generation_config.json.

    A missing id is written as null: where the key is left out, transformers assumes 1 and 2.
    """
    return {"bos_token_id": bos_id, "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None}


# ---- Meta -----------------------------------------------------------------------------------------------------------


def config_from_meta(
    raw: dict[str, Any], shapes: dict[str, tuple[int, ...]], problems: list[str]
) -> ModelConfig | None:
    """Return the ModelConfig of a params.json; None when faults were added to problems.

    shapes: of the merged tensors; they give hidden_dim, which params.json lacks, and vocab_size where it is -1.
    """
    before, settings = len(problems), Settings(raw, "params.json", problems)
    for key in ("moe_args", "quantization_args", "lora_args", "vision_chunk_size"):
        settings.refuse(key)
    dim, n_heads = settings.get("dim", int), settings.get("n_heads", int)
    theta = settings.get("rope_theta", float, 10000.0)
    scaling = None
    if settings.get("use_scaled_rope", bool, False):
        scaling = RopeScaling(factor=settings.get("rope_scale_factor", float, 8.0))
    embedding, gate = shapes.get("tok_embeddings.weight"), shapes.get("layers.0.feed_forward.w1.weight")
    if raw.get("vocab_size", -1) == -1:
        vocab_size = embedding[0] if embedding else None
        if vocab_size is None:
            settings.add_problem("vocab_size is in no file")
    else:
        vocab_size = settings.get("vocab_size", int)
    norm_eps = settings.get("norm_eps", float, 1e-5)
    return settings.make_config(
        before,
        dim=dim,
        n_layers=settings.get("n_layers", int),
        n_heads=n_heads,
        n_kv_heads=settings.get("n_kv_heads", int, n_heads),
        hidden_dim=gate[0] if gate else 1,  # check_tensors() reports the missing tensor
        vocab_size=vocab_size,
        max_seq_len=guess_max_seq_len(scaling, theta, norm_eps),
        norm_eps=norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tied="output.weight" not in shapes,
    )


def guess_max_seq_len(scaling: RopeScaling | None, theta: float | None, norm_eps: float | None) -> int:
    """Return max_seq_len, which params.json lacks, by the release of LLaMA that has these settings."""
    if scaling:
        return 131072  # LLaMA 3.1 and 3.2
    if theta and theta >= 500000:
        return 8192  # LLaMA 3
    return 4096 if norm_eps == 1e-5 else 2048  # LLaMA 2; LLaMA 1, where 7B to 33B have an eps of 1e-6


def config_to_meta(config: ModelConfig) -> dict[str, Any]:
    """Return a params.json for Meta's code. Raise ValueError for a shape that it cannot express.

    Only what differs from the defaults of LLaMA 1 is written, because the ModelArgs of LLaMA 1 refuses unknown keys.
    """
    problems = []
    if config.head_dim * config.n_heads != config.dim:
        problems.append(f"head_dim {config.head_dim} is not dim / n_heads")
    scaling = config.rope_scaling
    if scaling and scaling != RopeScaling(factor=scaling.factor):
        problems.append(f"its rope_scaling {scaling} is not {RopeScaling(factor=scaling.factor)}")
    feed_forward = meta_feed_forward(config.dim, config.hidden_dim)
    if feed_forward is None:
        problems.append(f"hidden_dim {config.hidden_dim} comes out of no multiple_of and ffn_dim_multiplier")
    if problems or feed_forward is None:
        raise ValueError("; ".join(problems))
    params: dict[str, Any] = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    params |= {"vocab_size": config.vocab_size, **feed_forward, "norm_eps": config.norm_eps}
    if config.rope_theta != 10000:
        params["rope_theta"] = config.rope_theta
    if scaling:
        params["use_scaled_rope"] = True
        if scaling.factor != 8:
            params["rope_scale_factor"] = scaling.factor
    return params


def meta_hidden_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """Return hidden_dim as FeedForward of meta-llama/llama3, llama/model.py, computes it from params.json."""
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def meta_feed_forward(dim: int, hidden: int) -> dict[str, Any] | None:
    """Return multiple_of and ffn_dim_multiplier for which meta_hidden_dim() is hidden, or None when there are none.

    ffn_dim_multiplier is used only where multiple_of does not suffice: LLaMA 1 does not know it.
    """
    sizes = [256, *(2**k for k in range(12, -1, -1))]
    for size in sizes:
        if meta_hidden_dim(dim, size) == hidden:
            return {"multiple_of": size}
    for size in sizes:
        base = int(2 * (4 * dim) / 3)
        for target in (hidden, hidden - size / 2):
            if base and meta_hidden_dim(dim, size, target / base) == hidden:
                return {"multiple_of": size, "ffn_dim_multiplier": target / base}
    return None


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def config_from_gguf(raw: dict[str, Any], stored: dict[str, Stored], problems: list[str]) -> ModelConfig | None:
    """Return the ModelConfig of GGUF metadata; None when faults were added to problems.

    stored: the file's tensors. The scaling of RoPE is read from rope_freqs.weight, which is then removed from stored.
    """
    before, settings = len(problems), Settings(raw, "metadata", problems)
    if raw.get("general.architecture") != "llama":
        settings.add_problem(f"general.architecture is {raw.get('general.architecture')!r}; only llama is read")
        return None
    settings.refuse("llama.expert_count", 0, why=": mixtures of experts are no LLaMA")
    settings.refuse("split.count", 0, 1, why="; merge the files with llama-gguf-split --merge")
    settings.refuse("llama.rope.scaling.type", "none")
    dim, n_heads = settings.get("llama.embedding_length", int), settings.get("llama.attention.head_count", int)
    head_dim = settings.get("llama.attention.key_length", int, dim // n_heads if dim and n_heads else None)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        settings.refuse(key, head_dim, why=f": it must be the head_dim {head_dim}")
    theta = settings.get("llama.rope.freq_base", float, 10000.0)
    embedding = stored.get("token_embd.weight")
    scaling = None
    if (factors := stored.pop("rope_freqs.weight", None)) and head_dim and theta:
        scaling = scaling_from_factors(factors, head_dim, theta, settings)
    return settings.make_config(
        before,
        dim=dim,
        n_layers=settings.get("llama.block_count", int),
        n_heads=n_heads,
        n_kv_heads=settings.get("llama.attention.head_count_kv", int, n_heads),
        hidden_dim=settings.get("llama.feed_forward_length", int),
        vocab_size=settings.get("llama.vocab_size", int, embedding.shape[0] if embedding else 1),
        max_seq_len=settings.get("llama.context_length", int),
        norm_eps=settings.get("llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=theta,
        rope_scaling=scaling,
        head_dim=head_dim,
        tied="output.weight" not in stored,
    )


def scaling_from_factors(stored: Stored, head_dim: int, theta: float, settings: Settings) -> RopeScaling | None:
    """Return the RopeScaling whose frequencies are the unscaled ones divided by the stored (Dh/2,) factors.

    Return None when there is no scaling (all factors are 1). Add a problem and return None when the factors are not
    those of LLaMA 3.1's scaling.
    """
    if stored.shape != (head_dim / 2,) or isinstance(stored.dtype, str):
        settings.add_problem(f"rope_freqs.weight is {stored.shape} {stored.dtype}, wanted fp32 {(head_dim / 2,)}")
        return None
    factors = torch.cat([part for _, _, part in stored.blocks()]).float()
    if torch.all(factors == 1):
        return None
    plain = kernels.rope_frequencies(head_dim, theta)
    # LLaMA 3.1 to 3.3 differ only in the factor, by which the slowest pairs are divided.
    scaling = RopeScaling(factor=round(float(factors.max()), 3)) if torch.isfinite(factors).all() else RopeScaling()
    if scaling.factor > 0:
        wanted = plain / kernels.rope_frequencies(head_dim, theta, scaling)
        if torch.allclose(factors, wanted, rtol=1e-4):
            return scaling
    settings.add_problem("rope_freqs.weight holds factors that are not those of LLaMA 3.1's RoPE scaling")
    return None
