"""kernels.bench: its formulas by hand, what it refuses to time, and whom it names as absent."""

import dataclasses
import json
import os

import pytest
import torch

from kernels import bench
from kernels.measure import cases as bench_cases
from kernels.measure import peers as bench_peers
from kernels.measure import truth as bench_truth
from kernels.measure.cases import Work
from tests.helpers.run import command, worst

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="toy sizes, for the interpreter")
DOCUMENTS = [(0, 3, 0, 0), (3, 5, 0, 3)]  # the second sees the first whole


@pytest.fixture
def run():
    return bench.Bench(repeats=1, dtype=torch.float32)


def records(run, **wanted):
    return [r for r in run.result["records"] if all(r.get(k) == v for k, v in wanted.items())]


# ---- formulas -------------------------------------------------------------------------------------------------------


def test_attention_counts_what_a_query_sees():
    # 3 rows see 9/2 pairs; 2 rows see 2 * 3 of the prefix and 4/2 of their own. 4 FLOPs a pair, head and dimension.
    assert bench_cases.attention_flops(DOCUMENTS, n_heads=2, head_dim=8) == 4 * (4.5 + 6 + 2) * 2 * 8
    work = bench_cases.attention_work(DOCUMENTS, 5, 2, 1, 8)
    assert work["fwd"] == Work(800, 2 * 80 + 2 * 40)  # q, o; k, v
    assert work["bwd"] == Work(2000, 4 * 80 + 4 * 40)  # q, o, do, dq; k, v, dk, dv
    (case,) = [c for c in bench_cases.full() if c.shape == "dense s=4096 H=32 Dh=128"]
    assert case.work["fwd"].flops == 4 * 4 * 4096**2 / 2 * 32 * 128


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (bench_cases.rms_norm(3, 5), (0, 2 * 15 + 5, 0), (0, 3 * 15 + 10, 0)),
        (bench_cases.rms_norm(3, 5, residual=True), (0, 4 * 15 + 5, 0), (0, 4 * 15 + 10, 0)),
        (bench_cases.rope(3, 2, 1, 4), (0, 2 * 36, 48), (0, 2 * 36, 48)),
        (bench_cases.swiglu(3, 5), (0, 45, 0), (0, 75, 0)),
        (bench_cases.norm_linear(3, 5, 7), (210, 15 + 35 + 21, 0), (420, 30 + 70 + 21, 0)),
        # gate_up 30, weight 35, residual and output 21 each; dy 21, gate_up and its gradient 30 each, weight twice
        (bench_cases.swiglu_linear(3, 5, 7), (210, 30 + 35 + 42, 0), (420, 21 + 60 + 70, 0)),
        (bench_cases.linear_cross_entropy(3, 5, 7), (210, 15 + 35, 0), (420, 30 + 70, 0)),
    ],
    ids=lambda x: x.op if isinstance(x, bench_cases.Case) else "",
)
def test_work_by_hand(case, forward, backward):
    assert tuple(case.work["fwd"]) == forward and tuple(case.work["bwd"]) == backward


def test_bytes_a_parameter():
    assert bench_cases.grad_norm([(2, 3), (4,)], "").work["fwd"] == Work(0, 10)
    assert bench_cases.adamw((2, 3), "split", "fp32").work["fwd"].bytes == 26 * 6  # w, low, g, m, v; w, low, m, v
    assert bench_cases.adamw((2, 3), "split", "8bit").work["fwd"].bytes == pytest.approx(14.0625 * 6)
    assert bench_cases.adamw((2, 3), None, "fp32").work["fwd"].bytes == 28 * 6


