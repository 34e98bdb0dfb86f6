"""LoRA: low-rank updates of a frozen model's linear maps, with PEFT's names and rules.

    y = x W^T + scale (drop(x) A^T) B^T        A (r, in), B (out, r);  scale = alpha / r, with rsLoRA alpha / sqrt(r)

A map of a layer is called by its path at Hugging Face, model.layers.N.self_attn.q_proj. Our wqkv and w13 merge the
weights of several maps, each of which has an update of its own: their A lie one below the other in one parameter, and
each B is a parameter, which adds to its own rows.
Source: arXiv:2106.09685, arXiv:2312.03732 (rsLoRA).
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.model.config import ModelConfig
from kernels import LowRank

# Our parameter of a layer: the maps whose rows it merges, in order, by their paths in a layer at Hugging Face.
MAPS = {
    "wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "wo": ("self_attn.o_proj",),
    "w13": ("mlp.gate_proj", "mlp.up_proj"),
    "w2": ("mlp.down_proj",),
}
ALL_LINEAR = tuple(path.split(".")[-1] for paths in MAPS.values() for path in paths)  # "q_proj", ...
SAVED = {"embed_tokens": "tok_embeddings", "lm_head": "output"}  # PEFT's modules_to_save: our parameters
MOST_ALPHA = 1e6  # an update that is scaled by more is a mistake, and leaves the numbers of its dtype
WHOLE = ("embed_tokens", "lm_head")  # that can be trained whole beside the updates


@dataclass(frozen=True)
class AdapterConfig:
    """Which maps have an update, and of what rank and scale. The fields are those of PEFT's LoraConfig.

    Raises ValueError naming every problem at once.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # share of a map's inputs that its update does not see
    targets: tuple[str, ...] | str = ALL_LINEAR  # names or ends of paths; a str is a regular expression of whole paths
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()  # (regular expression of a path's end, r); the first that fits
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers: tuple[int, ...] | None = None  # layers_to_transform; None is all
    saved: tuple[str, ...] = ()  # of WHOLE: trained whole
    nf4_base: bool = False  # QLoRA: the frozen maps are kept in 4 bits; no field of PEFT's

    def __post_init__(self) -> None:
        ranks, alphas = (self.r, *dict(self.rank_pattern).values()), (self.alpha, *dict(self.alpha_pattern).values())
        problems = [f"rank {r!r}, wanted a whole number from 1" for r in ranks if type(r) is not int or r < 1]
        wanted = f"wanted a number over 0, up to {MOST_ALPHA:g}"
        problems += [f"alpha {a!r}, {wanted}" for a in alphas if not 0 < a <= MOST_ALPHA]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout {self.dropout!r}, wanted at least 0 and under 1")
        if wrong := [name for name in self.saved if name not in WHOLE]:
            problems.append(f"{', '.join(wrong)} trained whole, wanted only {' or '.join(WHOLE)}")
        for pattern in (*dict(self.rank_pattern), *dict(self.alpha_pattern), *self._expressions()):
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{pattern!r} is no regular expression ({error})")
        if problems:
            raise ValueError("; ".join(problems))

    def _expressions(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else ()

    def adapts(self, layer: int, path: str) -> bool:
        """Return whether the map at a path in a layer has an update, by PEFT's rules."""
        whole = f"model.layers.{layer}.{path}"
        if self.layers is not None and layer not in self.layers:
            return False
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, whole) is not None
        return any(whole == target or whole.endswith(f".{target}") for target in self.targets)

    def rank_and_scale(self, layer: int, path: str) -> tuple[int, float]:
        """Return the rank and the scale of the update of a map."""
        whole = f"model.layers.{layer}.{path}"
        r = next((r for key, r in self.rank_pattern if _fits(key, whole)), self.r)
        alpha = next((alpha for key, alpha in self.alpha_pattern if _fits(key, whole)), self.alpha)
        return r, alpha / (math.sqrt(r) if self.rslora else r)

    def find_unused_patterns(self, config: ModelConfig) -> list[str]:
        """Return the patterns of ranks and alphas that fit no map with an update."""
        names = [update.name for update in list_updates(config, self)]
        patterns = (*dict(self.rank_pattern), *dict(self.alpha_pattern))
        return [key for key in patterns if not any(_fits(key, name) for name in names)]

    def describe_wide_ranks(self, config: ModelConfig) -> str | None:
        """Return which updates have a larger rank than their map can have, None where there are none.

        PEFT trains them too: the update is no richer, and has more parameters and more noise than one of that rank.
        """
        wide = [u for u in list_updates(config, self) if u.rank > min(u.rows, u.columns)]
        if not wide:
            return None
        most = {u.path.split(".")[-1]: (u.rank, min(u.rows, u.columns)) for u in wide}
        told = ", ".join(f"{name} ({rank}, of at most {limit})" for name, (rank, limit) in most.items())
        return f"ranks over what the maps can have only add parameters: {told}; --lora-rank-pattern lowers them"

    def check(self, config: ModelConfig) -> list[str]:
        """Return what is wrong with these updates of a model of this shape, one message each."""
        problems = []
        if not list_updates(config, self) and not self.saved:
            named = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
            problems.append(f"no map of the model is among the targets {named}; wanted {', '.join(ALL_LINEAR)}")
        elif not isinstance(self.targets, str):
            paths = [f"model.layers.{i}.{path}" for i in range(config.n_layers) for path in sum(MAPS.values(), ())]
            unknown = [t for t in self.targets if not any(p == t or p.endswith(f".{t}") for p in paths)]
            if unknown:
                problems.append(
                    f"targets {', '.join(unknown)} are no maps of the model; wanted {', '.join(ALL_LINEAR)}"
                )
        if config.tied and self.saved:
            problems.append(
                f"{', '.join(self.saved)} cannot be trained whole: the model's head is its embedding, and PEFT's files "
                "hold them as two"
            )
        return problems


