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


def test_bytes_of_elements_and_beyond_them():
    """4 GFLOP at 2 TFLOP/s take 2 ms; 100 elements of 4 bytes and 8 more at 5 GB/s take nothing beside them."""
    case = dataclasses.replace(bench_cases.swiglu_case(3, 5), work={"fwd": Work(4e9, 100, 8), "bwd": Work(1e9, 5e6)})
    ceiling = {"gemm_tflops": 2.0, "copy_gb_per_s": 5.0}
    assert results.compute_rates(case, "fwd", 4.0, ceiling, 4) == pytest.approx({
        "gb_per_s": 408 / 4e6, "tflops": 1.0, "bytes": 408, "flops": 4e9, "fraction": 0.5, "bound": "gemm",
    })  # fmt: skip
    both = results.compute_rates(case, "fwd+bwd", 4.0, ceiling, 4)
    assert both == pytest.approx({  # backward: 20 MB at 5 GB/s, 4 ms, and 0.5 ms of products
        "gb_per_s": 20000408 / 4e6, "tflops": 1.25, "bytes": 20000408, "flops": 5e9, "fraction": 1.5, "bound": "copy",
    })  # fmt: skip


def test_a_record_is_one_line():
    about = {"op": "rope", "shape": "T=8", "who": "ours", "pass": "fwd"}
    rates = {"ms": 1.23456, "tflops": 12.34, "gb_per_s": 567.8, "fraction": 0.4567}
    head = "rope" + 17 * " " + "T=8" + 39 * " "
    ours, other = about | rates, about | rates | {"who": "torch eager"}
    us, them, ms = "ours" + 21 * " ", "torch eager" + 14 * " ", "fwd         1.2346 ms"
    for record, is_toy, line in (
        (ours | {"bound": "gemm", "times_ours": 1.0}, False, f"{us}{ms}     12.3 TFLOP/s   45.7% of gemm"),
        (ours | {"bound": "copy", "times_gemm": 1.5}, False,
         f"{us}{ms}    567.8 GB/s      45.7% of copy   1.50x bare GEMM"),
        (other | {"bound": "copy", "times_ours": 2.5, "times_gemm": 1.5}, False,
         f"{them}{ms}    567.8 GB/s      45.7% of copy   2.50x ours"),
        (other | {"wrong": "dx is off"}, False, f"{them}WRONG RESULT: dx is off"),
        (other | {"failed": "E: no"}, True, f"{them}failed: E: no"),
        (other | {"bound": "copy"}, True, f"{them}fwd     ran"),
        (ours | {"bound": "copy", "error_over_torch": 0.0}, True, f"{us}fwd     right"),
    ):  # fmt: skip
        assert results.format_record(record, is_toy) == head + line


def test_ratios_are_of_the_same_pass_and_absent_peers_are_told_once():
    rows = [{"who": who, "pass": kind, "ms": ms} for who, kind, ms in (
        ("ours", "fwd", 2.0), ("ours", "bwd", 4.0), ("bare GEMM", "bwd", 1.0), ("torch", "bwd", 8.0),
        ("torch", "fwd+bwd", 9.0),
    )]  # fmt: skip
    results.add_ratios(rows)
    assert [(r.get("times_ours"), r.get("times_gemm")) for r in rows] == [
        (1.0, None), (1.0, 4.0), (0.25, 1.0), (2.0, 8.0), (None, None),
    ]  # fmt: skip
    absent = [("rope", "a", "no", "s1"), ("rope", "a", "no", "s2"), ("rope", "b", "no", "s1"),
              ("rope", "b", "else", "s2"), ("swiglu", "b", "no", "s1")]  # fmt: skip
    result = {
        "records": [{"op": "rope", "who": "b"}, {"op": "swiglu", "who": "a"}], "is_toy": False,
        "left_out": ["x", "y: z"],
        "absent": [dict(zip(("op", "who", "reason", "shape"), row, strict=True)) for row in absent],
        "ceilings": {"copy_gb_per_s": 12.34, "gemm_tflops": 5.678}, "machine": {"device": "H200"},
    }  # fmt: skip
    assert results.find_absent(result) == [
        ("rope", "a", "no", []), ("rope", "b", "no", ["s1"]), ("rope", "b", "else", ["s2"]), ("swiglu", "b", "no", []),
    ]  # fmt: skip
    result["absent"] += [{"op": "rope", "who": "b", "reason": "no", "shape": "s3"}]
    line = {"op": "rope", "shape": "T", "who": "b", "failed": "E"}
    said = results.format_summary(result | {"records": [line]})
    assert said.splitlines() == [
        "", "H200: copy 12.3 GB/s, GEMM 5.68 TFLOP/s", results.format_record(line), "rope: without a: no",
        "rope: without b at s1; s3: no", "rope: without b at s2: else", "swiglu: without b: no", "left out for time: x",
        "left out for time: y: z",
    ]  # fmt: skip
    toy = results.format_summary(result | {"records": [], "absent": [], "left_out": [], "is_toy": True})
    assert toy == "\nH200: toy sizes, nothing is said of speed"