def test_a_fraction_is_the_rooflines_time_over_the_measured():
    case = dataclasses.replace(
        bench_cases.swiglu(3, 5), work={"fwd": Work(4e9, 100), "bwd": Work(0, 3e6, 4e6)}
    )  # 4 GFLOP at 2 TFLOP/s: 2 ms. 10 MB at 5 GB/s: 2 ms.
    ceiling = {"gemm_tflops": 2.0, "copy_gb_per_s": 5.0}
    forward, backward, both = (bench.figures(case, kind, 8.0, ceiling, 2) for kind in ("fwd", "bwd", "fwd+bwd"))
    assert (forward["fraction"], backward["fraction"], both["fraction"]) == pytest.approx((0.25, 0.25, 0.5))
    assert (forward["bound"], backward["bound"]) == ("gemm", "copy")
    assert forward["tflops"] == pytest.approx(0.5) and backward["gb_per_s"] == pytest.approx(1.25)


def test_times_of_steps():
    def slow(value):
        torch.randn(200_000).sort()
        return value + 1

    seen = []
    first, second = bench.host_times([[lambda _: 1, slow, seen.append]], repeats=3, warmup=1)[:2]
    assert len(first) == 3 and min(second) > max(first) and seen == [2] * 4
    assert bench.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "ms": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 5.0, "repeats": 5,
    }  # fmt: skip


def test_ratios():
    rows = [{"who": who, "pass": "fwd", "ms": ms} for who, ms in (("ours", 2.0), ("bare GEMM", 1.6), ("torch", 5.0))]
    bench.compare([*rows, {"who": "broken", "wrong": "..."}])
    assert [r["times_ours"] for r in rows] == [1.0, 0.8, 2.5]
    assert rows[0]["times_gemm"] == 1.25


# ---- documents ------------------------------------------------------------------------------------------------------


def test_the_length_mix():
    rows = bench_cases.alpaca_rows(8192)
    lengths = [prompt + response for prompt, response, _ in rows]
    assert sum(lengths) == 8192 and max(lengths) <= 512 and len(rows) > 40
    documents, n_rows = bench_cases.unshared(rows)
    assert n_rows == 8192 and [end - start for start, end, *_ in documents] == lengths
    documents, n_rows = bench_cases.shared(rows)
    own = [d for d in documents if d[3] > d[2]]
    assert [e - s + pe - ps for s, e, ps, pe in own] == [
        n for n, (*_, prefix) in zip(lengths, rows, strict=True) if n > prefix
    ]
    assert documents[:2] == [(0, 29, 0, 0), (29, 68, 0, 0)] and n_rows % 64 == 0
    assert 8192 * 0.7 < n_rows < 8192 * 0.8  # a quarter of the tokens is shared


@pytest.mark.parametrize(
    ("layout", "heads", "kv_heads", "peers"),
    [
        ("unshared", 2, 2, ("SDPA flash", "SDPA nested", "FlexAttention")),
        ("unshared", 2, 1, ("SDPA flash", "FlexAttention")),
        ("shared", 2, 2, ("FlexAttention",)),
        ("equal", 2, 2, ("SDPA flash",)),
    ],
)
def test_peers_lay_attention_out_as_it_is(monkeypatch, layout, heads, kv_heads, peers):
    monkeypatch.setattr(bench_peers, "needs_cuda", lambda what: None)
    argument = (8, 24) if layout == "equal" else (bench_cases.alpaca_rows(400),)
    documents, n_rows = getattr(bench_cases, layout)(*argument)
    case = bench_cases.attention(
        "", documents, n_rows, heads, kv_heads, 16, packed=layout != "equal", prefix=layout == "shared"
    )
    assert len(documents) >= 3
    inputs = case.inputs("cpu", torch.float32)
    upstream = (torch.randn(n_rows, heads, 16),)
    for who in peers:
        ready = bench_peers.PEERS["attention"][who](case, inputs, upstream)
        for leaf, t in zip((*ready.leaves, *ready.upstream), (inputs.q, inputs.k, inputs.v, *upstream), strict=True):
            assert torch.equal(ready.canonical(leaf), t), who
        if who != "SDPA nested":  # which runs causally on CUDA alone
            for leaf in ready.leaves:
                leaf.requires_grad_(False)  # FlexAttention has no backward on a CPU
            assert worst(ready.canonical(ready.run()) - case.reference(inputs)) < 1e-5, who