def adapter_from_settings(settings: Mapping[str, Any]) -> AdapterConfig | None:
    """Return the updates that a run's settings ask for, None without. The keys are the flags of engine.finetune.

    Raises ValueError naming every problem.
    """
    if settings.get("adapter", "none") == "none":
        return None
    targets = tuple(settings["lora_targets"])
    return AdapterConfig(
        settings["lora_r"], settings["lora_alpha"], settings["lora_dropout"],
        ALL_LINEAR if targets == ("all-linear",) else targets, settings["rslora"],
        _read_pattern("--lora-rank-pattern", settings["lora_rank_pattern"], int),
        _read_pattern("--lora-alpha-pattern", settings["lora_alpha_pattern"], float),
        None, tuple(settings["lora_save"]), settings["adapter"] == "qlora",
    )  # fmt: skip


def settings_from_adapter(config: ModelConfig, adapter: AdapterConfig) -> dict[str, Any]:
    """Return the flags of engine.finetune that ask for these updates of a model of this shape."""
    targets = adapter.targets
    if isinstance(targets, str) or adapter.layers is not None:
        targets = tuple(u.name for u in list_updates(config, adapter))
    return {
        "lora_r": adapter.r, "lora_alpha": float(adapter.alpha), "lora_dropout": float(adapter.dropout),
        "lora_targets": ("all-linear",) if targets == ALL_LINEAR else targets, "rslora": adapter.rslora,
        "lora_rank_pattern": tuple(f"{key}={r}" for key, r in adapter.rank_pattern),
        "lora_alpha_pattern": tuple(f"{key}={alpha}" for key, alpha in adapter.alpha_pattern),
        "lora_save": adapter.saved,
    }  # fmt: skip


def _read_pattern(flag: str, words: Iterable[str], kind: type) -> tuple[tuple[str, Any], ...]:
    pairs = []
    for word in words:
        key, _, value = word.rpartition("=")
        try:
            pairs.append((key, kind(value)))
        except ValueError:
            key = ""
        if not key:
            raise ValueError(f"{flag} {word!r}, wanted NAME=NUMBER, as down_proj=8")
    return tuple(pairs)


