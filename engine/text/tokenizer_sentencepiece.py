"""Tokenizers of a tokenizer.model alone: SentencePiece's ids, and a tokenizer.json that gives the same elsewhere."""

import os
import re
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from engine.base.errors import DataError
from engine.text.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    mark_as_control,
    read_model,
    write_model,
)
from engine.text.tokenizer import Tokenizer, Vocabulary
from engine.text.tokenizer_json import is_chat_token, list_user_words, make_hugging_face_files, make_sentencepiece_spec
from engine.text.tokenizer_parts import (
    Files,
    get_token_text,
    make_tokenizer,
    piece_to_bytes,
    read_json,
    read_named_tokens,
)

BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
# Keys of a tokenizer_config.json that are of no use beside a tokenizer.json made here.
REPLACED = {
    "added_tokens_decoder", "auto_map", "tokenizer_class", "legacy", "sp_model_kwargs", "add_prefix_space", "use_fast",
    "vocab_file", "tokenizer_file", "special_tokens_map_file", "name_or_path", "backend",
}  # fmt: skip


def load_sentencepiece(path: Path, files: Files) -> Tokenizer:
    """Return the tokenizer of a tokenizer.model. It saves files in Hugging Face's form too, made here."""
    config = read_json(path, files, "tokenizer_config.json")
    stated = set(read_named_tokens(path, files).values())
    processor, model = open_sentencepiece(path, files["tokenizer.model"], stated)
    tokens = model.tokens
    added = read_json(path, files, "added_tokens.json") | {
        get_token_text(token): int(id) for id, token in config.get("added_tokens_decoder", {}).items()
    }
    plain = {token: id for id, token in enumerate(tokens) if model.types[id] == USER_DEFINED}
    added = {token: id for token, id in added.items() if token not in plain}
    specials = {tokens[id]: id for id, kind in enumerate(model.types) if kind in (UNKNOWN, CONTROL)} | added
    role_ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    names = {role: tokens[id] for role, id in role_ids.items() if id >= 0}

    def encode(texts: list[str], follow_special: bool) -> list[list[int]]:
        return processor.encode(texts, num_threads=min(len(texts), os.cpu_count() or 1))

    ids = {piece: id for id, piece in enumerate(tokens)} | added
    pieces = {id: piece_to_bytes(piece) for piece, id in ids.items()}
    vocabulary = Vocabulary(ids, pieces, specials, byte_level=False, has_space_prefix=model.has_prefix)
    tokenizer = make_tokenizer(path, files, encode, vocabulary, names, config.get("add_bos_token") is not False)
    return add_hugging_face_files(path, tokenizer, files, model, ids)


