"""NF4 beside bitsandbytes: a stand-in answers with our own reference's digests, or with a wrong one."""

import io
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import kernels
from scripts.parity import nf4
from scripts.parity.nf4 import PARTS, compare, digest, measure, random_tensors
from tests.helpers.calls import Calls
from tests.helpers.clocks import Ticks


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


def test_a_process_of_another_environment_answers_lines(monkeypatch, tmp_path):
    """It is told of tensors by a file; what it computes with is not what we have on our path."""
    started = []

    def start(command, **how):
        started.append((command, how))
        out = io.StringIO('"ready"\n{"a": 1}\n')
        return SimpleNamespace(stdin=io.StringIO(), stdout=out, wait=lambda: 9)

    monkeypatch.setattr(nf4.subprocess, "Popen", start)
    peer = nf4.Peer(Path("bin/python"), tmp_path)
    tensor = torch.randn(3)
    assert peer.ask("answer", tensor) == {"a": 1} and torch.equal(torch.load(tmp_path / "tensor.pt"), tensor)
    assert peer.process.stdin.getvalue() == json.dumps(["answer", str(tmp_path / "tensor.pt")]) + "\n"
    with pytest.raises(RuntimeError, match="bitsandbytes' process ended with code 9; its error is above"):
        peer.read()
    ((command, how),) = started
    settings = ["-u", "PYTHONPATH", "OMP_NUM_THREADS=1", "TORCH_COMPILE_DISABLE=1"]
    assert command == ["env", *settings, "bin/python", "-c", nf4.PEER]
    assert how == {"stdin": -1, "stdout": -1, "text": True, "cwd": tmp_path}


def test_what_the_other_process_does(monkeypatch, tmp_path, capsys):
    """Its program, over a stand-in for bitsandbytes: digests of all parts, and the least seconds without the first."""
    functional, package = ModuleType("functional"), ModuleType("bitsandbytes")
    calls, now = Calls(), iter([0.0, 50.0, 90.0, 100.0, 104.0, 105.0, 110.0, 112.0, 115.0])
    state = SimpleNamespace(absmax="absmax", state2=SimpleNamespace(absmax="absmax2"), offset="offset", label="state")

    def dequantise(codes, state):
        return f"{tuple(state.shape)} {state.dtype}"

    functional.quantize_4bit = calls.stand_in("quantize_4bit", ("codes", state))
    functional.dequantize_4bit = dequantise
    package.functional = functional
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setattr(time, "process_time", lambda: next(now))
    monkeypatch.setattr(torch, "set_num_threads", calls.stand_in("threads"))
    torch.save(torch.zeros(2, 3), tmp_path / "w.pt")
    asked = [json.dumps([command, str(tmp_path / "w.pt")]) for command in ("answer", "measure")]
    monkeypatch.setattr(sys, "stdin", asked[:1])
    program = compile(nf4.PEER, "peer", "exec")
    names = {}
    with pytest.raises(AttributeError):  # texts have no bytes of numbers
        exec(program, names)
    digest_of = names["digest"]
    assert digest_of(torch.arange(5)) == nf4.digest(torch.arange(5))
    text = nf4.PEER.replace("def digest(t):", "def digest(t):\n    return str(t)\n\ndef real(t):")
    monkeypatch.setattr(sys, "stdin", asked)
    capsys.readouterr()
    calls.lines.clear()
    exec(compile(text, "peer", "exec"), {})
    ready, answer, seconds = map(json.loads, capsys.readouterr().out.splitlines())
    flat = ["(6,) torch.float32", "(6,) torch.bfloat16"]
    assert ready == "ready" and answer == {
        "digests": ["codes", "absmax", "absmax2", "offset", *flat], "shape matters": True
    }  # fmt: skip
    assert seconds == [2.0, 1.0]
    how = "blocksize=64, compress_statistics=True, quant_type='nf4'"
    assert calls.lines == ["threads(1)", *[f"quantize_4bit(float32[2, 3], {how})"] * 4]


