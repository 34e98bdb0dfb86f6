"""The file tokenizer.model: a SentencePiece model as protocol-buffer bytes, read and written without protobuf.

Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of a piece, the same in a GGUF
UNIGRAM, BPE = 1, 2  # kinds of model
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # kinds of field

# Numbers of fields.
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # of the file
TEXT, SCORE, TYPE = 1, 2, 3  # of a piece
MODEL_TYPE, VOCAB_SIZE, BYTE_FALLBACK, FIRST_ID, FIRST_NAME = 3, 4, 35, 40, 45  # of the trainer: ids of unk, bos, eos
CHARSMAP, ADD_PREFIX, REMOVE_SPACES = 2, 3, 4  # of the normalizer

Field = tuple[int, int, int | bytes]  # (number, kind, value)


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says that decides the ids of a text.

    kind            UNIGRAM or BPE
    charsmap        how characters are replaced before anything else, in SentencePiece's own form; b"" changes none
    has_prefix      a space is put before the text
    removes_spaces  spaces at both ends are dropped, and runs of them become one
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    kind: int = BPE
    byte_fallback: bool = True
    charsmap: bytes = b""
    has_prefix: bool = True
    removes_spaces: bool = False


def read_varint(content: bytes, at: int) -> tuple[int, int]:
    """Return (a number of 7 bits a byte, the position after it). Raise IndexError past the end."""
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def read_fields(content: bytes) -> Iterator[Field]:
    """Yield the fields of a message. Raise ValueError or IndexError when it is none."""
    at = 0
    while at < len(content):
        key, at = read_varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = read_varint(content, at)
            yield number, kind, value
            continue
        if kind == LENGTH:
            size, at = read_varint(content, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(content):
            raise ValueError(f"a field of {size} bytes at {at} of {len(content)}")
        yield number, kind, content[at : at + size]
        at += size


def write_varint(value: int) -> bytes:
    """Return a number as 7 bits a byte. A negative one is written as its 64-bit two's complement."""
    value &= (1 << 64) - 1
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def write_field(number: int, value: int | float | bytes) -> bytes:
    """Return a field: an int as a varint, a float in four bytes, bytes after their length."""
    if isinstance(value, bytes):
        return write_varint(number << 3 | LENGTH) + write_varint(len(value)) + value
    if isinstance(value, float):
        return write_varint(number << 3 | FIXED32) + struct.pack("<f", value)
    return write_varint(number << 3 | VARINT) + write_varint(value)


def read_model(content: bytes) -> SentencePieceModel:
    """Return the content of a tokenizer.model. Raise ValueError, IndexError or struct.error when it is none."""
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, _, value in read_fields(content):
        if number == PIECES and isinstance(value, bytes):
            piece = {number: value for number, _, value in read_fields(value)}
            text, score, type = piece.get(TEXT, b""), piece.get(SCORE, bytes(4)), piece.get(TYPE, NORMAL)
            if not (isinstance(text, bytes) and isinstance(score, bytes) and isinstance(type, int)):
                raise ValueError(f"piece {len(tokens)} has fields of other kinds")
            tokens.append(text.decode())
            scores.append(struct.unpack("<f", score)[0])
            types.append(type)
        elif number in (TRAINER, NORMALIZER) and isinstance(value, bytes):
            fields = trainer if number == TRAINER else normalizer
            fields |= {number: value for number, _, value in read_fields(value)}
    charsmap, kind = normalizer.get(CHARSMAP, b""), trainer.get(MODEL_TYPE, UNIGRAM)
    if not (isinstance(charsmap, bytes) and isinstance(kind, int)):
        raise ValueError("its settings are fields of other kinds")
    return SentencePieceModel(
        tokens, scores, types, kind, bool(trainer.get(BYTE_FALLBACK, 0)), charsmap,
        bool(normalizer.get(ADD_PREFIX, 1)), bool(normalizer.get(REMOVE_SPACES, 1)),
    )  # fmt: skip


def write_model(model: SentencePieceModel, roles: dict[str, int]) -> bytes:
    """Return a tokenizer.model. roles: ids of "unk", "bos", "eos" and "pad"; one that is missing does not exist."""
    pieces = b"".join(
        write_field(PIECES, write_field(TEXT, token.encode()) + write_field(SCORE, score) + write_field(TYPE, kind))
        for token, score, kind in zip(model.tokens, model.scores, model.types, strict=True)
    )
    trainer = write_field(MODEL_TYPE, model.kind) + write_field(VOCAB_SIZE, len(model.tokens))
    trainer += write_field(BYTE_FALLBACK, int(model.byte_fallback))
    for place, role in enumerate(("unk", "bos", "eos", "pad")):
        id = roles.get(role, -1)
        trainer += write_field(FIRST_ID + place, id)
        if id >= 0:
            trainer += write_field(FIRST_NAME + place, model.tokens[id].encode())
    normalizer = write_field(1, b"identity") + write_field(ADD_PREFIX, int(model.has_prefix))
    normalizer += write_field(REMOVE_SPACES, int(model.removes_spaces))
    return pieces + write_field(TRAINER, trainer) + write_field(NORMALIZER, normalizer)


def mark_as_control(content: bytes, tokens: Collection[str]) -> bytes:
    """Return a tokenizer.model in which these pieces are of type CONTROL, so that no text encodes to them."""
    written = []
    for number, kind, value in read_fields(content):
        if number == PIECES and isinstance(value, bytes):
            text = next((v for n, _, v in read_fields(value) if n == TEXT), b"")
            if isinstance(text, bytes) and text.decode() in tokens:
                value += write_field(TYPE, CONTROL)  # of two values of a field, the later one counts
        if kind in (FIXED32, FIXED64):
            assert isinstance(value, bytes)
            written.append(write_varint(number << 3 | kind) + value)
        else:
            written.append(write_field(number, value))
    return b"".join(written)
