"""A tokenizer.model as bytes: what it leaves unsaid has the value that SentencePiece itself takes."""

import pytest
import sentencepiece

from engine.text.sentencepiece_file import (
    ADD_PREFIX,
    BPE,
    BYTE,
    BYTE_FALLBACK,
    CONTROL,
    MODEL_TYPE,
    NORMAL,
    NORMALIZER,
    PIECES,
    REMOVE_SPACES,
    SCORE,
    TEXT,
    TRAINER,
    TYPE,
    UNIGRAM,
    UNKNOWN,
    read_fields,
    read_model,
    write_field,
)
from engine.text.tokenizer_sentencepiece import open_sentencepiece

PLACES = {"kind": (TRAINER, MODEL_TYPE), "byte_fallback": (TRAINER, BYTE_FALLBACK),
          "has_prefix": (NORMALIZER, ADD_PREFIX), "removes_spaces": (NORMALIZER, REMOVE_SPACES)}  # fmt: skip
UNSAID = {"kind": UNIGRAM, "byte_fallback": 0, "has_prefix": 1, "removes_spaces": 1}
OTHER = {"kind": BPE, "byte_fallback": 1, "has_prefix": 0, "removes_spaces": 0}
WORDS = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "c", "ab", "bc"]  # as a BPE "abc" is "ab c", the leftmost
SCORES = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def write_said(said, says_pieces):
    """Return a model of WORDS and bytes that says only these settings, and of a piece what is no default."""
    content = b""
    for i, word in enumerate((*WORDS, *(BYTES if said.get("byte_fallback") else ()))):
        kind = UNKNOWN if i == 0 else CONTROL if i < 3 else NORMAL if i < len(WORDS) else BYTE
        score = SCORES[i] if i < len(WORDS) else 0.0
        piece = write_field(TEXT, word.encode())
        piece += write_field(SCORE, score) if says_pieces or score else b""
        content += write_field(PIECES, piece + (write_field(TYPE, kind) if says_pieces or kind != NORMAL else b""))
    for message in (TRAINER, NORMALIZER):
        fields = [write_field(PLACES[name][1], value) for name, value in said.items() if PLACES[name][0] == message]
        content += write_field(message, b"".join(fields))
    return content


def encode(content):
    return sentencepiece.SentencePieceProcessor(model_proto=content).encode(["abc", "  a  b ", "\u6f22"])


@pytest.mark.parametrize("name", UNSAID)
def test_what_a_model_leaves_unsaid_is_what_sentencepiece_takes(name):
    whole = write_said(UNSAID, says_pieces=True)
    unsaid = write_said({other: value for other, value in UNSAID.items() if other != name}, says_pieces=False)
    assert read_model(unsaid) == read_model(whole) and encode(unsaid) == encode(whole)
    changed = write_said(UNSAID | {name: OTHER[name]}, says_pieces=True)
    assert getattr(read_model(changed), name) == OTHER[name] and encode(changed) != encode(whole)


def test_fields_of_every_kind_are_passed_over():
    """Numbers of 4 and of 8 bytes, a varint of several, and a text, as a newer SentencePiece may write them."""
    content = b"\x08\xac\x02" + b"\x11" + b"12345678" + b"\x1a\x03abc" + b"\x25" + b"1234" + b"\x28\x01"
    wanted = [(1, 0, 300), (2, 1, b"12345678"), (3, 2, b"abc"), (4, 5, b"1234"), (5, 0, 1)]
    assert list(read_fields(content)) == wanted
    for cut in (b"\x11" + b"1234567", b"\x25123", b"\x1a\x03ab", b"\x13"):
        with pytest.raises(ValueError, match="a field of"):
            list(read_fields(content + cut))


def test_tokens_that_are_named_special_come_of_no_text(tmp_path):
    """Whether the model takes them for words or for a user's, and no other token with them."""
    content = write_said(UNSAID, says_pieces=True)
    plain, _ = open_sentencepiece(tmp_path, content, ())
    ids = {word: i for i, word in enumerate(WORDS)}
    assert ids["ab"] in plain.encode("ab") or ids["bc"] in plain.encode("bc") or plain.encode("c")[-1] == ids["c"]
    for special in ("c", "b"):
        processor, model = open_sentencepiece(tmp_path, content, {special, None})
        changed = [word for word, kind in zip(WORDS, model.types, strict=False) if kind == CONTROL]
        assert changed == ["<s>", "</s>", special]
        assert ids[special] in plain.encode(special) and ids[special] not in processor.encode(special)
