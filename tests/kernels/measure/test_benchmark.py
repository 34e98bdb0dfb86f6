"""One run of the microbenchmarks: what it refuses to time, whom it names as absent, and when it stops."""

import dataclasses
import json

import pytest
import torch

from kernels.measure import benchmark, results
from kernels.measure import cases as bench_cases
from kernels.measure import peers as bench_peers
from kernels.measure.benchmark import Benchmark

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="toy sizes, for the interpreter")


@pytest.fixture
def run():
    return Benchmark(repeats=1, dtype=torch.float32)


def records(run, **wanted):
    return [r for r in run.result["records"] if all(r.get(k) == v for k, v in wanted.items())]


BROKEN = {
    "output 0": lambda case: lambda i, impl: case.reference(i) * 1.0001,
    "dx": lambda case: lambda i, impl: Twisted.apply(case.reference(i), i.x),
    "dweight is None": lambda case: lambda i, impl: case.reference(detached(i)),
    "nan": lambda case: lambda i, impl: case.reference(i) * float("nan"),
}


class Twisted(torch.autograd.Function):
    """Right forward, a gradient of x that is a little off."""

    @staticmethod
    def forward(ctx, y, x):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, dy * 1e-3


def detached(inputs):
    return type(inputs)(**{**vars(inputs), "weight": inputs.weight.detach()})


@interpreted
@pytest.mark.parametrize("said", BROKEN)
def test_a_wrong_result_has_no_time(run, said):
    case = bench_cases.rms_norm_case(4, 16)
    run.run_case(dataclasses.replace(case, ours=BROKEN[said](case)), peers=False)
    (ours,) = records(run, who="ours")
    assert said in ours["wrong"] and "ms" not in ours
    assert len(records(run, who="torch eager")) == 3  # the others are timed all the same


@interpreted
def test_a_right_result_is_timed_and_in_place_ops_are_checked(run):
    run.run_case(bench_cases.rope_case(8, 2, 1, 16))
    assert not [r for r in run.result["records"] if "wrong" in r or "failed" in r]
    for who in ("ours", "ours, in place", "torch eager"):
        assert [r["pass"] for r in records(run, who=who)] == ["fwd", "bwd", "fwd+bwd"]
    assert records(run, who="ours")[0]["error_over_torch"] <= 2


@interpreted
def test_one_contenders_trouble_is_not_anothers(run):
    case = bench_cases.swiglu_case(4, 8)

    def broken(i, impl):
        raise RuntimeError("out of luck\nand more")

    run.run_case(dataclasses.replace(case, ours=broken), peers=False)
    assert records(run, who="ours")[0]["failed"] == "RuntimeError: out of luck"
    assert records(run, who="torch eager", **{"pass": "bwd"})

    def poisoned(i, impl):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="CUDA error"):  # the process can measure no more
        run.run_case(dataclasses.replace(case, ours=poisoned), peers=False)
    assert "illegal memory access" in run.result["records"][-1]["failed"]


@interpreted
def test_ratios_compare_the_contenders_of_one_case(run, monkeypatch):
    """Of two sizes of one op, whose clock tells other times."""
    for n, ours in ((4, 2.0), (8, 32.0)):
        ms = iter((ours, 3 * ours))
        monkeypatch.setattr(benchmark, "time_passes", lambda *_, ms=ms: {"fwd": [next(ms)]})
        run.run_case(bench_cases.swiglu_case(n, 8), peers=False)
    assert [(r["who"], r["times_ours"]) for r in run.result["records"]] == 2 * [("ours", 1.0), ("torch eager", 3.0)]


@pytest.mark.parametrize("passes", [("fwd", "bwd", "fwd+bwd"), ("fwd", "fwd+bwd")])
def test_both_passes_take_the_sum_of_each_repetition(passes, monkeypatch):
    """Of the passes that are of the case. A contender without a backward, or leaves, has a forward alone."""
    asked, case = [], dataclasses.replace(bench_cases.swiglu_case(4, 8), passes=passes)
    x = torch.tensor([3.0], requires_grad=True)

    def time_steps(sets, repeats, flush):
        asked.append((repeats, flush))
        outs = [steps[0](None) for steps in sets]
        grads = [steps[1](out) for steps, out in zip(sets, outs, strict=True) if len(steps) > 1]
        assert grads in ([], [(torch.tensor([24.0]),)], [["made by hand"]])
        return [[1.0, 2.0], [3.0, 5.0]][: len(sets[0])]

    monkeypatch.setattr(benchmark, "time_steps", time_steps)
    ready = bench_peers.Ready(lambda: x * x, (x,), (torch.tensor([4.0]),))
    by_hand = bench_peers.Ready(lambda: x * x, back=lambda: ["made by hand"])
    both = {"fwd": [1.0, 2.0], "bwd": [3.0, 5.0], "fwd+bwd": [4.0, 7.0]}
    for one in (ready, by_hand):
        assert benchmark.time_passes(case, [one], 7, len) == {name: both[name] for name in passes}
    alone = bench_peers.Ready(lambda: x.detach())
    assert benchmark.time_passes(case, [alone, alone], 7, len) == {"fwd": [1.0, 2.0]}
    assert asked == [(7, len)] * 3


def test_absent_peers_are_named(run, monkeypatch):
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None)
    run.run_case(bench_cases.swiglu_case(4, 8))
    reasons = {r["who"]: r["reason"] for r in run.result["absent"]}
    assert reasons["liger-kernel"] == reasons["liger-kernel merged"] == "liger_kernel is not installed"
    assert "swiglu: without liger-kernel: liger_kernel is not installed" in results.format_summary(run.result)


@pytest.mark.parametrize("minutes", [1e-9, 0.0, -1.0])  # 0 is what a report of several parts may have left
def test_nothing_begins_after_the_time(minutes, tmp_path):
    run = Benchmark(tmp_path / "b.json", minutes=minutes, repeats=1)
    run.run_case(bench_cases.swiglu_case(4, 8))
    assert json.loads((tmp_path / "b.json").read_text())["left_out"] == ["swiglu T=4 F=8"]
    assert not run.result["records"] and "left out for time: swiglu T=4 F=8" in results.format_summary(run.result)
