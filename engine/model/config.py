"""The shape of a LLaMA, and the shapes that have a name."""

from dataclasses import dataclass

ROPE_KINDS = ("linear", "dynamic", "yarn", "llama3")  # by their names at Hugging Face


@dataclass(frozen=True)
class RopeScaling:
    """RoPE for texts that are longer than those of pretraining; engine.model.rope has the formulas."""

    factor: float = 8.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_seq_len: int = 8192  # tokens; llama3, yarn
    kind: str = "llama3"  # one of ROPE_KINDS
    attention_factor: float = 1.0  # yarn: what cosines and sines are multiplied by
    beta_fast: float = 32.0  # yarn: pairs of more turns in the original length are kept
    beta_slow: float = 1.0  # yarn: pairs of fewer turns are slowed by the factor
    truncate: bool = True  # yarn: the range between the two begins and ends at a whole pair


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a LLaMA. Raises ValueError naming every problem at once."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32  # < n_heads is grouped-query attention
    hidden_dim: int = 11008  # of the feed-forward
    vocab_size: int = 32000
    max_seq_len: int = 2048  # tokens
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    head_dim: int = None  # type: ignore[assignment]  # None is dim / n_heads, which __post_init__ fills in
    tied: bool = False  # the head is the embedding
    attention_bias: bool = False  # added to q, k, v and after wo
    mlp_bias: bool = False  # added to gate and up, and after w2

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}, wanted a positive number"
            for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "max_seq_len")
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1
        ]
        if not problems and self.head_dim is None:
            if self.dim % self.n_heads:
                problems.append(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}, or head_dim be given")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if not problems and self.n_heads % self.n_kv_heads:
            problems.append(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if not problems and (self.head_dim < 2 or self.head_dim % 2):
            problems.append(f"head_dim is {self.head_dim}, wanted an even number: RoPE turns pairs")
        kind = self.rope_scaling.kind if self.rope_scaling else None
        if not problems and kind == "dynamic" and self.head_dim < 4:
            problems.append(f"head_dim is {self.head_dim}, wanted 4 or more with dynamic RoPE")
        if kind == "yarn" and self.rope_theta <= 1:
            problems.append(f"rope_theta is {self.rope_theta}, wanted more than 1 with yarn")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def n_parameters(self) -> int:
        """Return the number of parameters, a tied head counted once."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        layer += self.attention_bias * ((self.n_heads + 2 * self.n_kv_heads) * self.head_dim + self.dim)
        layer += self.mlp_bias * (2 * self.hidden_dim + self.dim)
        return self.vocab_size * self.dim * (1 if self.tied else 2) + self.n_layers * layer + self.dim

    @property
    def max_positions(self) -> int:
        """Return the longest text, in tokens, that the model is made for. A scaled RoPE goes beyond max_seq_len."""
        scaling = self.rope_scaling
        if scaling is None:
            return self.max_seq_len
        original = scaling.original_max_seq_len if scaling.kind in ("llama3", "yarn") else self.max_seq_len
        return max(self.max_seq_len, int(scaling.factor * original))

    def turns_by_text_length(self, max_length: int) -> bool:
        """Return whether RoPE turns a token of a text of up to max_length tokens by the length of that text too.

        Texts then cannot share the keys of a common prefix.
        """
        return self.rope_scaling is not None and self.rope_scaling.kind == "dynamic" and max_length > self.max_seq_len


MODELS = {  # exact names, no fuzzy match
    "tiny": ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=192, vocab_size=49152, max_seq_len=512, tied=True
    ),
    "smollm2-135m": ModelConfig(
        dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49152, max_seq_len=8192,
        norm_eps=1e-5, rope_theta=100000.0, tied=True,
    ),
    "tinyllama-1.1b": ModelConfig(
        dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632, max_seq_len=2048, norm_eps=1e-5
    ),
    "llama-7b": ModelConfig(),
    "llama-13b": ModelConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13824),
    "llama2-7b": ModelConfig(max_seq_len=4096, norm_eps=1e-5),
    "llama3-8b": ModelConfig(
        n_kv_heads=8, hidden_dim=14336, vocab_size=128256, max_seq_len=8192, norm_eps=1e-5, rope_theta=500000.0
    ),
}  # fmt: skip
EMBEDDED_MODEL = "smollm2-135m"  # the one named model whose weights come with a package
