"""The check of a contender's outputs and gradients."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kernels.measure import cases as bench_cases
from kernels.measure import truth as bench_truth
from kernels.measure.peers import Ready


def test_the_allowance_is_twice_torchs_error():
    case = bench_cases.rms_norm_case(4, 64)
    inputs = case.inputs("cpu", torch.float16)
    truth = bench_truth.Truth(case, inputs, (torch.randn(4, 64, dtype=torch.float16),), torch.float16)
    off = [t + f * e for t, e, f in zip(truth.found, truth.errors, (1.9, 1.9, 1.9), strict=True)]
    assert truth.check(off)[1] == [] and all(truth.errors)
    assert truth.check(truth.found) == (0, [])
    worst = max(1.9 * e / max(e, f) for e, f in zip(truth.errors, truth.floors, strict=True))
    assert truth.check(off)[0] == pytest.approx(worst, rel=0.02)
    assert truth.check([off[0][:2], *off[1:]])[1] == ["output 0 is (2, 64), wanted (4, 64)"]
    off[1] = truth.found[1] + 2.1 * truth.errors[1]
    assert len(truth.check(off)[1]) == 1 and truth.check(off)[1][0].startswith("dx is off")


@pytest.mark.parametrize(
    ("dtype", "wide", "truths"),
    [(torch.float32, None, torch.float64), (torch.bfloat16, None, torch.float32),
     (torch.float32, torch.float32, torch.float32), (torch.float16, torch.float64, torch.float64)],
)  # fmt: skip
def test_a_truth_is_computed_in_a_wider_dtype(dtype, wide, truths):
    """Of inputs and gradients alike; a case's own truth is given the inputs as they are."""
    given = []
    case = bench_cases.swiglu_case(4, 8)
    inputs, upstream = case.inputs("cpu", dtype), (torch.randn(4, 8).to(dtype),)
    found = bench_truth.Truth(case, inputs, upstream, dtype, wide).found
    assert [t.dtype for t in found] == [truths] * 2
    leaf = inputs.gate_up.to(truths).requires_grad_()
    y = torch.nn.functional.silu(leaf[:, :8]) * leaf[:, 8:]
    (dx,) = torch.autograd.grad(y, leaf, upstream[0].to(truths))
    assert torch.allclose(found[0], y, rtol=1e-6) and torch.allclose(found[1], dx, rtol=1e-5, atol=1e-6)
    own = dataclasses.replace(case, truth=lambda i: given.append(i.gate_up.dtype) or (i.gate_up.double() * 2)[:, :8])
    truth = bench_truth.Truth(own, inputs, (upstream[0],), dtype, torch.float64)
    assert given == [dtype] and torch.equal(truth.found[0], inputs.gate_up.double()[:, :8] * 2)
    assert truth.names == ["output 0", "dgate_up"]


def test_errors_are_measured_beside_torchs_or_a_floor():
    """Of a millionth of the largest number, where torch is exact; integers are compared as numbers."""
    case = bench_cases.grad_norm_case([(4,)], "")
    truth = bench_truth.Truth(case, case.inputs("cpu", torch.float32), (torch.ones(()),), torch.float32)
    truth.names, truth.found = (
        ["a", "b", "c"],
        [torch.tensor([2.0, -8.0]).double(), torch.tensor([5, 7]), torch.zeros(0)],
    )
    truth.errors, truth.floors = [0.0, 0.5, 0.0], [8e-6, 0.0, 0.0]
    assert truth.check([torch.tensor([2.0, -8.0]), torch.tensor([5, 8]), torch.zeros(0)]) == (2.0, [])
    ratio, said = truth.check([torch.tensor([2.0, -8.00002]), torch.tensor([5, 9]), torch.zeros(0)])
    assert ratio == 4.0 and said == ["a is off by 2e-05, torch by 0", "b is off by 2, torch by 0.5"]
    assert truth.check([torch.tensor([2.0, torch.nan]), torch.tensor([5, 7]), None])[1] == [
        "a is off by nan, torch by 0", "c is None, wanted (0,)",
    ]  # fmt: skip
    floors = bench_truth.Truth(
        case, SimpleNamespace(grads=[torch.tensor([3.0, 4.0])]), (torch.ones(()),), torch.float32
    )
    assert floors.floors == pytest.approx([5e-6]) and len(floors.errors) == 1


def test_a_reference_without_a_gradient_is_refused():
    case = bench_cases.norm_linear_case(2, 8, 16)
    cut = dataclasses.replace(case, reference=lambda i: i.x @ i.weight.T)
    with pytest.raises(ValueError, match="the reference makes no gradient for result 2"):
        bench_truth.Truth(cut, case.inputs("cpu", torch.float32), (torch.randn(2, 16),), torch.float32)


def test_copies_share_nothing():
    """Lists and dicts of tensors too; a cache starts empty, and what is no tensor stays."""
    case = dataclasses.replace(bench_cases.swiglu_case(2, 4), grads=("x",))
    inputs = SimpleNamespace(x=torch.ones(2), n=7, cache={"plan": 1}, grads=[torch.ones(3), torch.arange(2)],
                             state={"m": torch.ones(4)}, none=None)  # fmt: skip
    for dtype, wide in ((None, torch.float32), (torch.float64, torch.float64)):
        copied = bench_truth.copy_as_leaves(case, inputs, dtype)
        tensors = [(copied.x, inputs.x), (copied.grads[0], inputs.grads[0]), (copied.state["m"], inputs.state["m"])]
        for a, b in tensors:
            assert a.dtype == wide and torch.equal(a, b.to(wide)) and a.data_ptr() != b.data_ptr()
        assert copied.grads[1].dtype == torch.int64 and copied.grads[1].data_ptr() != inputs.grads[1].data_ptr()
        assert copied.x.requires_grad and not copied.grads[0].requires_grad and not inputs.x.requires_grad
        assert copied.cache == {} and copied.n == 7 and copied.none is None and inputs.cache == {"plan": 1}


def test_one_run_gives_outputs_and_gradients_in_the_cases_layout():
    x, unused = torch.ones(2, 3, requires_grad=True), torch.ones(1, requires_grad=True)
    ready = Ready(lambda: {"y": x * 2}, (x, unused), (torch.full((2, 3), 5.0),), results=lambda out: out["y"],
                  canonical=lambda t: t.T)  # fmt: skip
    y, dx, none = bench_truth.run_once(ready)
    assert torch.equal(y, torch.full((3, 2), 2.0)) and torch.equal(dx, torch.full((3, 2), 10.0)) and none is None
    assert not y.requires_grad
    by_hand = Ready(lambda: (x, x + 1), (x,), back=lambda: [x * 3])
    a, b, c = bench_truth.run_once(by_hand)
    assert torch.equal(b, x + 1) and torch.equal(c, x * 3) and a.data_ptr() != x.data_ptr()
    assert len(bench_truth.run_once(Ready(lambda: x))) == 1
