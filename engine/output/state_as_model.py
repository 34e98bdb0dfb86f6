"""A training state opened as a model: its weights, and where its run's tokenizer and settings are found."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.base.device import DTYPES
from engine.base.errors import CriaError, DataError
from engine.base.files import read_json
from engine.base.watching import Watch, watch_silently
from engine.formats.adapters import hash_base, merge_factors, new_factors
from engine.formats.find import detect_kind
from engine.formats.settings import REQUIRED, Settings, join_problems
from engine.formats.source import Source, open_source
from engine.model.adapter import AdapterConfig, adapter_from_settings
from engine.model.config import ROPE_KINDS, ModelConfig, RopeScaling
from engine.model.llama import Transformer, new_model
from engine.model.shard import Shard, as_shards
from engine.output import checkpoint
from engine.output.folder import read_run
from engine.output.tensor_rows import check_fit

# Fields that the first version's states lack.
ADDED = {"attention_factor", "beta_fast", "beta_slow", "truncate", "attention_bias", "mlp_bias"}
PARAMETERS = "param."  # begins the names of a state's tensors that are the model's, not the optimizer's


@dataclass(frozen=True)
class TrainingState:
    """A verified training state, opened as engine.formats.source.Source is: nothing big is allocated yet."""

    checkpoint: checkpoint.Checkpoint
    config: ModelConfig
    dtype: torch.dtype  # of the run's weights
    base: Path | None  # the model from which the run takes tokenizer and generation_config.json; None: random weights
    tokenizer: str | None  # the run's --tokenizer, "" where it named none; None: no run.json says
    generation_config: dict[str, Any]  # of base
    prompt_style: str | None  # of the run
    adapter: AdapterConfig | None = None  # that the run trains, beside the frozen weights of source
    source: Source | None = None  # base, opened, where there is an adapter

    @property
    def path(self) -> Path:
        return self.checkpoint.folder

    def read_into(self, model: Transformer, *, watch: Watch = watch_silently) -> None:
        """Fill every parameter of a model of this config, converted to its dtype. No optimizer state is read.

        The updates of an adapter are added to the weights of the run's base.
        """
        if self.adapter is None or self.source is None:
            checkpoint.load(self.checkpoint, parameters_of(model), PARAMETERS, watch)
            return
        self.source.read_into(model, watch=watch)
        merge_factors(model, self.adapter, self.read_factors(), watch)

    def read_factors(self) -> dict[str, torch.Tensor]:
        """Return {parameter: its values} of what an adapter's run trains, in the dtype of the run."""
        assert self.adapter is not None, "a state of whole weights"
        factors = new_factors(self.config, self.adapter, self.dtype)
        checkpoint.load(self.checkpoint, {PARAMETERS + name: t for name, t in factors.items()}, PARAMETERS)
        return factors


def parameters_of(model: Transformer) -> dict[str, torch.Tensor | Shard]:
    """Return the parameters of a model that a training state holds, under their names there."""
    return {PARAMETERS + name: p.detach() for name, p in model.trained_parameters().items()}


def open_training_state(folder: Path) -> TrainingState:
    """Verify a training state and return it as the model that its run would write now.

    Raise DataError for a state that is broken or not ours.
    """
    found = checkpoint.open_checkpoint(folder)
    manifest = found.manifest
    problems: list[str] = []
    facts = Settings(manifest, checkpoint.MANIFEST, problems)
    config = config_from_state(facts.get("model", dict) or {}, problems)
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    dtype = dtypes.get(named := str(manifest.get("dtype")))
    if dtype is None:
        facts.add_problem(f"dtype is {named[:80]!r}, wanted one of {', '.join(dtypes)}")
    settings = facts.get("settings", dict) or {}
    if type(settings.get("model")) is not str:
        facts.add_problem("settings do not name the model that the run began with")
    adapter = adapter_from_state(settings, facts)
    n_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
    # Before a model of that size is made.
    if config and dtype and adapter is None and config.n_parameters * dtype.itemsize > n_bytes:
        facts.add_problem(f"{config.n_parameters} parameters by its model, but there are only {n_bytes} bytes")
    if problems or config is None or dtype is None:
        raise DataError(f"{folder}: {join_problems(problems)}")
    wanted = parameters_of(new_model(config, "meta", dtype, adapter=adapter))
    check_fit(folder, checkpoint.read_row_map(found), as_shards(wanted), PARAMETERS)
    base, tokenizer = find_base(folder, settings)
    generation_config = {}
    if base is not None and detect_kind(base) == "hf":
        generation_config = read_json(base / "generation_config.json")
    source = None if adapter is None else open_base(found, base, config)
    style = settings.get("prompt_style")
    return TrainingState(found, config, dtype, base, tokenizer, generation_config, style, adapter, source)


def open_base(found: checkpoint.Checkpoint, base: Path | None, config: ModelConfig) -> Source:
    """Open the base of an adapter's state. Raise DataError where it is gone, or is not what it was."""
    state = f"{found.folder}: an adapter's state, whose base"
    if base is None:
        raise DataError(f"{state} is not named")
    try:
        source = open_source(base)
    except CriaError as error:
        raise DataError(f"{state} cannot be read ({error})") from None
    if source.config != config or found.manifest.get("base_sha256") != hash_base(source):
        raise DataError(f"{state} {base} has another shape or other weights than it had; put the old one back")
    return source


def adapter_from_state(settings: dict[str, Any], facts: Settings) -> AdapterConfig | None:
    """Return the adapter that a run's recorded settings ask for, None without one or after adding a fault to facts."""
    try:
        return adapter_from_settings(settings)
    except (ValueError, TypeError, KeyError) as error:
        facts.add_problem(f"its adapter is not known ({type(error).__name__}: {error})")
        return None


def find_base(folder: Path, settings: dict[str, Any]) -> tuple[Path | None, str | None]:
    """Return (base, tokenizer) of the run that wrote a state; TrainingState explains both."""
    out = folder.resolve().parent
    run = read_run(out, "copy it again, or remove it and name the model and --tokenizer")
    if run.get("status") == "done" and detect_kind(out) == "hf":  # the finished model has both
        return out, ""
    base = None if settings.get("random_init") else Path(settings["model"])
    return base, run.get("config", {}).get("tokenizer")


def config_from_state(raw: dict[str, Any], problems: list[str]) -> ModelConfig | None:
    """Return the ModelConfig whose asdict() a manifest holds; None when faults were added to problems."""
    before, model = len(problems), Settings(raw, f"{checkpoint.MANIFEST}, model", problems)
    scaling = model.get("rope_scaling", dict, None)
    if scaling is not None:
        scaling = Settings(scaling, f"{checkpoint.MANIFEST}, rope_scaling", problems)
        kind = scaling.raw.get("kind", "llama3")
        if kind not in ROPE_KINDS:
            scaling.add_problem(f"kind is {str(kind)[:80]!r}, wanted one of {', '.join(ROPE_KINDS)}")
        scaling = RopeScaling(kind=kind, **read_fields(RopeScaling, scaling))
    return model.make_config(before, **read_fields(ModelConfig, model), rope_scaling=scaling)


def read_fields(kind: type[ModelConfig] | type[RopeScaling], settings: Settings) -> dict[str, Any]:
    """Return {field: value} for the numbers and bools of a dataclass. Those in ADDED may be missing."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in settings.raw.keys() - fields.keys():
        settings.add_problem(f"{name[:80]} is not known to this version")
    return {
        name: settings.get(name, field.type, field.default if name in ADDED else REQUIRED)  # type: ignore[arg-type]
        for name, field in fields.items()
        if field.type in (int, float, bool)
    }
