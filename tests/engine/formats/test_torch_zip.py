"""Damaged and boastful files of torch.save: refused, by checks that torch does not make."""

import zipfile

import pytest
import torch

from engine.base.errors import DataError
from engine.formats.tensor_files import open_pth, write_pth
from engine.formats.torch_zip import TensorZip
from tests.helpers.damage import flip_bits, truncate

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(40).bfloat16(), "c": torch.tensor(1.5)}


def read(path):
    """Return every tensor of a file."""
    return {name: next(stored.blocks())[2].clone() for name, stored in open_pth(path).items()}


def save(path, writer):
    """Write TENSORS by torch or as the engine does, and return the bytes."""
    if writer == "torch":
        torch.save(TENSORS, path)
    else:
        write_pth(path, [(name, t.shape, t.dtype, lambda t=t: t) for name, t in TENSORS.items()])
    return path.read_bytes()


@pytest.mark.parametrize("writer", ["torch", "engine"])
def test_no_flipped_bit_loads_other_tensors(writer, tmp_path):
    """Of all bytes of which a tensor is made; a date or a pad of the zip may change unseen."""
    path = tmp_path / "m.pth"
    raw = save(path, writer)
    assert {name: t.tolist() for name, t in read(path).items()} == {name: t.tolist() for name, t in TENSORS.items()}
    for changed in [*flip_bits(raw, n=600, seed=1), *truncate(raw, n=20)]:
        path.write_bytes(changed)
        try:
            got = read(path)
        except DataError as error:
            assert "m.pth" in str(error)
        else:
            assert got.keys() == TENSORS.keys() and all(torch.equal(got[name], TENSORS[name]) for name in got)


def test_every_bit_of_a_tensor_counts(tmp_path):
    path = tmp_path / "m.pth"
    raw = bytearray(save(path, "torch"))
    at = raw.index(TENSORS["a"].numpy().tobytes())
    for byte in range(at, at + 24):
        raw[byte] ^= 1
        path.write_bytes(raw)
        raw[byte] ^= 1
        opened = open_pth(path)  # the directory and the pickle are sound
        for stored in opened.values():
            with pytest.raises(DataError, match=r"m\.pth: not a sound torch file: Bad CRC"):
                next(stored.blocks())


@pytest.mark.parametrize("writer", ["torch", "engine"])
def test_every_bit_of_the_words_beside_the_tensors_counts(writer, tmp_path):
    """As of a name in the pickle: another name would be another tensor."""
    path = tmp_path / "m.pth"
    raw = bytearray(save(path, writer))
    for word in (b"X\x01\0\0\0b", b"X\x01\0\0\0c"):
        raw[raw.index(word) + 5] ^= 32
        path.write_bytes(raw)
        raw[raw.index(word[:5] + bytes([word[5] ^ 32])) + 5] ^= 32
        with pytest.raises(DataError, match=r"m\.pth: not a sound torch file"):
            open_pth(path)


def test_tensors_that_are_larger_than_what_is_stored(tmp_path):
    path, base = tmp_path / "m.pth", torch.zeros(1000)
    for tensors, words in (
        ({"a": torch.zeros(1).expand(9, 9)}, "'a' repeats a value to"),
        ({"a": base.as_strided((500, 500), (1, 1))}, "'a' repeats a value to"),
        ({"a": torch.zeros(2)[:1].expand(3)}, "'a' repeats a value to"),  # by no more numbers than there are bytes
        ({str(i): base.view(10, 100) for i in range(3)}, "12000 bytes, of which it stores 4000"),
    ):
        torch.save(tensors, path)
        with pytest.raises(DataError, match=words):
            open_pth(path)
    torch.save({"embedding": base, "head": base}, path)  # tied
    assert read(path).keys() == {"embedding", "head"}


def test_a_record_that_is_shorter_than_its_tensor(tmp_path):
    """Torch would go on reading in the records behind it."""
    path, other = tmp_path / "m.pth", tmp_path / "other.pth"
    save(other, "torch")
    with zipfile.ZipFile(other) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, content[:-4] if info.filename.endswith("data/0") else content)
    with pytest.raises(DataError, match="bytes of tensors are told"):
        open_pth(path)


@pytest.mark.parametrize("kind", ["compressed", "twice"])
def test_records_that_torch_would_read_otherwise(kind, tmp_path):
    path, other = tmp_path / "m.pth", tmp_path / "other.pth"
    save(other, "torch")
    with zipfile.ZipFile(other) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            squeezed = kind == "compressed" and info.filename.endswith("data/1")
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED if squeezed else zipfile.ZIP_STORED)
            if kind == "twice" and info.filename.endswith("data/1"):
                with pytest.warns(UserWarning, match="Duplicate"):
                    new.writestr(info.filename, old.read(info))
    with pytest.raises(DataError, match=r"m\.pth: not a sound torch file"):
        open_pth(path)


@pytest.mark.parametrize("kind, told", [("plain", None), ("twice", "two records of one name"),
                                        ("compressed", "a record is compressed or encrypted")])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_of_a_zip_that_torch_does_not_write(kind, told, tmp_path):
    save(tmp_path / "m.pth", "torch")
    with zipfile.ZipFile(tmp_path / "m.pth", "a") as archive:
        name = archive.namelist()[0] if kind == "twice" else "archive/more"
        archive.writestr(name, "x", zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED)
    if told is None:
        TensorZip(tmp_path / "m.pth")
    else:
        with pytest.raises((DataError, ValueError), match=told):
            TensorZip(tmp_path / "m.pth")
