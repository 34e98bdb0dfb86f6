"""A tokenizer.json for tokenizers that have none: the one inside a GGUF file, and SentencePiece's.

It is in the form of Hugging Face's tokenizers library. The tokenizer_config.json made with it names a class that makes
transformers use the tokenizer.json unchanged.
"""

import base64
import json
import re
from bisect import bisect_left
from typing import Any

from engine.text.sentencepiece_file import NORMAL, UNIGRAM, UNKNOWN, UNUSED, USER_DEFINED, SentencePieceModel

CHAT_TOKEN = re.compile("<[|\uff5c][^\\s<>|\uff5c]+[|\uff5c]>")
NEVER = -1e9  # score of a Unigram's piece that no text becomes


def is_chat_token(token: str) -> bool:
    """Return whether a token looks like <|im_start|>. Such a token marks a turn, even where a file calls it a word."""
    return CHAT_TOKEN.fullmatch(token) is not None


def make_decoder(has_prefix: bool) -> dict[str, Any]:
    """Return the decoder of SentencePiece's pieces. has_prefix: the space that was put before the text is removed."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def make_sentencepiece_spec(model: SentencePieceModel) -> dict[str, Any]:
    """Return a tokenizer.json for a SentencePiece model, without its added tokens."""
    core = make_unigram(model) if model.kind == UNIGRAM else make_bpe(model)
    return {"normalizer": make_normalizer(model), "decoder": make_decoder(model.has_prefix), "model": core}


def make_normalizer(model: SentencePieceModel) -> dict[str, Any]:
    """Return what changes a text before it is cut into pieces: characters, spaces, the space before the text."""
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.removes_spaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    words = [re.escape(token) for token in list_user_words(model)]
    if model.has_prefix and words:
        # An added token is found in the text after the normalizer, which changes the token's own text too. So it gets
        # no prefix when it stands alone.
        steps.append({"type": "Replace", "pattern": {"Regex": rf"\A(?!({'|'.join(words)})\z)"}, "content": "▁"})
    elif model.has_prefix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return {"type": "Sequence", "normalizers": steps}


def list_user_words(model: SentencePieceModel) -> list[str]:
    """Return the pieces that the model's maker defined and that every text which spells them becomes."""
    return [token for token, kind in zip(model.tokens, model.types, strict=True) if kind == USER_DEFINED]


def find_unknown(model: SentencePieceModel) -> int | None:
    """Return the id that stands for what no piece spells, None if there is none."""
    return next((id for id, kind in enumerate(model.types) if kind == UNKNOWN), None)


def make_bpe(model: SentencePieceModel) -> dict[str, Any]:
    """Return SentencePiece's BPE as the tokenizers library knows it, by merges.

    BPE merges the two neighbours whose joined piece has the best score, and the leftmost of equal ones.
    """
    tokens, scores = model.tokens, model.scores
    ids = {token: id for id, (token, kind) in enumerate(zip(tokens, model.types, strict=True)) if kind == NORMAL}
    merges = []
    lengths = sorted({len(piece) for piece in ids})  # few: a long piece is not cut where no piece is so short
    known_lengths = set(lengths)
    for piece in sorted(ids, key=lambda piece: (-scores[ids[piece]], ids[piece])):
        cuts = (at for at in lengths[: bisect_left(lengths, len(piece))] if len(piece) - at in known_lengths)
        pairs = ((piece[:at], piece[at:]) for at in cuts)
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        merges += [f"{left} {right}" for left, right in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    unknown = find_unknown(model)
    return {
        "type": "BPE", "fuse_unk": True, "byte_fallback": model.byte_fallback,
        "unk_token": None if unknown is None else tokens[unknown],
        "vocab": {token: id for id, token in enumerate(tokens)}, "merges": merges,
    }  # fmt: skip


def make_unigram(model: SentencePieceModel) -> dict[str, Any]:
    """Return SentencePiece's Unigram model as the tokenizers library knows it."""
    kinds = zip(model.tokens, model.scores, model.types, strict=True)
    vocab = [[token, score if kind in (NORMAL, USER_DEFINED, UNUSED) else NEVER] for token, score, kind in kinds]
    return {"type": "Unigram", "unk_id": find_unknown(model), "byte_fallback": model.byte_fallback, "vocab": vocab}


def make_bos_template(token: str, id: int) -> dict[str, Any]:
    """Return the post-processor that puts BOS before a text."""
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {token: {"id": token, "ids": [id], "tokens": [token]}}
    return {
        "type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, second], "special_tokens": special
    }  # fmt: skip


def make_hugging_face_files(
    spec: dict[str, Any],
    specials: dict[str, int],
    names: dict[str, str],
    *,
    add_bos: bool,
    plain: dict[str, int] | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return {file name: content} of a tokenizer.json and its tokenizer_config.json.

    names: bos_token, eos_token, ... -> text. plain: added tokens that are not special. config: further settings.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    added: dict[int, dict[str, Any]] = {}
    for token, id in sorted({**(plain or {}), **specials}.items(), key=lambda item: item[1]):
        special = token in specials
        # Words are found in the normalized text, as SentencePiece finds its user's. llama.cpp's converter decodes the
        # others, which breaks a word like "\u00f8" that is a byte in GPT-2's alphabet.
        added[id] = {"content": token, **flags, "normalized": not special, "special": special}
    spec = {"version": "1.0", "added_tokens": [{"id": id, **token} for id, token in added.items()]} | spec
    bos = names.get("bos_token") if add_bos else None
    if bos is not None:
        spec["post_processor"] = make_bos_template(bos, specials[bos])
    config = {
        **(config or {}), "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bos is not None, **names,
        # From this, llama.cpp's converter learns which tokens are added to a tokenizer.model, and which are special.
        "added_tokens_decoder": {str(id): token for id, token in added.items()},
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    contents = {"tokenizer.json": spec, "tokenizer_config.json": config}
    return {name: write_json(value) for name, value in contents.items()}


def write_json(value: dict[str, Any]) -> bytes:
    """Return an object as the content of a JSON file."""
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"
