"""Adapters of the small model, with random factors."""

from pathlib import Path

import torch

from engine.formats.adapters import hash_base, save_adapter
from engine.formats.source import open_source
from engine.model.adapter import AdapterConfig
from engine.model.llama import new_model
from tests.helpers.small_model import small_model


def write_adapter(folder, seed=0, base=None, config=None):
    """Write an adapter whose factors, B too, are far from 0, of the small model or another base. Return the folder."""
    source = open_source(Path(base or small_model()))
    config = config or AdapterConfig(r=4, alpha=8.0)
    model = new_model(source.config, "cpu", torch.float32, adapter=config)
    source.read_into(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.trained_parameters().values():
            p.normal_(std=0.2, generator=generator)
    save_adapter(folder, model, str(source.path), hash_base(source))
    return folder
