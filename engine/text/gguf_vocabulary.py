"""A tokenizer as the metadata of a GGUF file, from which llama.cpp gives the same ids.

GGUF names how text is split (`tokenizer.ggml.pre`) and does not say it. So each way that llama.cpp knows is tried on
texts on which they differ, and the one that cuts them as the tokenizer does is named; without one it is refused.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from engine.base.errors import UsageError
from engine.text.sentencepiece_file import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_model
from engine.text.tokenizer import PROBE, Tokenizer
from engine.text.tokenizer_files import load_tokenizer_json
from engine.text.tokenizer_gguf import (
    WHOLE_WORDS,
    make_byte_level_files,
    make_pre_tokenizer,
    make_sentencepiece_files,
)
from engine.text.tokenizer_parts import read_json, read_named_tokens
from engine.text.tokenizer_sentencepiece import load_sentencepiece

SPLIT_ORDER = ("llama-bpe", "smollm", "gpt-2", "deepseek-llm", "deepseek-coder", "smaug-bpe", "default")
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours -> GGUF's
UNUSED_SCORE = -10000.0  # of ids that the tokenizer does not have, as llama.cpp's converter gives them
ADDED_SCORE = -1000.0
PROBES = (  # digits, contractions, white space, scripts and signs on which the ways to split differ
    PROBE, "1 12 123 1234 12345 3.3 3...3 x2y", "I've 'RE You'Re it'S don't", " a\n\n b \t\t\n  \n",
    "漢字ひらがな 한국어?我", "Ünïcode Ωμέγα нещо កាន់", "<=>+$^~|`'''\"\"\"......!!!!!! ---===",
    "🚀 😶\u200d🌫️ 🦙🦙", "\r\n\r\nend  ", "a" * 40,
)  # fmt: skip


def make_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the metadata of a tokenizer, {key of GGUF: value}, for a model of so many token ids.

    Raise UsageError for a tokenizer that llama.cpp would run otherwise.
    """
    files = tokenizer.files
    spec = read_json(Path(), files, "tokenizer.json")
    if "tokenizer.model" in files:
        values, rebuild = describe_sentencepiece(tokenizer, vocab_size), rebuild_sentencepiece
        values["pre"] = "default"
    elif spec.get("model", {}).get("type") == "BPE":
        values, rebuild = describe_byte_level(tokenizer, spec, vocab_size), rebuild_byte_level
        values["pre"] = find_split(spec)
    else:
        raise UsageError("--layout gguf: the tokenizer is neither SentencePiece's nor a BPE, which llama.cpp reads")
    values |= describe_roles(tokenizer, vocab_size)
    if values["pre"] is None or rebuild(values).encode_batch(list(PROBES)) != tokenizer.encode_batch(list(PROBES)):
        raise UsageError(
            "--layout gguf: llama.cpp would split text otherwise than this tokenizer; export another layout, and "
            "convert it by llama.cpp's own script"
        )
    config = read_json(Path(), files, "tokenizer_config.json")
    template = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else config.get("chat_template")
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return found | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def find_split(spec: dict[str, Any]) -> str | None:
    """Return the way to split, of SPLITS, that cuts the probes as a tokenizer.json does; None if there is none.

    The pieces are compared, not the ids: those of a small vocabulary may be equal by chance.
    """
    wanted = split_probes(spec.get("pre_tokenizer"))
    takes_whole_words = bool(spec["model"].get("ignore_merges"))
    for pre in SPLIT_ORDER:
        if (pre in WHOLE_WORDS) == takes_whole_words and split_probes(make_pre_tokenizer(pre)) == wanted:
            return pre
    return None


def split_probes(pre_tokenizer: dict[str, Any] | None) -> list[list[str]]:
    """Return the pieces of each probe under the pre_tokenizer of a tokenizer.json."""
    spec = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": pre_tokenizer}
    splitter = tokenizers.Tokenizer.from_str(json.dumps(spec)).pre_tokenizer
    return [[piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter else [text] for text in PROBES]


def describe_sentencepiece(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return pieces, scores and types of a tokenizer.model, with the tokens that were added to it."""
    model = read_model(tokenizer.files["tokenizer.model"])
    tokens, scores, types = make_unused(vocab_size)
    for id in range(min(vocab_size, len(model.tokens))):
        tokens[id], scores[id], types[id] = model.tokens[id], model.scores[id], model.types[id]
    for token, id in tokenizer.special_ids.items():
        if len(model.tokens) <= id < vocab_size:
            tokens[id], scores[id], types[id] = token, ADDED_SCORE, CONTROL
    values: dict[str, Any] = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    return values if model.has_prefix else {**values, "add_space_prefix": False}


def describe_byte_level(tokenizer: Tokenizer, spec: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return tokens, types and merges of a tokenizer.json of GPT-2's kind."""
    tokens, _, types = make_unused(vocab_size)
    added = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    kinds = {**dict.fromkeys(spec["model"]["vocab"], NORMAL), **dict.fromkeys(added, USER_DEFINED)}
    for token, id in {**spec["model"]["vocab"], **added}.items():
        if id < vocab_size:
            tokens[id], types[id] = token, kinds[token]
    for token, id in tokenizer.special_ids.items():
        tokens[id], types[id] = token, CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    return {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": merges}


def make_unused(vocab_size: int) -> tuple[list[str], list[float], list[int]]:
    """Return tokens, scores and types of ids that are not used."""
    return [f"[PAD{id}]" for id in range(vocab_size)], [UNUSED_SCORE] * vocab_size, [UNUSED] * vocab_size


def describe_roles(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return which ids begin and end a text, stand for what is unknown, and pad; and whether a text begins with BOS."""
    named = read_named_tokens(Path(), tokenizer.files)
    ids: dict[str, int | None] = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for role, name in (("unknown", "unk_token"), ("padding", "pad_token")):
        ids[role] = tokenizer.special_ids.get(named.get(name) or "")
    roles: dict[str, Any] = {f"{r}_token_id": id for r, id in ids.items() if id is not None and id < vocab_size}
    return roles | {"add_bos_token": tokenizer.add_bos}


def find_roles(values: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the roles in a GGUF's values, by our names."""
    return {role: values[f"{name}_token_id"] for role, name in ROLES.items() if f"{name}_token_id" in values}


def rebuild_sentencepiece(values: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that is read from a GGUF with these values."""
    return load_sentencepiece(Path(), make_sentencepiece_files(values, find_roles(values), {}))


def rebuild_byte_level(values: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that is read from a GGUF with these values."""
    files, _ = make_byte_level_files(Path(), values, find_roles(values), {})
    return load_tokenizer_json(Path(), files)
