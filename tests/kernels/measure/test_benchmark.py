"""One run of the microbenchmarks: what it refuses to time, whom it names as absent, and when it stops."""

import dataclasses
import json
from types import SimpleNamespace

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


# ---- a run from its start to its file -------------------------------------------------------------------------------


def test_a_run_as_it_is_written_and_printed(tmp_path, monkeypatch, capsys, snapshot):
    """With a clock of its own: forward takes 2 ms, backward 3, one more for each contender before it."""
    ticks = []

    def time_steps(sets, repeats, flush):
        ticks.append((len(sets), repeats))
        slow = len(ticks) + 1.0
        return [[slow, slow + 0.5, slow + 1.0], [slow + 1, slow + 2, slow + 4]][: len(sets[0])]

    package = SimpleNamespace(LigerSiLUMulFunction=None, LigerFusedGateUpSiLUMulFunction=None)
    for name, apply in (("LigerSiLUMulFunction", lambda gate, up: gate.sigmoid() * gate * up),
                        ("LigerFusedGateUpSiLUMulFunction", lambda x: x[:, : x.shape[1] // 2])):  # fmt: skip
        setattr(package, name, SimpleNamespace(apply=apply))
    monkeypatch.setattr(benchmark, "IMPL", "triton")
    monkeypatch.setattr(benchmark, "GPU", False)
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "time_steps", time_steps)
    monkeypatch.setattr(benchmark, "describe_machine", lambda: {"device": "CPU"})
    monkeypatch.setattr(benchmark, "measure_peak_rates", lambda *_: {"copy_gb_per_s": 0.001, "gemm_tflops": 0.00001})
    monkeypatch.setattr(benchmark, "count_input_sets", lambda n, times_l2, most: 2 + n // 10**9)
    monkeypatch.setattr(bench_peers, "import_peer", lambda *names: package)
    freed = []
    monkeypatch.setattr(benchmark, "free_memory", lambda: freed.append(1))
    run = Benchmark(tmp_path / "b.json", repeats=3)
    cases = [
        bench_cases.swiglu_case(4, 8, main=True),
        dataclasses.replace(bench_cases.norm_linear_case(2, 8, 16), passes=("fwd+bwd",)),
        bench_cases.adamw_case((1, 4), "split", "fp32"),
    ]  # fmt: skip
    for case in cases:
        run.run_case(dataclasses.replace(case, ours=lambda i, impl, case=case: case.ours(i, "ref")))
    assert ticks and set(ticks) == {(2, 3)}
    assert len(freed) == sum(len(benchmark._contenders(case, True)) for case in cases)
    result = json.loads((tmp_path / "b.json").read_text())
    assert result == run.result
    for record in result["records"]:
        if record.get("error_over_torch") is not None:
            assert 0 <= record["error_over_torch"] <= 2 and record["who"] != "torch eager"
            record["error_over_torch"] = "of its result"
        record["wrong"] = "wrong" in record
    assert "\n".join(map(json.dumps, [*result.pop("records"), result])) + "\n" == snapshot(name="file")
    printed = [line.partition("WRONG RESULT")[0] for line in capsys.readouterr().out.splitlines()]
    assert "\n".join(printed) + "\n" == snapshot(name="printed")


def test_contenders_are_ours_torchs_and_where_asked_the_others(monkeypatch):
    case, named = bench_cases.rope_case(8, 2, 1, 16), dataclasses.replace(bench_cases.rope_case(8, 2, 1, 16), op="none")
    attention = dataclasses.replace(case, op="attention")
    for impl, first in (("triton", ["ours", "torch eager"]), ("ref", ["torch eager"])):
        monkeypatch.setattr(benchmark, "IMPL", impl)
        assert list(benchmark._contenders(case, False)) == list(benchmark._contenders(named, True)) == first
        assert list(benchmark._contenders(case, True)) == [*first, *bench_peers.PEERS["rope"]]
        others = [*benchmark.CUDA_PEERS["attention"], *bench_peers.PEERS["attention"]]
        assert list(benchmark._contenders(attention, True)) == [*first, *others]


def test_bytes_of_inputs_are_those_of_every_tensor():
    """In lists and dicts too; what is no tensor has none."""
    inputs = {"x": torch.zeros(3), "grads": [torch.zeros(2, dtype=torch.int8)] * 2, "cache": {"m": torch.zeros(1)}}
    assert benchmark._count_bytes(inputs | {"n": 7, "none": None}) == 12 + 4 + 4


def test_a_run_knows_its_flags(monkeypatch, tmp_path):
    """bf16 on a GPU, fp32 elsewhere; the ceilings are measured as the records are."""
    asked = []
    monkeypatch.setattr(benchmark, "measure_peak_rates", lambda *args: asked.append(args) or {})
    monkeypatch.setattr(benchmark, "make_l2_flush", lambda: len)
    monkeypatch.setattr(benchmark, "describe_machine", lambda: {"device": "x"})
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: 1000.0)
    for gpu, given, dtype in ((True, None, "bfloat16"), (False, None, "float32"), (True, torch.float16, "float16")):
        monkeypatch.setattr(benchmark, "GPU", gpu)
        run = Benchmark(tmp_path / "b.json", 2.5, 7, given, is_toy=gpu)
        assert run.result == {
            "what": "kernels.bench", "machine": {"device": "x"}, "dtype": dtype, "is_toy": gpu, "records": [],
            "absent": [], "left_out": [], "ceilings": {},
        } == json.loads((tmp_path / "b.json").read_text())  # fmt: skip
        assert str(run.dtype) == f"torch.{dtype}" and run.deadline == 1150.0 and not run.is_late()
    assert asked == [(7, len)] * 3 and run.flush is len
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: 1150.5)
    assert run.is_late() and Benchmark().deadline == float("inf") and Benchmark().repeats == 20


def test_a_contender_that_time_leaves_out_is_named(run, monkeypatch):
    answers = iter((False, False, True, True))
    monkeypatch.setattr(run, "is_late", lambda: next(answers))
    monkeypatch.setattr(benchmark, "IMPL", "ref")
    monkeypatch.setattr(benchmark, "PEERS", {"swiglu": {"a": None, "b": None}})
    monkeypatch.setattr(benchmark, "CUDA_PEERS", {})
    run.run_case(bench_cases.swiglu_case(4, 8))
    assert run.result["left_out"] == ["swiglu T=4 F=8: a", "swiglu T=4 F=8: b"]
    assert {r["who"] for r in run.result["records"]} == {"torch eager"}


def test_inputs_that_cannot_be_made_are_a_failure_of_the_case(run):
    def inputs(device, dtype):
        raise ValueError("x" * 400)

    run.run_case(dataclasses.replace(bench_cases.swiglu_case(4, 8), inputs=inputs))
    assert run.result["records"] == [
        {"op": "swiglu", "shape": "T=4 F=8", "who": "inputs and reference", "failed": f"ValueError: {'x' * 300}"}
    ]


def test_a_case_is_run_on_the_same_random_numbers_each_time(run, monkeypatch):
    """Inputs and gradients are of one seed, and the gradients are normal numbers."""
    given = []

    class Noting:
        def __init__(self, case, inputs, upstream, dtype):
            given.append((inputs.gate_up, upstream[0], dtype))

    monkeypatch.setattr(benchmark, "Truth", Noting)
    monkeypatch.setattr(benchmark, "_contenders", lambda case, peers: {})
    for _ in range(2):
        torch.rand(3)
        run.run_case(bench_cases.swiglu_case(64, 8))
    (x, dy, dtype), (again, dy_again, _) = given
    assert torch.equal(x, again) and torch.equal(dy, dy_again) and dtype == torch.float32
    assert 0.85 < dy.std() < 1.15 and dy.shape == (64, 8) and dy.unique().numel() > 500
