"""The shape "tiny" with a tokenizer of 3,000 tokens: under SmolLM2's 49,152 the head is nearly all of a step's work."""

import functools
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch

from engine.formats.save import save_hf
from engine.model.config import MODELS
from engine.model.llama import new_model
from engine.text.templates import ALPACA_INPUT, ALPACA_NO_INPUT
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.run import ROOT

VOCAB_SIZE = 3000
SEED_TASKS = ROOT / "data_gen" / "seed_tasks.jsonl"


def write_tokenizer(folder):
    """Write a byte-level BPE tokenizer, as SmolLM2's, learnt from the seed tasks.

    The templates are among what it learns from, so that a row has about as many tokens as under SmolLM2's.
    """
    texts = SEED_TASKS.read_text().splitlines() + 30 * [ALPACA_INPUT, ALPACA_NO_INPUT]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCAB_SIZE, special_tokens=["<s>", "</s>"], show_progress=False)
    assert bpe.get_vocab_size() == VOCAB_SIZE
    bpe.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def write_model(folder, **changes):
    """Write a model folder of random weights: "tiny" with changes of its shape."""
    write_tokenizer(folder)
    model = new_model(replace(MODELS["tiny"], vocab_size=VOCAB_SIZE, **changes), "cpu", torch.float32)
    model.init_weights(1)
    tokenizer = load_tokenizer(folder)
    save_hf(folder, model, max_shard_bytes=10**9, bos_id=tokenizer.bos_id, eos_ids=sorted(tokenizer.stop_ids))


@functools.cache
def small_model():
    """Return the folder of a small model, which all tests of a session share and none may change."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "small-model"
    if not folder.exists():  # workers of pytest-xdist may be here at once: each writes its own, one is kept
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        write_model(made)
        try:
            made.rename(folder)
        except OSError:
            assert (folder / "config.json").exists()
    return folder
