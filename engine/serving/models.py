"""A model of any layout, named by --model, ready to generate text."""

from pathlib import Path

import torch

from engine.base.errors import CriaError, DataError, UsageError
from engine.formats.find import detect_kind, find_model
from engine.formats.source import Source, open_source
from engine.model.llama import Transformer, new_model
from engine.output.folder import RUN, read_prompt_style
from engine.output.state_as_model import TrainingState, open_training_state
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import find_tokenizer


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, impl: str = "auto"
) -> tuple[Transformer, Tokenizer, str | None]:
    """Return (model, tokenizer, prompt style) of a model by its name, folder, file or training state (checkpoint-N).

    The model is on the device. The style is the one that a run of ours trained it with, None where none did. Raise
    DataError or UsageError when it cannot be found or read.
    """
    path = find_model(name)
    source: Source | TrainingState
    if detect_kind(path) == "state":
        source = open_training_state(path)
        tokenizer, style = find_tokenizer_of_state(source, ""), source.prompt_style
    else:
        source = open_source(path)
        tokenizer, style = find_tokenizer(source.config, "", path), read_prompt_style(path)
    model = new_model(source.config, device, dtype, impl)
    source.read_into(model)
    return model, tokenizer, style


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
