"""ModelConfig from and to the settings of other programs: config.json (Hugging Face), params.json (Meta), GGUF."""

from collections.abc import Sequence
from typing import Any

import torch

from engine.formats.rope import (
    meta_rope_factor,
    rope_from_gguf,
    rope_from_hf,
    rope_from_meta,
    rope_to_hf,
    scaling_from_factors,
)
from engine.formats.settings import Settings
from engine.formats.tensor_files import Stored
from engine.model.config import ModelConfig, RopeScaling

FAMILIES = {  # model_type: architectures, in lower case. Those without a head have one when it is tied to the embedding
    "llama": ("llamaforcausallm", "llamamodel"),
    "mistral": ("mistralforcausallm", "mistralmodel"),
}

# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def config_from_hf(raw: dict[str, Any], problems: list[str]) -> ModelConfig | None:
    """Return the ModelConfig of a config.json; None when faults were added to problems.

    Transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters; both are read.
    """
    before, settings = len(problems), Settings(raw, "config.json", problems)
    architectures = raw.get("architectures") or []
    kinds = [raw.get("model_type"), *(architectures if isinstance(architectures, list) else [architectures])]
    family = FAMILIES.get(str(kinds[0]))
    if family is None or [str(kind).lower() for kind in kinds[1:]] not in ([], *([name] for name in family)):
        settings.add_problem(
            f"a {' '.join(map(str, kinds))}; only LLaMA is read (model_type llama, LlamaForCausalLM, and mistral, "
            "MistralForCausalLM, without a sliding window)"
        )
        return None
    if refuse_quantised(settings):
        return None
    is_mistral = kinds[0] == "mistral"
    if is_mistral:
        # What transformers takes where a key is absent. Its Mistral has no biases, whatever the keys say.
        settings.raw = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072} | raw
        settings.refuse("attention_bias", False)
        settings.refuse("mlp_bias", False)
    settings.refuse("hidden_act", "silu")
    settings.refuse("sliding_window", why=": every token sees all before it here")
    settings.refuse("partial_rotary_factor", 1)
    n_heads = settings.get("num_attention_heads", int)
    max_seq_len = settings.get("max_position_embeddings", int, 2048)  # 2023 conversions leave it out
    theta, scaling = rope_from_hf(settings, max_seq_len)
    return settings.make_config(
        before,
        dim=settings.get("hidden_size", int),
        n_layers=settings.get("num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=settings.get("num_key_value_heads", int, n_heads),
        hidden_dim=settings.get("intermediate_size", int),
        vocab_size=settings.get("vocab_size", int),
        max_seq_len=max_seq_len,
        norm_eps=settings.get("rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        head_dim=settings.get("head_dim", int, None),
        tied=settings.get("tie_word_embeddings", bool, False),
        attention_bias=settings.get("attention_bias", bool, False),
        mlp_bias=settings.get("mlp_bias", bool, False),
    )


def refuse_quantised(settings: Settings) -> bool:
    """Add one problem and return True when the weights of a config.json are not plain numbers of 16 bits or more."""
    quantisation = settings.raw.get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        settings.add_problem(
            f"quantization_config: weights quantised by {str(method)[:80]} are not read; save the model unquantised "
            "first, in bf16"
        )
        return True
    for key in ("torch_dtype", "dtype"):
        dtype = str(settings.raw.get(key) or "auto").removeprefix("torch.")
        if dtype not in ("auto", "float32", "float", "float16", "half", "bfloat16", "float64", "double"):
            settings.add_problem(
                f"{key} is {dtype[:80]}; weights of this type are not read, save the model in bf16 first"
            )
            return True
    return False


def config_to_hf(config: ModelConfig, dtype: torch.dtype, bos_id: int | None, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Return a config.json in the words of transformers 4, which transformers 5 and vLLM read too."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        **token_ids_to_hf(bos_id, eos_ids),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_seq_len,
        "mlp_bias": config.mlp_bias,
        "model_type": "llama",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        **rope_to_hf(config),
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

# Keys of params.json, Meta's and Mistral's, that make another model of the same tensors.
NOT_OF_LLAMA = (
    "moe_args", "moe", "quantization_args", "quantization", "lora_args", "vision_chunk_size", "vision_encoder",
    "sliding_window", "yarn", "llama_4_scaling",
)  # fmt: skip


def config_from_meta(
    raw: dict[str, Any], shapes: dict[str, tuple[int, ...]], problems: list[str]
) -> ModelConfig | None:
    """Return the ModelConfig of a params.json; None when faults were added to problems.

    shapes: of the merged tensors; they give hidden_dim, which params.json lacks, and vocab_size where it is -1.
    """
    before, settings = len(problems), Settings(raw, "params.json", problems)
    for key in NOT_OF_LLAMA:
        settings.refuse(key)
    settings.refuse("use_biases", False)
    dim, n_heads = settings.get("dim", int), settings.get("n_heads", int)
    # The default of LLaMA 1 and 2's code; that of LLaMA 3.1, which alone knows use_scaled_rope.
    theta = settings.get("rope_theta", float, 500000.0 if "use_scaled_rope" in raw else 10000.0)
    scaling = rope_from_meta(settings) if settings.get("use_scaled_rope", bool, False) else None
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
        head_dim=settings.get("head_dim", int, None),  # Mistral writes it
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
    if config.attention_bias or config.mlp_bias:
        problems.append("it has biases")
    scaling = config.rope_scaling
    if scaling and scaling.kind != "llama3":
        problems.append(f"its RoPE is {scaling.kind}, for which params.json has no words")
    elif scaling and scaling != RopeScaling(factor=scaling.factor):
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
    if config.rope_theta != 10000 or scaling:
        params["rope_theta"] = config.rope_theta
    if scaling:
        params["use_scaled_rope"] = True
        if scaling.factor != meta_rope_factor(config.dim, config.n_layers):
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
    if raw.get("split.count") not in (None, 0, 1):
        number = f"{raw['split.no'] + 1} " if type(raw.get("split.no")) is int else ""
        settings.add_problem(
            f"part {number}of {str(raw['split.count'])[:80]} of a split GGUF; merge all parts first: llama-gguf-split "
            "--merge FIRST-PART.gguf WHOLE.gguf"
        )
        return None
    if raw.get("general.type", "model") != "model":
        settings.add_problem(f"a GGUF of type {str(raw['general.type'])[:80]}, not a model; merge it into its base")
        return None
    if raw.get("general.architecture") != "llama":
        settings.add_problem(f"general.architecture is {raw.get('general.architecture')!r}; only llama is read")
        return None
    settings.refuse("llama.expert_count", 0, why=": mixtures of experts are no LLaMA")
    dim, n_heads = settings.get("llama.embedding_length", int), settings.get("llama.attention.head_count", int)
    head_dim = settings.get("llama.attention.key_length", int, dim // n_heads if dim and n_heads else None)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        settings.refuse(key, head_dim, why=f": it must be the head_dim {head_dim}")
    theta = settings.get("llama.rope.freq_base", float, 10000.0)
    embedding = stored.get("token_embd.weight")
    max_seq_len = settings.get("llama.context_length", int)
    scaling = rope_from_gguf(settings, max_seq_len)
    if (factors := stored.pop("rope_freqs.weight", None)) and head_dim and theta:
        if scaling:
            settings.add_problem(f"llama.rope.scaling is {scaling.kind}, but rope_freqs.weight scales RoPE too")
        scaling = scaling_from_factors(factors, head_dim, theta, settings)
    return settings.make_config(
        before,
        dim=dim,
        n_layers=settings.get("llama.block_count", int),
        n_heads=n_heads,
        n_kv_heads=settings.get("llama.attention.head_count_kv", int, n_heads),
        hidden_dim=settings.get("llama.feed_forward_length", int),
        vocab_size=settings.get("llama.vocab_size", int, embedding.shape[0] if embedding else 1),
        max_seq_len=max_seq_len,
        norm_eps=settings.get("llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=theta,
        rope_scaling=scaling,
        head_dim=head_dim,
        tied="output.weight" not in stored,
        attention_bias=any(f"blk.0.attn_{name}.bias" in stored for name in ("q", "k", "v", "output")),
        mlp_bias=any(f"blk.0.ffn_{name}.bias" in stored for name in ("gate", "up", "down")),
    )
