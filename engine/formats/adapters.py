"""Adapters in the folders of PEFT: adapter_config.json and adapter_model.safetensors, read, written and merged.

A folder names its base, and holds for each adapted map, under its path at Hugging Face,

    base_model.model.PATH.lora_A.weight (r, in)        base_model.model.PATH.lora_B.weight (out, r)

and the parameters that were trained whole. Facts read in peft 0.21, vllm 0.33, llama.cpp (October 2026). What is
written loads in all of them: rsLoRA as the plain alpha of the same scale, since llama.cpp ignores use_rslora.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.base.errors import DataError, reading
from engine.base.watching import Watch, watch_silently
from engine.formats.find import is_training_state
from engine.formats.folders import make_json_writer, read_json_member, replace_files
from engine.formats.names import Piece, list_pieces
from engine.formats.pieces import read_pieces
from engine.formats.settings import join_problems
from engine.formats.source import Source, open_each
from engine.formats.tensor_files import (
    Stored,
    TensorToWrite,
    open_pth,
    open_safetensors,
    read_metadata,
    write_safetensors,
)
from engine.model.adapter import ALL_LINEAR, MAPS, SAVED, AdapterConfig, Update, is_of_adapter, list_updates
from engine.model.config import ModelConfig
from engine.model.llama import Transformer, new_model
from engine.model.shard import Shard

BASE = "base_model_name_or_path"
CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
BASE_HASH = "cria.base_sha256"  # in the metadata of WEIGHTS: hash_base() of the base that it was trained on
MOST_TOLD = 3  # tensors of a kind of fault: those of another base are all wrong
HASHED_ROWS = 4  # of each matrix that hash_base() reads
# Keys of PEFT's LoraConfig that change nothing of what a saved adapter computes.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type", "peft_version",
    "megatron_config", "megatron_core", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "runtime_config", "layers_pattern", "ensure_weight_tying", "arrow_config", "qalora_group_size", "peft_type",
}  # fmt: skip
# Ways to begin that change the base too: what such a run saves belongs to another base than the one it names.
OTHER_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A checked adapter, whose tensors can be read. Nothing big is allocated yet."""

    path: Path
    config: AdapterConfig
    base: str  # as the folder names it; "" where it does not
    dtype: torch.dtype
    stored: dict[str, Stored] = field(repr=False)
    base_sha256: str = ""  # hash_base() of the base that it was trained on; "" where the folder does not tell

    @torch.no_grad()
    def read_into(self, model: Transformer, shards: Mapping[str, Shard] | None = None) -> None:
        """Fill the adapter's parameters of a model that has these updates. shards: as in Source.read_into()."""
        pieces = list_factors(model.config, self.config)
        read_pieces(self.path, self.stored, pieces, dict(model.named_parameters()), shards)

    def read_factors(self, config: ModelConfig) -> dict[str, torch.Tensor]:
        """Return {our parameter: its values}, in fp32 or wider, of a model of this shape."""
        factors = new_factors(config, self.config, torch.promote_types(self.dtype, torch.float32))
        read_pieces(self.path, self.stored, list_factors(config, self.config), factors, None)
        return factors


@dataclass(frozen=True)
class MergedSource:
    """A base and an adapter, read as the one model that they are together; opened as a Source is."""

    base: Source
    adapter: Adapter

    @property
    def path(self) -> Path:
        return self.adapter.path

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.base.generation_config

    def read_into(self, model: Transformer, *, watch: Watch = watch_silently) -> None:
        """Fill a model of this config without an adapter: each weight with its update added, rounded once."""
        self.base.read_into(model, watch=watch)
        merge_factors(model, self.adapter.config, self.adapter.read_factors(self.config), watch)


# ---- the base -------------------------------------------------------------------------------------------------------


