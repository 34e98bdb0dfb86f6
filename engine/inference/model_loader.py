"""A model by name, folder or file, ready to run: weights, tokenizer and where they came from."""

import torch

from engine.formats.find import find_model
from engine.formats.source import Source, open_source
from engine.model.llama import Transformer, new_model
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import find_tokenizer


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, impl: str = "auto"
) -> tuple[Transformer, Tokenizer, Source]:
    """The model with its weights, its tokenizer, and where they came from."""
    path = find_model(name)
    source = open_source(path)
    tokenizer = find_tokenizer(source.config, "", path)
    model = new_model(source.config, device, dtype, impl)
    source.read_into(model)
    return model, tokenizer, source
