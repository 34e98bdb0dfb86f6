"""Safetensors files as the library writes them."""

import hashlib
import os
import re
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.base.errors import DataError, NotFiniteError
from engine.formats.tensor_files import open_pth, open_safetensors, write_pth, write_safetensors


def test_write_safetensors_as_the_library_does(tmp_path):
    tensors = {
        "a": torch.randn(3, 5), "b": torch.tensor(1.5), "c": torch.zeros(0, 4), "é": torch.randn(4, 6).T,
        "x": torch.randn(7).bfloat16(), "y": torch.arange(5), "z": torch.tensor([True, False]),
    }  # fmt: skip
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries = [(name, tensors[name].shape, tensors[name].dtype, lambda name=name: tensors[name]) for name in order]
    digest = write_safetensors(tmp_path / "ours", iter(entries), {"format": "pt"}, sha256=True)
    assert digest == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()
    back = load_file(tmp_path / "ours")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype
    assert struct.unpack("<Q", (tmp_path / "ours").read_bytes()[:8])[0] % 8 == 0
    floats = {name: tensors[name].contiguous() for name in ("a", "b", "c")}
    save_file(floats, tmp_path / "theirs", {"format": "pt"})
    write_safetensors(tmp_path / "ours", [e for e in entries if e[0] in floats], {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_safetensors(tmp_path / "none", [])
    assert load_file(tmp_path / "none") == {}


@pytest.mark.parametrize("n", range(8))
def test_a_header_of_any_length_is_the_library_s(n, tmp_path):
    """Spaces fill it up to 8 bytes, and none where it has them."""
    name = "x" * (n + 1)
    write_safetensors(tmp_path / "ours", [(name, (2,), torch.float32, lambda: torch.ones(2))], {"format": "pt"})
    save_file({name: torch.ones(2)}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_write_safetensors_checks_what_it_is_given(tmp_path):
    with pytest.raises(ValueError, match="as announced"):
        write_safetensors(tmp_path / "x", [("a", (2,), torch.float32, lambda: torch.zeros(3))])
    with pytest.raises(ValueError, match="as announced"):
        write_safetensors(tmp_path / "x", [("a", (3,), torch.bfloat16, lambda: torch.zeros(3))])
    with pytest.raises(ValueError, match="two tensors named 'a'"):
        write_safetensors(tmp_path / "x", [("a", (1,), torch.float32, lambda: torch.zeros(1))] * 2)


WRITERS = pytest.mark.parametrize("write", [write_safetensors, write_pth])


@WRITERS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_that_is_none_is_written(write, value, tmp_path):
    with pytest.raises(NotFiniteError, match="b holds NaN or an infinity as float32"):
        write(tmp_path / "x", [("b", (3,), torch.float32, lambda: torch.tensor([1.0, value, 2.0]))])


@WRITERS
def test_a_file_is_on_the_disk_when_it_is_written(write, tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def record(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_size))
        real(handle)

    monkeypatch.setattr(os, "fsync", record)
    path = tmp_path / "x"
    write(path, [(name, (1000,), torch.float32, lambda: torch.ones(1000)) for name in "ab"])
    assert synced == [(str(path), path.stat().st_size)]


def test_each_record_of_a_pth_can_be_mapped(tmp_path):
    write_pth(tmp_path / "x", [(name, (n,), torch.bfloat16, lambda n=n: torch.ones(n)[:n].bfloat16())
                               for name, n in (("a", 1), ("a longer name", 70), ("c", 3))])  # fmt: skip
    raw = (tmp_path / "x").read_bytes()
    with zipfile.ZipFile(tmp_path / "x") as archive:
        for info in archive.infolist():
            name, extra = struct.unpack_from("<HH", raw, info.header_offset + 26)
            assert (info.header_offset + 30 + name + extra) % 64 == 0, info.filename


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.zeros(2)], "m.pth: holds a list, wanted a dict of tensors"),
        ({"model": {"w": torch.zeros(2)}}, "m.pth: 'model' is no plain tensor; wanted a flat dict of tensors"),
        ({"w": torch.zeros(2), "step": 3}, "m.pth: 'step' is no plain tensor"),
        ({"w": torch.eye(3).to_sparse()}, "m.pth: 'w' is no plain tensor"),
        ({"w": torch.empty(2, device="meta")}, "m.pth: 'w' is no plain tensor"),
    ],
)
def test_what_is_no_flat_dict_of_tensors_is_told(content, told, tmp_path):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(DataError, match=re.escape(told)):
        open_pth(tmp_path / "m.pth")


@pytest.mark.parametrize(("more", "claims"), [(0, False), (1, True), (8, True), (10**12, True)])
def test_a_header_that_claims_more_than_the_file_holds_is_told_before_it_is_read(more, claims, tmp_path):
    (tmp_path / "a.safetensors").write_bytes((32 + more).to_bytes(8, "little") + b"{" * 32)
    told = rf"a\.safetensors: 40 bytes, of which the header claims {32 + more}; truncated or corrupt"
    with pytest.raises(DataError, match=told if claims else "not a sound safetensors file"):
        open_safetensors(tmp_path / "a.safetensors")