def hash_base(source: Source) -> str:
    """Return a hash of a model's weights: of 4 rows of every map of its first, middle and last layer, in fp32.

    A fine-tune of the model has another one, a copy in another layout the same one. Some milliseconds; a GGUF's 21
    matrices are dequantised whole.
    """
    c, digest = source.config, hashlib.sha256()
    layers = {f"layers.{i}" for i in (0, c.n_layers // 2, c.n_layers - 1)}
    for name, piece in list_pieces(c, source.kind).items():
        layer, _, parameter = piece.parameter.rpartition(".")
        if layer in layers and parameter in MAPS:
            step = 2 if piece.paired_heads else 1  # rows of a head that stand in pairs: every other one is in our order
            n = min(HASHED_ROWS, piece.shape[0], c.head_dim // 2)
            rows = torch.zeros(n * step, piece.shape[1])
            for row, column, part in source.stored[name].blocks():
                if row < len(rows):
                    part = part[: len(rows) - row]
                    rows[row : row + len(part), column : column + part.shape[1]] = part
            digest.update(rows[::step].numpy().tobytes())
    return digest.hexdigest()


def describe_other_base(adapter: Adapter, source: Source) -> str | None:
    """Return a warning where an adapter was trained on other weights than a base of its shape has; None otherwise."""
    if not adapter.base_sha256 or adapter.base_sha256 == hash_base(source):
        return None
    return (
        f"{adapter.path}: trained beside other weights than those of {source.path}; answers are right only if this is "
        f"{adapter.base or 'its base'}, unchanged, in another type of numbers"
    )


# ---- names ----------------------------------------------------------------------------------------------------------


def list_factors(config: ModelConfig, adapter: AdapterConfig) -> dict[str, Piece]:
    """Return {tensor name in PEFT's file: the rows of our parameters that it fills}."""
    pieces = {}
    for u in list_updates(config, adapter):
        pieces[f"{PREFIX}{u.name}.lora_A.weight"] = Piece(u.a, u.first_rank, (u.rank, u.columns), 0)
        pieces[f"{PREFIX}{u.name}.lora_B.weight"] = Piece(u.b, 0, (u.rows, u.rank), 0)
    whole = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    for name in adapter.saved:
        pieces[f"{PREFIX}{whole[name]}.weight"] = Piece(SAVED[name], 0, (config.vocab_size, config.dim), 0)
    return pieces


def new_factors(config: ModelConfig, adapter: AdapterConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return uninitialised tensors {our parameter: tensor} for all that an adapter trains, on the CPU."""
    model = new_model(config, "meta", dtype, adapter=adapter)
    return {name: torch.empty(p.shape, dtype=dtype) for name, p in model.trained_parameters().items()}


# ---- merging --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_factors(
    model: Transformer, adapter: AdapterConfig, factors: Mapping[str, torch.Tensor], watch: Watch = watch_silently
) -> None:
    """Add the updates to the weights of a model without an adapter: W + scale B A in fp32 or wider, rounded once.

    factors: {our parameter: its values}; parameters that were trained whole replace those of the model.
    """
    parameters = dict(model.named_parameters())
    updates = list_updates(model.config, adapter)
    with watch("merging", sum(u.rows * u.columns for u in updates)) as advance:
        for u in updates:
            rows = parameters[f"layers.{u.layer}.{u.parameter}"][u.first_row : u.first_row + u.rows]
            dtype = torch.promote_types(rows.dtype, torch.float32)
            a, b = (factors[name].to(rows.device, dtype) for name in (u.a, u.b))
            rows.copy_(rows.to(dtype).addmm_(b, a[u.first_rank : u.first_rank + u.rank], alpha=u.scale))
            advance(rows.numel())
    for name, values in factors.items():
        if not is_of_adapter(name):
            parameters[name].copy_(values)


# ---- reading --------------------------------------------------------------------------------------------------------


def open_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Open PEFT's folder of an adapter of a model of this shape. Raise DataError that lists every problem at once."""
    folder = Path(folder)
    problems: list[str] = []
    try:
        with reading("the adapter"):
            if not folder.is_dir():
                raise DataError(f"no such folder; wanted one with {CONFIG}, as --adapter lora and PEFT write it")
            if not (folder / CONFIG).exists() and is_training_state(folder):
                raise DataError("a training state, which knows its base; give it as --model, without --adapter-dir")
            raw = read_json_member(folder, CONFIG, problems)
            adapter = config_from_peft(raw, problems) if raw is not None else None
            stored = open_weights(folder, problems)
            if adapter is not None:
                problems += [f"{CONFIG}: {problem}" for problem in adapter.check(config)]
                check_factors(config, adapter, stored, problems)
            if problems or adapter is None or raw is None:
                of = f"an adapter of {base}: " if raw and isinstance(base := raw.get(BASE), str) and base else ""
                raise DataError(of + join_problems(problems))
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error
    dtypes = {tensor.dtype for tensor in stored.values()}
    dtype = max((d for d in dtypes if isinstance(d, torch.dtype)), key=lambda d: d.itemsize)
    told = read_metadata(folder / WEIGHTS) if (folder / WEIGHTS).exists() else {}
    named = str(raw.get(BASE) or "")
    return Adapter(folder, adapter, named, dtype, stored, told.get(BASE_HASH, ""))


def read_base_name(folder: Path) -> str:
    """Return the base that an adapter's folder names. Raise DataError where it names none."""
    problems: list[str] = []
    raw = read_json_member(folder, CONFIG, problems)
    base = raw.get(BASE) if raw is not None else None
    if not problems and not (isinstance(base, str) and base):
        problems.append(f"{CONFIG}: {BASE} is {base!r}; name the base by --model, and this folder by "
                        "--adapter-dir")  # fmt: skip
    if problems:
        raise DataError(f"{folder}: {join_problems(problems)}")
    return str(base)


def open_weights(folder: Path, problems: list[str]) -> dict[str, Stored]:
    """Return the tensors of an adapter's folder, adding what is wrong to problems."""
    opener: Callable[[Path], dict[str, Stored]] = open_safetensors
    name = WEIGHTS
    if not (folder / WEIGHTS).exists() and (folder / OLD_WEIGHTS).exists():
        name, opener = OLD_WEIGHTS, open_pth
    return open_each(folder, [name], opener, problems).get(name, {})


def check_factors(config: ModelConfig, adapter: AdapterConfig, stored: dict[str, Stored], problems: list[str]) -> None:
    """Add a problem for every tensor that is missing, not wanted, or of another shape or type than the config says."""
    wanted = list_factors(config, adapter)
    if stored or not problems:  # else the file did not open, which is told already
        missing = [name for name in wanted if name not in stored]
        problems += [f"{name} is missing" for name in missing[:MOST_TOLD]]
        if len(missing) > MOST_TOLD:
            problems.append(f"and {len(missing) - MOST_TOLD} more are missing")
    wrong = []
    for name, tensor in stored.items():
        if name not in wanted:
            wrong.append(f"{tensor.file}: {name} {tensor.shape} is not wanted by {CONFIG} and the base")
        elif tensor.shape != wanted[name].shape:
            wrong.append(
                f"{tensor.file}: {name} is {tensor.shape}, wanted {wanted[name].shape}; is it of another base or rank?"
            )
        elif not isinstance(tensor.dtype, torch.dtype) or not tensor.dtype.is_floating_point:
            wrong.append(f"{tensor.file}: {name} is of type {tensor.dtype}, wanted fp32, fp16 or bf16")
    problems += wrong[:MOST_TOLD]
    if len(wrong) > MOST_TOLD:
        problems.append(f"and {len(wrong) - MOST_TOLD} more tensors that do not fit")


def config_from_peft(raw: dict[str, Any], problems: list[str]) -> AdapterConfig | None:
    """Return the AdapterConfig of an adapter_config.json, or None after adding every fault to problems."""
    before, known = len(problems), set(HARMLESS)

    def take(key: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        known.add(key)
        value = raw.get(key)
        if value is None or type(value) not in kinds:
            if value is not None or (key in raw and key in ("r", "lora_alpha")):
                problems.append(f"{CONFIG}: {key} is {str(value)[:80]!r}, wanted {wanted}")
            return default
        return value

    def refuse(key: str, *harmless: Any, why: str) -> None:
        known.add(key)
        if raw.get(key) not in (None, False, [], {}, *harmless):
            problems.append(f"{CONFIG}: {key} is {str(raw[key])[:80]}, which is not read: {why}")

    if raw.get("peft_type") != "LORA":
        problems.append(f"{CONFIG}: peft_type is {str(raw.get('peft_type'))[:80]!r}, wanted 'LORA'")
    refuse("use_dora", why="DoRA also scales the weights")
    refuse("bias", "none", why="the base's biases were trained too")
    refuse("lora_bias", why="the updates have biases")
    refuse("fan_in_fan_out", why="no LLaMA stores its weights so")
    for key in ("layer_replication", "trainable_token_indices", "target_parameters", "exclude_modules"):
        refuse(key, why="only updates of whole maps are known here")
    known.add("init_lora_weights")
    began = raw.get("init_lora_weights")
    if isinstance(began, str) and began.lower().startswith(OTHER_BASES):
        problems.append(
            f"{CONFIG}: init_lora_weights is {began[:80]!r}: its base was changed; convert it by PEFT first"
        )
    numbers = (int, float)
    targets = take("target_modules", (), (list, str), "names of maps")
    layers = take("layers_to_transform", None, (list, int), "places of layers")
    fields = {
        "r": take("r", 8, (int,), "a whole number"),
        "alpha": take("lora_alpha", 8, numbers, "a number"),
        "dropout": take("lora_dropout", 0.0, numbers, "a number"),
        "targets": ALL_LINEAR if targets == "all-linear" else targets if isinstance(targets, str) else tuple(targets),
        "rslora": take("use_rslora", False, (bool,), "true or false"),
        "rank_pattern": tuple(take("rank_pattern", {}, (dict,), "an object").items()),
        "alpha_pattern": tuple(take("alpha_pattern", {}, (dict,), "an object").items()),
        "layers": (layers,) if isinstance(layers, int) else None if layers is None else tuple(layers),
        "saved": tuple(take("modules_to_save", (), (list,), "names of modules")),
    }
    for key in sorted(raw.keys() - known):  # of a newer PEFT
        refuse(key, why="this key is not known here")
    if len(problems) > before:
        return None
    try:
        return AdapterConfig(**fields)
    except (ValueError, TypeError) as error:
        problems.append(f"{CONFIG}: {error}")
        return None


# ---- writing --------------------------------------------------------------------------------------------------------


def config_to_peft(config: ModelConfig, adapter: AdapterConfig, base: str) -> dict[str, Any]:
    """Return adapter_config.json. The alpha of each update is the one whose plain scale alpha / r is the update's."""

    def alpha_of(update: Update) -> float:
        alpha = update.scale * update.rank
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

    updates = list_updates(config, adapter)
    same_rank = [u for u in updates if u.rank == adapter.r] or list(updates)
    alpha = alpha_of(same_rank[0]) if updates else adapter.alpha
    return {
        "alpha_pattern": {u.name: alpha_of(u) for u in updates if alpha_of(u) != alpha},
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layers_pattern": None,
        "layers_to_transform": None if adapter.layers is None else list(adapter.layers),
        "lora_alpha": alpha, "lora_dropout": adapter.dropout, "modules_to_save": list(adapter.saved) or None,
        "peft_type": "LORA", "r": adapter.r, "rank_pattern": {u.name: u.rank for u in updates if u.rank != adapter.r},
        "revision": None,
        "target_modules": adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    }  # fmt: skip


def save_adapter(folder: Path, model: Transformer, base: str, base_sha256: str = "") -> None:
    """Write a model's adapter as PEFT does. base: the name of its base, a folder or a name at Hugging Face's hub.

    base_sha256: hash_base() of the base. Raise OSError, or NotFiniteError; the folder then holds what it held before.
    """
    assert model.adapter is not None, "a model without an adapter"
    trained = {name: p.detach() for name, p in model.trained_parameters().items()}
    tensors: list[TensorToWrite] = [
        (name, piece.shape, trained[piece.parameter].dtype, partial(piece.rows_of, trained))
        for name, piece in sorted(list_factors(model.config, model.adapter).items())
    ]
    metadata = {"format": "pt"} | ({BASE_HASH: base_sha256} if base_sha256 else {})
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS: lambda path: write_safetensors(path, tensors, metadata),
        CONFIG: make_json_writer(config_to_peft(model.config, model.adapter, base)),
    }
    replace_files(Path(folder), writers, r"adapter_model\.(safetensors|bin)")
