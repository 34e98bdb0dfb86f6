"""A model of any layout, named by --model and --adapter-dir, ready to be read or to generate text."""

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.base.errors import CriaError, DataError, UsageError, print_error
from engine.formats.adapters import Adapter, MergedSource, describe_other_base, open_adapter, read_base_name
from engine.formats.find import detect_kind, find_model
from engine.formats.source import Source, open_source
from engine.model.llama import Transformer, new_model
from engine.output.folder import RUN, read_prompt_style
from engine.output.state_as_model import TrainingState, open_training_state
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import find_tokenizer

Weights = Source | MergedSource | TrainingState  # whose read_into() fills a model


def open_weights(name: str, adapter_dir: str = "") -> Weights:
    """Open a model by its name, folder, file, training state (checkpoint-N) or adapter, with an adapter added to it.

    A folder of an adapter stands for its base with the adapter. Raise DataError or UsageError where it is not found.
    """
    path = find_model(name)
    kind = detect_kind(path)
    if kind == "adapter" and not adapter_dir:
        try:
            base = open_source(find_model(read_base_name(path)))
        except CriaError as error:
            raise DataError(
                f"{path}: the adapter's base cannot be read ({error}); name it by --model, and this folder by "
                "--adapter-dir"
            ) from None
        return MergedSource(base, open_adapter_of(base, str(path)))
    if kind == "state" and not adapter_dir:
        return open_training_state(path)
    source = open_source(path)
    return MergedSource(source, open_adapter_of(source, adapter_dir)) if adapter_dir else source


def open_adapter_of(source: Source, folder: str) -> Adapter:
    """Open an adapter of a base. Warn where it was trained on other weights; raise DataError where it does not fit."""
    adapter = open_adapter(Path(folder), source.config)
    if warning := describe_other_base(adapter, source):
        print_error(f"warning: {warning}")
    return adapter


def find_tokenizer_of(weights: Weights, name: str = "") -> tuple[Tokenizer, str | None]:
    """Return the tokenizer of an opened model, and the prompt style that a run of ours trained it with, or None.

    name: of another tokenizer. An adapter's folder has its own, which knows the style; one of PEFT may have none.
    """
    if isinstance(weights, TrainingState):
        return find_tokenizer_of_state(weights, name), weights.prompt_style
    if isinstance(weights, MergedSource):
        try:
            return find_tokenizer(weights.config, name, weights.path), read_prompt_style(weights.path)
        except CriaError:
            if (weights.path / "tokenizer_config.json").exists() or name:
                raise
        return find_tokenizer(weights.config, name, weights.base.path), read_prompt_style(weights.base.path)
    return find_tokenizer(weights.config, name, weights.path), read_prompt_style(weights.path)


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, impl: str = "auto", adapter_dir: str = ""
) -> tuple[Transformer, Tokenizer, str | None]:
    """Return (model, tokenizer, prompt style) of a model by its name, folder, file or training state (checkpoint-N).

    The model is on the device, with the adapter of --adapter-dir merged into its weights. The style is the one that a
    run of ours trained it with, None where none did. Raise DataError or UsageError when it cannot be found or read.
    """
    weights = open_weights(name, adapter_dir)
    tokenizer, style = find_tokenizer_of(weights)
    model = new_model(weights.config, device, dtype, impl)
    weights.read_into(model)
    return model, tokenizer, style


def load_adapted(
    name: str, adapter_dirs: Sequence[str], device: torch.device, dtype: torch.dtype, impl: str = "auto"
) -> list[tuple[Transformer, Tokenizer, str | None]]:
    """Return load_model()'s of a model, and of the model with each of several adapters beside its weights.

    The weights are in memory once: the adapters are not merged, so that each of their models costs its updates alone.
    """
    weights = open_weights(name)
    if not isinstance(weights, Source):
        raise UsageError(f"--model {name}: several adapters want one base, and this is a state or an adapter itself")
    adapters = [open_adapter_of(weights, folder) for folder in adapter_dirs]
    loaded = [load_model(name, device, dtype, impl)]
    base = dict(loaded[0][0].named_parameters())
    for adapter in adapters:
        model = new_model(weights.config, "meta", dtype, impl, adapter=adapter.config)
        parameters = {
            name: torch.nn.Parameter(torch.empty_like(p, device=device)) if p.requires_grad else base[name]
            for name, p in model.named_parameters()
        }
        model.load_state_dict(parameters, assign=True)
        adapter.read_into(model)
        loaded.append((model, *find_tokenizer_of(MergedSource(weights, adapter))))
    return loaded


def find_tokenizer_of_state(state: TrainingState, name: str) -> Tokenizer:
    """Return the tokenizer called `name`, or, if that is "", the one of the run that wrote the state.

    Raises UsageError where the run's tokenizer cannot be found.
    """
    own = Path(state.tokenizer) if state.tokenizer else state.base
    if name:
        return find_tokenizer(state.config, name, own)
    try:
        if state.tokenizer is None:
            raise DataError(f"no {RUN} beside the state names it")
        return find_tokenizer(state.config, state.tokenizer, None if state.tokenizer else own)
    except CriaError as error:
        raise UsageError(
            f"{state.checkpoint.folder}: its run has no tokenizer at hand ({error}); pass --tokenizer to engine.export"
        ) from None
