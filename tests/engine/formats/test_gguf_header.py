"""The bytes of a GGUF, written by hand: what is read of them, and what is told of each kind of damage."""

import re
import struct

import pytest

pytest.importorskip("gguf")

from engine.base.errors import DataError
from engine.formats.gguf import open_gguf

F32, F16, Q8_0 = 0, 1, 8


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key, kind, value):
    """Return a key with a value: a number by its kind's code, or bytes."""
    return text(key) + struct.pack("<I", kind) + (value if isinstance(value, bytes) else struct.pack("<I", value))


def items(kind, *values, code="I"):
    return struct.pack("<IQ", kind, len(values)) + b"".join(struct.pack("<" + code, value) for value in values)


def tensor(name, shape, kind, offset):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


A, B = tensor("a", (3, 2), F32, 0), tensor("b", (5,), F16, 32)
BODY = struct.pack("<6f", 1, 2, 3, 4, 5, 6) + bytes(8) + struct.pack("<5e", 1, 2, 3, 4, 5)


def file(pairs=(), infos=(A, B), body=BODY, version=3, alignment=32, begin=b"GGUF", n=None):
    head = begin + struct.pack("<IQQ", version, len(infos) if n is None else n, len(pairs)) + b"".join([*pairs, *infos])
    return head + bytes(-len(head) % alignment) + body


KINDS = [pair("general.x", kind, struct.pack("<" + code, value)) for kind, code, value in (
    (0, "B", 200), (1, "b", -100), (2, "H", 60000), (3, "h", -30000), (4, "I", 1 << 31), (5, "i", -(1 << 30)),
    (6, "f", 1e-5), (7, "?", True), (8, "Q", 0), (10, "Q", 1 << 40), (11, "q", -(1 << 40)), (12, "d", 0.1),
)]  # fmt: skip
LENGTH, EPS = "llama.context_length", "llama.attention.layer_norm_rms_epsilon"
CASES = {
    "sound": file(), "version 2": file(version=2), "version 1": file(version=1), "version 4": file(version=4),
    "another beginning": file(begin=b"GGML"), "nothing": b"", "a few bytes": file()[:20],
    **{f"kind {struct.unpack_from('<I', value, 17)[0]}": file([value]) for value in KINDS},
    "a list of numbers": file([pair("general.x", 9, items(4, 7, 8))]),
    "a list of lists": file([pair("general.x", 9, struct.pack("<IQ", 9, 2) + items(4, 7) + items(4, 8))]),
    "a list of texts": file([pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("é"))]),
    "an unknown kind": file([pair("general.x", 13, 0)]),
    "a text that is none": file([text("general.x") + struct.pack("<IQ", 8, 2) + b"\xff\xfe"]),
    "a list longer than the file": file([pair("general.x", 9, struct.pack("<IQ", 4, 1 << 40))]),
    "a length": file([pair(LENGTH, 4, 128)]), "a length of 64 bits": file([pair(LENGTH, 10, struct.pack("<Q", 9))]),
    "a length as a fraction": file([pair(LENGTH, 6, struct.pack("<f", 128))]),
    "a length as a list": file([pair(LENGTH, 9, items(4, 128))]), "twice": file([pair(LENGTH, 4, 1)] * 2),
    "an eps as a number": file([pair(EPS, 4, 1)]), "an eps of 64 bits": file([pair(EPS, 12, struct.pack("<d", 1e-5))]),
    "tokens that are no list": file([pair("tokenizer.ggml.tokens", 8, text("a"))]),
    "tokens that are numbers": file([pair("tokenizer.ggml.tokens", 9, items(4, 1))]),
    "scores of an unknown kind": file([pair("tokenizer.ggml.scores", 9, items(99, 1))]),
    "one bit off a key": file([pair("llama.context_lengtx", 4, 1)]),
    "two bits off": file([pair("mlama.context_lengtg", 4, 1)]),
    "one bit off a key that is there": file([pair(LENGTH, 4, 2), pair("llama.context_lengti", 4, 1)]),
    "aligned to 64": file([pair("general.alignment", 4, 64)], (A, tensor("b", (5,), F16, 64)),
                          BODY[:24] + bytes(40) + BODY[32:], alignment=64),
    "aligned to 0": file([pair("general.alignment", 4, 0)]), "aligned to 24": file([pair("general.alignment", 4, 24)]),
    "aligned to 1": file([pair("general.alignment", 4, 1)], [tensor("a", (1,), F32, 0)], bytes(4), alignment=1),
    "two of a name": file(infos=(A, A)), "too late": file(infos=(tensor("a", (3, 2), F32, 32), B)),
    "too early": file(infos=(A, tensor("b", (5,), F16, 24))), "five axes": file(infos=[tensor("a", (1,) * 5, F32, 0)]),
    "four axes": file(infos=[tensor("a", (1, 2, 1, 3), F32, 0)], body=BODY[:24]),
    "no axis": file(infos=[tensor("a", (), F32, 0)]), "an axis of 0": file(infos=[tensor("a", (3, 0), F32, 0)]),
    "no whole blocks": file(infos=[tensor("a", (31, 2), Q8_0, 0)]),
    "an unknown type": file(infos=[tensor("a", (1,), 4, 0)]),
    "whole blocks": file(infos=[tensor("a", (32, 2), Q8_0, 0)], body=bytes(68)),
    "a type that is not read": file(infos=[tensor("a", (2,), 24, 0)], body=bytes(2)),
    "past the end": file(body=BODY[:-1]), "bytes behind": file(body=BODY + bytes(22) + b"x"),
    "zeros behind": file(body=BODY + bytes(22)), "zeros behind those": file(body=BODY + bytes(23)),
    "bytes between": file(body=BODY[:25] + b"x" + BODY[26:]), "more tensors than there are": file(n=3),
    "a web page": b"<!DOCTYPE html><html>", "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
}  # fmt: skip


def test_what_is_read_of_a_file_or_told_of_its_damage(tmp_path, snapshot):
    lines, path = [], tmp_path / "m.gguf"
    for name, content in CASES.items():
        path.write_bytes(content)
        try:
            metadata, stored = open_gguf(path)
        except DataError as error:
            told = str(error).replace("m.gguf: not a sound GGUF file, truncated or corrupt: ", "damaged: ")
            lines.append(f"{name}: {re.sub('unpack_from .*', '#', told)}")
            continue
        lines.append(f"{name}: {metadata}")
        for key, one in stored.items():
            can_read = not isinstance(one.dtype, str)
            parts = [(row, column, part.tolist()) for row, column, part in one.blocks()] if can_read else "not read"
            shown = parts if len(str(parts)) < 99 else f"{len(parts)} parts"
            lines.append(f"  {key} {one.shape} {one.dtype}: {shown}")
    assert "\n".join(lines) + "\n" == snapshot


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 7, 8])
def test_a_matrix_is_read_a_few_rows_at_a_time(rows_at_once, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.formats.gguf.BLOCK_ELEMENTS", 3 * rows_at_once + 2)
    path, numbers = tmp_path / "m.gguf", list(range(21))
    path.write_bytes(file(infos=[tensor("a", (3, 7), F32, 0)], body=struct.pack("<21f", *numbers)))
    blocks = list(open_gguf(path)[1]["a"].blocks())
    assert [row for row, _, _ in blocks] == list(range(0, 7, rows_at_once)) and {column for _, column, _ in blocks} == {
        0
    }
    assert [value for _, _, part in blocks for value in part.flatten().tolist()] == numbers
    assert max(len(part) for _, _, part in blocks) == min(rows_at_once, 7)
