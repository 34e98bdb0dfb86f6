"""Our own CUDA C++ beside the Triton kernels: it is given the case's numbers, and says why it takes no part."""

import pytest
import torch

from kernels.measure import cases, cuda_peers
from kernels.measure.peers import Absent
from kernels.measure.truth import copy_as_leaves
from kernels.native.library import NativeError
from kernels.ops import adamw_many, attention, grad_norm
from tests.helpers.run import worst

CASES = {
    "adamw": cases.adamw_case((4, 1088), "split", "8bit"),
    "attention": cases.attention_case("", [(0, 3, 0, 0), (3, 8, 0, 3)], 8, 2, 1, 64),
    "grad_norm": cases.grad_norm_case([(3, 5), (7,)], ""),
}


@pytest.fixture
def by_the_reference(monkeypatch):
    """Let csrc/cuda be there, and the references compute what it would."""
    plans = []

    def plan(documents, n_rows, head_dim, device, impl):
        plans.append((n_rows, head_dim, impl))
        return documents

    def checked(real, at):
        def run(*args, **named):
            given = named.pop("impl", None) or args[at]
            assert given == "cuda"
            return real(*args[:at], "ref", **named) if len(args) > at else real(*args, impl="ref", **named)

        return run

    monkeypatch.setattr(cuda_peers, "require_cuda", lambda what: None)
    monkeypatch.setattr(cuda_peers, "load_cuda", lambda: None)
    monkeypatch.setattr(cuda_peers, "attention_plan", plan)
    monkeypatch.setattr(cuda_peers, "attention", checked(attention.attention, 4))
    monkeypatch.setattr(cuda_peers, "grad_norm", checked(grad_norm.grad_norm, 1))
    monkeypatch.setattr(cuda_peers, "adamw_many", checked(adamw_many.adamw_many, 9))
    return plans


@pytest.mark.parametrize("op", CASES)
def test_it_computes_the_case(op, by_the_reference):
    case, (prepare,) = CASES[op], cuda_peers.CUDA_PEERS[op].values()
    dtype = torch.bfloat16 if op == "attention" else torch.float32
    inputs = case.inputs("cpu", dtype)
    theirs, ours = copy_as_leaves(case, inputs), copy_as_leaves(case, inputs)
    want = case.results(theirs, case.reference(theirs))
    ready = prepare(case, ours, ())
    found = ready.results(ready.run())
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, want)), strict=True):
        assert a.dtype == b.dtype and worst(a.double() - b.double()) == 0
    if op == "attention":
        ready.run()
        assert by_the_reference == [(8, 64, "cuda")]  # planned once


def test_what_keeps_it_out_is_said(monkeypatch):
    def missing():
        raise NativeError("csrc/cuda is not built")

    def reason(op, dtype=torch.bfloat16):
        (prepare,) = cuda_peers.CUDA_PEERS[op].values()
        with pytest.raises(Absent) as absent:
            prepare(CASES[op], CASES[op].inputs("cpu", dtype), ())
        return str(absent.value)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {reason(op) for op in CASES} == {"csrc/cuda runs on CUDA alone"}
    assert "impl='cuda' takes bf16 and fp16, q is torch.float32" in reason("attention", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_peers, "load_cuda", missing)
    assert {reason(op) for op in CASES} == {"csrc/cuda is not built"}