def open_sentencepiece(
    path: Path, content: bytes, special: Collection[str | None]
) -> tuple[sentencepiece.SentencePieceProcessor, SentencePieceModel]:
    """Return a tokenizer.model as SentencePiece runs it, and its content. Raise DataError when it is no such model.

    special: tokens that no text shall become, whatever the model says of them. Nor does one become <|im_start|>.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        model = read_model(content)
        found = zip(model.tokens, model.types, strict=True)
        hidden = {
            token
            for token, kind in found
            if (kind == USER_DEFINED and is_chat_token(token)) or (kind in (NORMAL, USER_DEFINED) and token in special)
        }
        if hidden:
            content = mark_as_control(content, hidden)
            model = read_model(content)
        processor.LoadFromSerializedProto(content)
        sound = processor.get_piece_size() > 0
    except (RuntimeError, ValueError, IndexError, struct.error):
        sound = False
    if not sound:
        raise DataError(
            f"{path / 'tokenizer.model'}: got no SentencePiece model, wanted one (Meta's Llama 3 has a tiktoken file "
            "there); put a tokenizer.json beside it"
        )
    return processor, model


def add_hugging_face_files(
    path: Path, tokenizer: Tokenizer, files: Files, model: SentencePieceModel, ids: dict[str, int]
) -> Tokenizer:
    """Add a tokenizer.json and its config to the files that a SentencePiece tokenizer saves, and return it.

    They replace the files that say the same in the older form. Where the tokenizers library cannot give the ids of
    SentencePiece, they are left out, with a warning.
    """
    config, older = (read_json(path, files, name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    texts = {id: text for text, id in ids.items()}
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    stated = read_named_tokens(path, files)
    names = {role: text for role, text in stated.items() if text is not None and text in ids}
    names |= {role: texts[id] for role, id in roles.items() if id is not None}
    kept = {key: value for key, value in (older | config).items() if key not in REPLACED and not key.endswith("_token")}
    more = [get_token_text(token) for token in kept.pop("additional_special_tokens", None) or []]
    if more := [token for token in more if token in ids]:
        kept["additional_special_tokens"] = more
    plain = {token: ids[token] for token in list_user_words(model)}
    spec, add_bos = make_sentencepiece_spec(model), tokenizer.add_bos
    made = make_hugging_face_files(spec, tokenizer.special_ids, names, add_bos=add_bos, plain=plain, config=kept)
    backend = tokenizers.Tokenizer.from_str(made["tokenizer.json"].decode())
    backend.encode_special_tokens = True
    for text in list_probes(model):
        if backend.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            tokenizer.warnings = (
                f"{path}: this SentencePiece model cannot be written as a tokenizer.json (its ids would differ for "
                f"{text[:40]!r}); the model will be saved without, and transformers will give other ids than training",
            )
            return tokenizer
    for name in ("special_tokens_map.json", "added_tokens.json"):
        tokenizer.files.pop(name, None)
    tokenizer.files |= made
    return tokenizer


def add_tokenizer_model(tokenizer: Tokenizer, bpe: dict[str, Any], ids: dict[str, int]) -> None:
    """Add a tokenizer.model to the files of a tokenizer.json of SentencePiece's kind, where one gives the same ids.

    Without it llama.cpp's converter knows no order of merges: it gives every piece the score -1000. bpe: the model in
    the tokenizer.json. ids: all tokens. Nothing is added where SentencePiece's BPE, which joins any two pieces that
    make a piece, gives other ids than these merges, or where a token that text becomes was added to the vocabulary.
    """
    if (
        sorted(ids.values()) != list(range(len(ids)))
        or not ids.keys() <= bpe["vocab"].keys() | tokenizer.special_ids.keys()
    ):
        return
    tokens = sorted(ids, key=lambda token: ids[token])
    merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in bpe["merges"])
    scores = [-1e9] * len(tokens)
    for rank, pair in enumerate(merges):
        id = ids["".join(pair)]
        scores[id] = max(scores[id], -float(rank))
    types = [BYTE if BYTE_PIECE.fullmatch(token) else NORMAL for token in tokens]
    for id in tokenizer.special_ids.values():
        types[id] = CONTROL
    unknown = ids.get(bpe.get("unk_token") or "<unk>", tokenizer.eos_id)
    types[unknown] = UNKNOWN
    has_prefix = any(tokens[id].startswith("▁") for id in tokenizer.encode("a")[:1])
    model = SentencePieceModel(tokens, scores, types, byte_fallback=BYTE in types, has_prefix=has_prefix)
    roles = {"unk": unknown, "eos": tokenizer.eos_id} | ({} if tokenizer.bos_id is None else {"bos": tokenizer.bos_id})
    content = write_model(model, roles)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError:  # it does not know all bytes, or a piece twice
        return
    texts = [text.lstrip(" ") for text in list_probes(model)]  # a second space before a text is a matter of taste
    if processor.encode(texts) == tokenizer.encode_batch(texts):
        tokenizer.files["tokenizer.model"] = content


def list_probes(model: SentencePieceModel) -> list[str]:
    """Return texts whose ids show whether another program runs a SentencePiece model as SentencePiece does.

    Some hold what models replace or drop, the others are pieces of the model side by side.
    """
    words = [token.replace("▁", " ") for token, kind in zip(model.tokens, model.types, strict=True) if kind == NORMAL]
    words = words[:: max(1, len(words) // 2000)]
    texts = ["The quick  brown\nﬁx: 1234 ①𝔘 e\u0301", " a", "a  b", "   a\tb ", "漢字 é"]
    texts += [f"x{word} {word}y" for word in list_user_words(model)[:50]]
    return texts + ["".join(words[at : at + 5]) for at in range(0, len(words), 5)]
