"""The model's shape and the rows of a measured training step.

Rows have the lengths of Alpaca's rows (kernels.measure.alpaca) and random ids, except for the two stems that Alpaca's
templates begin with, which rows share. A smoke run takes few short rows and a toy model instead.
"""

import numpy as np

from engine.data.dataset import Dataset
from engine.model.config import MODELS, ModelConfig
from kernels.measure.alpaca import alpaca_lengths
from scripts.base.rows import random_alpaca_rows

ROWS = 128  # of a step
MAX_LENGTH = 512  # tokens; longer rows are cut
EPOCHS = 3
VOCAB_SIZE = 32_000
TOY = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=256, max_seq_len=64)
TOY_ROWS = 6
TOY_TOKENS = 384  # of a micro-batch


def model_shape(model: str, smoke: bool) -> ModelConfig:
    """Return the named model's shape, or the toy's in a smoke run."""
    return TOY if smoke else MODELS[model]


def alpaca_rows(n_steps: int, smoke: bool) -> Dataset:
    """Return rows for so many steps, drawn from Alpaca's lengths without repetition while there are enough."""
    vocab_size, max_length = (TOY.vocab_size, TOY.max_seq_len) if smoke else (VOCAB_SIZE, MAX_LENGTH)
    alpaca, generator = alpaca_lengths(), np.random.default_rng(0)
    stems = [generator.integers(3, vocab_size, n) for n in alpaca.shared_prefix]
    usable = alpaca.prompt < max_length  # a row cut before its response has no loss, and is no example
    if smoke:
        usable &= alpaca.prompt + alpaca.response < max_length + 8  # otherwise all rows would be cut to one length
    drawn = np.resize(generator.permutation(np.flatnonzero(usable)), n_steps * rows_a_step(smoke))
    return random_alpaca_rows(drawn, vocab_size, max_length, generator, stems)


def rows_a_step(smoke: bool) -> int:
    """Return the number of rows in a global batch."""
    return TOY_ROWS if smoke else ROWS


def examples_of_step(step: int, smoke: bool) -> np.ndarray:
    """Return the indices into alpaca_rows of a step's examples. Steps count from 1."""
    n = rows_a_step(smoke)
    return np.arange((step - 1) * n, step * n)