# ---- what is not timed ----------------------------------------------------------------------------------------------


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
    case = bench_cases.rms_norm(4, 16)
    run.case(dataclasses.replace(case, ours=BROKEN[said](case)), peers=False)
    (ours,) = records(run, who="ours")
    assert said in ours["wrong"] and "ms" not in ours
    assert len(records(run, who="torch eager")) == 3  # the others are timed all the same


@interpreted
def test_a_right_result_is_timed_and_in_place_ops_are_checked(run):
    run.case(bench_cases.rope(8, 2, 1, 16))
    assert not [r for r in run.result["records"] if "wrong" in r or "failed" in r]
    for who in ("ours", "ours, in place", "torch eager"):
        assert [r["pass"] for r in records(run, who=who)] == ["fwd", "bwd", "fwd+bwd"]
    assert records(run, who="ours")[0]["error_over_torch"] <= 2


def test_the_allowance_is_twice_torchs_error():
    case = bench_cases.rms_norm(4, 64)
    inputs = case.inputs("cpu", torch.float16)
    truth = bench_truth.Truth(case, inputs, (torch.randn(4, 64, dtype=torch.float16),), torch.float16)
    off = [t + f * e for t, e, f in zip(truth.found, truth.errors, (1.9, 1.9, 1.9), strict=True)]
    assert truth.held_against(off)[1] == [] and all(truth.errors)
    assert truth.held_against([off[0][:2], *off[1:]])[1] == ["output 0 is (2, 64), wanted (4, 64)"]
    off[1] = truth.found[1] + 2.1 * truth.errors[1]
    assert len(truth.held_against(off)[1]) == 1 and truth.held_against(off)[1][0].startswith("dx is off")


@interpreted
def test_one_contenders_trouble_is_not_anothers(run):
    case = bench_cases.swiglu(4, 8)

    def broken(i, impl):
        raise RuntimeError("out of luck\nand more")

    run.case(dataclasses.replace(case, ours=broken), peers=False)
    assert records(run, who="ours")[0]["failed"] == "RuntimeError: out of luck"
    assert records(run, who="torch eager", **{"pass": "bwd"})

    def poisoned(i, impl):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="CUDA error"):  # the process can measure no more
        run.case(dataclasses.replace(case, ours=poisoned), peers=False)
    assert "illegal memory access" in run.result["records"][-1]["failed"]


def test_absent_peers_are_named(run, monkeypatch):
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None)
    run.case(bench_cases.swiglu(4, 8))
    reasons = {r["who"]: r["reason"] for r in run.result["absent"]}
    assert reasons["liger-kernel"] == reasons["liger-kernel merged"] == "liger_kernel is not installed"
    assert "swiglu: without liger-kernel: liger_kernel is not installed" in bench.summary(run.result)


def test_nothing_begins_after_the_time(tmp_path):
    run = bench.Bench(tmp_path / "b.json", minutes=1e-9, repeats=1)
    run.case(bench_cases.swiglu(4, 8))
    assert json.loads((tmp_path / "b.json").read_text())["left_out"] == ["swiglu T=4 F=8"]
    assert not run.result["records"] and "left out for time: swiglu T=4 F=8" in bench.summary(run.result)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "b.json"
    bench.write_json(path, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


# ---- command --------------------------------------------------------------------------------------------------------


def test_command(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "b.json"
    done = command(
        "kernels.bench", "--smoke", "--op", "swiglu", "norm_linear", "--no-peers", "--json", out, "--plot", tmp_path
    )
    result = json.loads(out.read_text())
    assert {r["op"] for r in result["records"]} == {"swiglu", "norm_linear"}
    assert all(r["ms"] > 0 and r["min"] <= r["q1"] <= r["ms"] <= r["q3"] <= r["max"] for r in result["records"])
    assert {r["who"] for r in result["records"]} == {"ours", "torch eager"}
    if not torch.cuda.is_available():
        assert "No GPU" in done.stdout
    assert {path.name for path in tmp_path.glob("*.png")} == {"swiglu.png", "norm_linear.png", "roofline.png"}
    assert command("kernels.bench", "--op", "softmax", check=False).returncode == 2
