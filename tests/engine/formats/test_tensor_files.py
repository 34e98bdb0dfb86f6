"""Safetensors files as the library writes them."""

import hashlib
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.formats.tensor_files import write_safetensors


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


def test_write_safetensors_checks_what_it_is_given(tmp_path):
    with pytest.raises(ValueError, match="as announced"):
        write_safetensors(tmp_path / "x", [("a", (2,), torch.float32, lambda: torch.zeros(3))])
    with pytest.raises(ValueError, match="two tensors named 'a'"):
        write_safetensors(tmp_path / "x", [("a", (1,), torch.float32, lambda: torch.zeros(1))] * 2)
