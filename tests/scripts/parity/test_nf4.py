"""NF4 beside bitsandbytes: a stand-in answers with our own reference's digests, or with a wrong one."""

import json
from types import SimpleNamespace

import pytest
import torch

import kernels
from scripts.parity import nf4
from scripts.parity.nf4 import PARTS, compare, digest, measure, random_tensors


class Peer:
    """bitsandbytes, whose digest of one part may be another, and which takes 3 s and 5 s."""

    def __init__(self, wrong=None, shape_matters=()):
        self.wrong, self.shape_matters, self.seen = wrong, shape_matters, 0
        self.process = SimpleNamespace(terminate=lambda: None)

    def ask(self, command, tensor):
        if command == "measure":
            return [3.0, 5.0]
        q = kernels.quantise_nf4(tensor, "ref")
        numbers = [kernels.dequantise_nf4(q, dtype, impl="ref") for dtype in (torch.float32, torch.bfloat16)]
        digests = [digest(t) for t in (*q.tensors, *numbers)]
        if self.wrong is not None:
            digests[PARTS.index(self.wrong)] = "other"
        self.seen += 1
        return {"digests": digests, "shape matters": self.seen - 1 in self.shape_matters}


TENSORS = [("a", torch.randn(5, 66)), ("b", torch.randn(64).bfloat16())]


@pytest.mark.parametrize("wrong", [None, *PARTS])
def test_each_part_is_compared_of_the_reference_and_of_what_is_used(wrong):
    found = compare(Peer(wrong, shape_matters=(1,)), iter(TENSORS))
    assert found["tensors"] == 2 and found["numbers"] == 5 * 66 + 64 and found["shape_matters"] == ["b"]
    assert found["different"] == {part: 4 * (part == wrong) for part in PARTS}  # two tensors, twice


@pytest.mark.parametrize("impl", ["ref", "auto"])
def test_an_implementation_with_bits_of_its_own_is_told(impl, monkeypatch):
    real = kernels.quantise_nf4
    monkeypatch.setattr(kernels, "quantise_nf4", lambda w, used: real(w * (1 + (used == impl)), used))
    assert compare_with(real) > 0


def compare_with(real):
    """Return how many parts differ from a peer that does not see what has been set for ours."""
    q = real(TENSORS[1][1], "ref")
    numbers = [kernels.dequantise_nf4(q, dtype, impl="ref") for dtype in (torch.float32, torch.bfloat16)]
    answer = {"digests": [digest(t) for t in (*q.tensors, *numbers)], "shape matters": False}
    found = compare(SimpleNamespace(ask=lambda *_: answer), iter(TENSORS[1:]))
    return sum(found["different"].values())


def test_random_tensors_have_every_shape_and_type(monkeypatch):
    monkeypatch.setattr(nf4, "SHAPES", ((1,), (65,), (5, 66)))
    names = [name for name, _ in random_tensors()]
    assert len(names) == len(set(names))
    for shape in nf4.SHAPES:
        assert {name.split()[-2] for name in names if name.startswith(f"{shape} ")} == set(nf4.DTYPES)


def test_seconds_are_of_a_billion_numbers(monkeypatch):
    monkeypatch.setattr(nf4, "TIMED", (64, 64))
    found = measure(Peer(), rounds=2)
    for name, seconds in (("quantise, bitsandbytes", 3.0), ("dequantise, bitsandbytes", 5.0)):
        assert found[name]["median"] == pytest.approx(seconds * 1e9 / 4096)
    assert len(found) == 7


@pytest.mark.parametrize("wrong_in", [None, "random", "smollm2-135m"])
def test_bits_that_differ_in_either_set_make_the_exit_code(wrong_in, monkeypatch, tmp_path, call_main):
    def found(peer, tensors):
        differs = {"random": "random", "model": "smollm2-135m"}[tensors] == wrong_in
        return {"tensors": 1, "numbers": 1, "different": {"codes": int(differs)}, "shape_matters": []}

    monkeypatch.setattr(nf4, "TIMED", (64, 64))
    monkeypatch.setattr(nf4, "Peer", lambda *_: Peer())
    monkeypatch.setattr(nf4, "make_environment", lambda *_: (tmp_path, {"bitsandbytes": "1"}))
    monkeypatch.setattr(nf4, "random_tensors", lambda: "random")
    monkeypatch.setattr(nf4, "model_tensors", lambda: "model")
    monkeypatch.setattr(nf4, "compare", found)
    assert call_main(nf4, "--json", tmp_path / "x.json", "--rounds", 1) == (wrong_in is not None)
    bits = json.loads((tmp_path / "x.json").read_text())["bits_a_number"]
    assert 4 < bits < 5
