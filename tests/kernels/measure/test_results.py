"""Rates, fractions of the roofline and ratios of records."""

import dataclasses

import pytest

from kernels.measure import cases as bench_cases
from kernels.measure import results
from kernels.measure.cases import Work


def test_a_fraction_is_the_rooflines_time_over_the_measured():
    case = dataclasses.replace(
        bench_cases.swiglu_case(3, 5), work={"fwd": Work(4e9, 100), "bwd": Work(0, 3e6, 4e6)}
    )  # 4 GFLOP at 2 TFLOP/s: 2 ms. 10 MB at 5 GB/s: 2 ms.
    ceiling = {"gemm_tflops": 2.0, "copy_gb_per_s": 5.0}
    forward, backward, both = (results.compute_rates(case, kind, 8.0, ceiling, 2) for kind in ("fwd", "bwd", "fwd+bwd"))
    assert (forward["fraction"], backward["fraction"], both["fraction"]) == pytest.approx((0.25, 0.25, 0.5))
    assert (forward["bound"], backward["bound"]) == ("gemm", "copy")
    assert forward["tflops"] == pytest.approx(0.5) and backward["gb_per_s"] == pytest.approx(1.25)


def test_ratios():
    rows = [{"who": who, "pass": "fwd", "ms": ms} for who, ms in (("ours", 2.0), ("bare GEMM", 1.6), ("torch", 5.0))]
    results.add_ratios([*rows, {"who": "broken", "wrong": "..."}])
    assert [r["times_ours"] for r in rows] == [1.0, 0.8, 2.5]
    assert rows[0]["times_gemm"] == 1.25