def _fits(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


@dataclass(frozen=True)
class Update:
    """The update of one map: where its factors lie in our parameters."""

    layer: int
    path: str  # in the layer, at Hugging Face
    parameter: str  # "wqkv" ...
    first_row: int  # of the map, in the parameter
    rows: int  # out
    columns: int  # in
    rank: int
    first_rank: int  # of the map, in the parameter's A
    scale: float

    @property
    def name(self) -> str:
        """Return the map's path at Hugging Face."""
        return f"model.layers.{self.layer}.{self.path}"

    @property
    def a(self) -> str:
        """Return the name of our parameter, rows first_rank to first_rank + rank of which are A."""
        return f"layers.{self.layer}.lora.{self.parameter}.a"

    @property
    def b(self) -> str:
        """Return the name of our parameter B."""
        return f"layers.{self.layer}.lora.{self.parameter}.{self.path.split('.')[-1]}"


def map_shapes(config: ModelConfig, parameter: str) -> tuple[tuple[int, ...], int]:
    """Return the rows of each map that a parameter of a layer merges, and its columns."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rows = {"wqkv": (q, kv, kv), "wo": (config.dim,), "w13": (config.hidden_dim,) * 2, "w2": (config.dim,)}
    columns = {"wqkv": config.dim, "wo": q, "w13": config.dim, "w2": config.hidden_dim}
    return rows[parameter], columns[parameter]


@functools.cache
def list_updates(config: ModelConfig, adapter: AdapterConfig) -> tuple[Update, ...]:
    """Return the updates of a model of this shape, in the order of layers and maps."""
    updates = []
    for layer in range(config.n_layers):
        for parameter, paths in MAPS.items():
            rows, columns = map_shapes(config, parameter)
            first_row = first_rank = 0
            for path, n in zip(paths, rows, strict=True):
                if adapter.adapts(layer, path):
                    rank, scale = adapter.rank_and_scale(layer, path)
                    updates.append(Update(layer, path, parameter, first_row, n, columns, rank, first_rank, scale))
                    first_rank += rank
                first_row += n
    return tuple(updates)


class Lora(nn.Module):
    """The updates of one parameter of a layer: A of all of them in `a` (R, D), and B of each by the map's last name."""

    def __init__(self, updates: list[Update], dropout: float):
        super().__init__()
        self.first_rows, self.scales = tuple(u.first_row for u in updates), tuple(u.scale for u in updates)
        self.names, self.dropout = [u.b.split(".")[-1] for u in updates], dropout
        self.a = nn.Parameter(torch.empty(sum(u.rank for u in updates), updates[0].columns))
        for name, u in zip(self.names, updates, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(u.rows, u.rank)))

    def forward(self, seed: int | None = None) -> LowRank:
        """Return the updates as the kernels take them. seed: of dropout; None drops nothing."""
        b = tuple(getattr(self, name) for name in self.names)
        return LowRank(self.a, b, self.first_rows, self.scales, self.dropout, seed if self.dropout else None)


def make_loras(config: ModelConfig, adapter: AdapterConfig, layer: int) -> dict[str, Lora]:
    """Return {parameter of the layer: its updates}."""
    of_layer: dict[str, list[Update]] = {}
    for update in list_updates(config, adapter):
        if update.layer == layer:
            of_layer.setdefault(update.parameter, []).append(update)
    return {parameter: Lora(updates, adapter.dropout) for parameter, updates in of_layer.items()}


def is_of_adapter(parameter: str) -> bool:
    """Return whether a parameter is a factor of an update."""
    return ".lora." in parameter


def trained_whole(adapter: AdapterConfig) -> Iterator[str]:
    """Yield our names of the parameters that are trained whole."""
    yield from (SAVED[name] for name in adapter.saved)
