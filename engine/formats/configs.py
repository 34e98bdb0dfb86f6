"""Settings of a LLaMA <-> ModelConfig: config.json (Hugging Face), params.json (Meta) and the metadata of GGUF."""

import torch

import kernels
from engine.model.config import ModelConfig, RopeScaling

REQUIRED = object()
MAX_PROBLEMS = 1000  # lines of one error


class Settings:
    """Typed look-ups in another program's settings; what is wrong with them is told in problems."""

    def __init__(self, raw: dict, where: str, problems: list[str]):
        self.raw, self.where, self.problems = raw, where, problems

    def problem(self, text):
        self.problems.append(f"{self.where}: {text}")

    def get(self, key, kind, default=REQUIRED):
        """A positive int, a positive float, a bool or a dict; None stands for one that is missing or wrong."""
        value = self.raw.get(key)
        if value is None:
            if default is REQUIRED:
                self.problem(f"{key} is missing")
                return None
            return default
        number = type(value) in (int, float) and 0 < value < 2**63  # nor NaN nor infinite
        if kind is float and number:
            return float(value)
        if kind is int and number and value == int(value):
            return int(value)
        if kind in (bool, dict) and type(value) is kind:
            return value
        wanted = {int: "a positive whole number", float: "a positive number", bool: "true or false", dict: "an object"}
        self.problem(f"{key} is {str(value)[:80]!r}, wanted {wanted[kind]}")
        return None

    def refuse(self, key, *harmless, why=""):
        """A problem unless the key is absent, None or one of the harmless values."""
        value = self.raw.get(key)
        if value is not None and value not in harmless:
            self.problem(f"{key} is {str(value)[:80]}, which is not supported{why}")

    def config(self, n_problems_before, **fields) -> ModelConfig | None:
        """The ModelConfig, or None when there are problems."""
        if len(self.problems) > n_problems_before:
            return None
        try:
            return ModelConfig(**fields)
        except ValueError as error:
            self.problem(str(error))
            return None


def join_problems(problems):
    if len(problems) == 1:
        return problems[0]
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return "\n  ".join([f"{len(problems)} problems", *problems[:MAX_PROBLEMS], *more])