def test_matrices_of_the_model_alone_are_read_in_bf16(monkeypatch):
    piece = lambda *shape: SimpleNamespace(shape=shape)  # noqa: E731
    pieces = {"norm": piece(3), "w": piece(2, 3), "not stored": piece(4, 4), "v": piece(1, 2)}
    source = SimpleNamespace(config="config", kind="kind", path="path", stored={"norm": 0, "w": 1, "v": 2})
    calls = Calls()
    monkeypatch.setattr(nf4, "find_model", calls.stand_in("find_model", "found"))
    monkeypatch.setattr(nf4, "open_source", calls.stand_in("open_source", source))
    monkeypatch.setattr(nf4, "list_pieces", calls.stand_in("list_pieces", pieces))
    read = lambda path, name, stored, piece, into: into.fill_(stored)  # noqa: E731
    monkeypatch.setattr(nf4, "read_piece", calls.stand_in("read_piece", read))
    found = {name: (t.dtype, t.tolist()) for name, t in nf4.model_tensors()}
    assert found == {"w": (torch.bfloat16, [[1] * 3] * 2), "v": (torch.bfloat16, [[2] * 2])}
    assert calls.lines == [
        "find_model('smollm2-135m')", "open_source('found')", "list_pieces('config', 'kind')",
        "read_piece('path', 'w', 1, namespace(shape=(2, 3)), bfloat16[2, 3])",
        "read_piece('path', 'v', 2, namespace(shape=(1, 2)), bfloat16[1, 2])",
    ]  # fmt: skip


def test_random_tensors_have_rows_of_many_sizes_and_blocks_of_zeros(monkeypatch):
    monkeypatch.setattr(nf4, "SHAPES", ((40, 64), (1000, 192)))
    found = dict(random_tensors())
    small = [name for name in found if name.startswith("(40, 64) ")]
    assert [name for name in found if name.startswith("(1000")] == [f"(1000, 192) {t} 0.02" for t in nf4.DTYPES]
    assert "(40, 64) fp16 30000.0" not in small or found["(40, 64) fp16 30000.0"].isfinite().all()
    assert {float(name.split()[-1]) for name in small if "fp32" in name} == set(nf4.SCALES)
    for name in small:
        weight, dtype = found[name], nf4.DTYPES[name.split()[-2]]
        assert weight.dtype == dtype and not weight.view(-1)[128:256].any() and weight.isfinite().all()
        if dtype == torch.float32:
            largest = weight.abs().amax(1) / float(name.split()[-1])
            assert largest.max() > 1 and largest[4:].min() < 0.5  # rows of their own size


def test_the_whole_comparison(monkeypatch, tell, snapshot):
    """A case of each side takes turns; the first of three calls warms up."""
    Ticks(monkeypatch, nf4)
    calls = Calls()
    peer = Peer()
    peer.process = calls.thing("process", terminate=None)
    monkeypatch.setattr(nf4, "TIMED", (64, 64))
    monkeypatch.setattr(nf4.tempfile, "TemporaryDirectory", calls.folder)
    monkeypatch.setattr(nf4, "Peer", calls.stand_in("Peer", peer))
    made = (Path("bin"), {"bitsandbytes": "0.50", "torch": "x"})
    monkeypatch.setattr(nf4, "make_environment", calls.stand_in("make_environment", made))
    monkeypatch.setattr(nf4, "PACKAGES", ("bitsandbytes",))
    monkeypatch.setattr(nf4, "random_tensors", lambda: iter(TENSORS))
    monkeypatch.setattr(nf4, "model_tensors", lambda: iter(TENSORS[:1]))
    monkeypatch.setattr(torch, "manual_seed", calls.stand_in("seed"))
    assert tell(nf4, "--rounds", 2) + "\n" + calls.text() == snapshot


def test_flags_have_defaults(defaults_of):
    assert defaults_of(nf4, "--json", "x") == {"json": "x", "rounds": 3}
