"""A model of any layout, named by --model, ready to generate text."""

import torch

from engine.formats.find import find_model
from engine.formats.source import Source, open_source
from engine.model.llama import Transformer, new_model
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import find_tokenizer


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, impl: str = "auto"
) -> tuple[Transformer, Tokenizer, Source]:
    """Return (model, tokenizer, source) of a model by its name, folder or file; the model is on the device.

    Raise DataError or UsageError when it cannot be found or read.
    """
    path = find_model(name)
    source = open_source(path)
    tokenizer = find_tokenizer(source.config, "", path)
    model = new_model(source.config, device, dtype, impl)
    source.read_into(model)
    return model, tokenizer, source