def config_from_hf(raw: dict, problems: list[str]) -> ModelConfig | None:
    """config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters). None when it added problems."""
    before, settings = len(problems), Settings(raw, "config.json", problems)
    architectures = raw.get("architectures") or []
    kinds = [raw.get("model_type"), *(architectures if isinstance(architectures, list) else [architectures])]
    if kinds[0] != "llama" or [str(kind).lower() for kind in kinds[1:]] not in ([], ["llamaforcausallm"]):
        settings.problem(f"a {' '.join(map(str, kinds))}; only LLaMA is read (model_type llama, LlamaForCausalLM)")
        return None
    for key in ("attention_bias", "mlp_bias"):
        settings.refuse(key, False, why=": LLaMA has no biases")
    settings.refuse("hidden_act", "silu")
    settings.refuse("quantization_config", why="; save the model unquantised first")
    settings.refuse("sliding_window")
    settings.refuse("partial_rotary_factor", 1)
    n_heads = settings.get("num_attention_heads", int)
    theta, scaling = rope_from_hf(settings)
    return settings.config(
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


def rope_from_hf(settings):
    """(theta, RopeScaling or None)."""
    theta = settings.get("rope_theta", float, 10000.0)
    key = "rope_parameters" if settings.raw.get("rope_parameters") else "rope_scaling"
    rope = settings.get(key, dict, {})
    if not rope:
        return theta, None
    rope = Settings(rope, f"config.json, {key}", settings.problems)
    theta = rope.get("rope_theta", float, theta)
    rope.refuse("partial_rotary_factor", 1)
    kind = rope.raw.get("rope_type") or rope.raw.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        rope.problem(f"RoPE of type {str(kind)[:80]!r} is not supported; wanted default or llama3")
        return theta, None
    factor, low, high = (rope.get(key, float) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = rope.get("original_max_position_embeddings", int)
    if low and high and low >= high:
        rope.problem(f"low_freq_factor {low} must be under high_freq_factor {high}")
    return theta, RopeScaling(factor, low, high, original)


def config_to_hf(config: ModelConfig, dtype: torch.dtype, bos_id, eos_ids) -> dict:
    """config.json in the words of transformers 4, which transformers 5 and vLLM read too."""
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **token_ids(bos_id, eos_ids),
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
        "rope_scaling": scaling
        and {
            "factor": scaling.factor,
            "high_freq_factor": scaling.high_freq_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
            "rope_type": "llama3",
        },
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),  # transformers 5 writes "dtype" and reads both
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def token_ids(bos_id, eos_ids):
    """None is written too: left out, transformers takes 1 and 2."""
    return {"bos_token_id": bos_id, "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None}


def config_from_meta(raw: dict, shapes: dict[str, tuple[int, ...]], problems: list[str]) -> ModelConfig | None:
    """params.json, and the shapes of the merged tensors: they alone know hidden_dim, and vocab_size where it is -1."""
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
        vocab_size = embedding[0] if embedding else settings.problem("vocab_size is in no file")
    else:
        vocab_size = settings.get("vocab_size", int)
    norm_eps = settings.get("norm_eps", float, 1e-5)
    # Meta's files do not say what they were trained for: 3.1 and 3.2, 3, 2 (all eps 1e-5), 1 (7B to 33B: 1e-6).
    guess = 131072 if scaling else 8192 if theta and theta >= 500000 else 4096 if norm_eps == 1e-5 else 2048
    return settings.config(
        before,
        dim=dim,
        n_layers=settings.get("n_layers", int),
        n_heads=n_heads,
        n_kv_heads=settings.get("n_kv_heads", int, n_heads),
        hidden_dim=gate[0] if gate else 1,  # then its absence is told
        vocab_size=vocab_size,
        max_seq_len=guess,
        norm_eps=norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tied="output.weight" not in shapes,
    )


def config_to_meta(config: ModelConfig) -> dict:
    """params.json for Meta's code. Raises ValueError for what it cannot say.

    Only what differs from the defaults of LLaMA 1 is written: its ModelArgs refuses what it does not know.
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
    if problems:
        raise ValueError("; ".join(problems))
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
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


def meta_hidden_dim(dim, multiple_of, ffn_dim_multiplier=None):
    """As meta-llama/llama3 llama/model.py FeedForward computes it from params.json."""
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def meta_feed_forward(dim, hidden):
    """The params whose meta_hidden_dim is hidden, or None. Without a multiplier if possible: LLaMA 1 has none."""
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


def config_from_gguf(raw: dict, stored: dict, problems: list[str]) -> ModelConfig | None:
    """GGUF metadata. stored: the tensors, whose rope_freqs.weight is read, and taken out, for llama3 scaling."""
    before, settings = len(problems), Settings(raw, "metadata", problems)
    if raw.get("general.architecture") != "llama":
        settings.problem(f"general.architecture is {raw.get('general.architecture')!r}; only llama is read")
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
    return settings.config(
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


def scaling_from_factors(stored, head_dim, theta, settings):
    """The RopeScaling whose frequencies are the unscaled ones divided by these (Dh/2,) factors; None when all are 1."""
    if stored.shape != (head_dim / 2,) or isinstance(stored.dtype, str):
        return settings.problem(f"rope_freqs.weight is {stored.shape} {stored.dtype}, wanted fp32 {(head_dim / 2,)}")
    factors = torch.cat([part for _, _, part in stored.blocks()]).float()
    if torch.all(factors == 1):
        return None
    plain = kernels.rope_frequencies(head_dim, theta)
    # LLaMA 3.1 to 3.3 differ in the factor alone, which is what the slowest pairs are divided by.
    scaling = RopeScaling(factor=round(float(factors.max()), 3)) if torch.isfinite(factors).all() else RopeScaling()
    if scaling.factor > 0:
        wanted = plain / kernels.rope_frequencies(head_dim, theta, scaling)
        if torch.allclose(factors, wanted, rtol=1e-4):
            return scaling
    return settings.problem("rope_freqs.weight holds factors that are not those of LLaMA 3.1's RoPE scaling")
