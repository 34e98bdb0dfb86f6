"""The work that benchmarks count for each op, by hand."""

import pytest

from kernels.measure import cases as bench_cases
from kernels.measure.cases import Work

DOCUMENTS = [(0, 3, 0, 0), (3, 5, 0, 3)]  # the second sees the first whole


def test_attention_counts_what_a_query_sees():
    # 3 rows see 9/2 pairs; 2 rows see 2 * 3 of the prefix and 4/2 of their own. 4 FLOPs a pair, head and dimension.
    assert bench_cases.attention_flops(DOCUMENTS, n_heads=2, head_dim=8) == 4 * (4.5 + 6 + 2) * 2 * 8
    work = bench_cases.attention_work(DOCUMENTS, 5, 2, 1, 8)
    assert work["fwd"] == Work(800, 2 * 80 + 2 * 40)  # q, o; k, v
    assert work["bwd"] == Work(2000, 4 * 80 + 4 * 40)  # q, o, do, dq; k, v, dk, dv
    (case,) = [c for c in bench_cases.full_cases() if c.shape == "dense s=4096 H=32 Dh=128"]
    assert case.work["fwd"].flops == 4 * 4 * 4096**2 / 2 * 32 * 128


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (bench_cases.rms_norm_case(3, 5), (0, 2 * 15 + 5, 0), (0, 3 * 15 + 10, 0)),
        (bench_cases.rms_norm_case(3, 5, residual=True), (0, 4 * 15 + 5, 0), (0, 4 * 15 + 10, 0)),
        (bench_cases.rope_case(3, 2, 1, 4), (0, 2 * 36, 48), (0, 2 * 36, 48)),
        (bench_cases.swiglu_case(3, 5), (0, 45, 0), (0, 75, 0)),
        (bench_cases.norm_linear_case(3, 5, 7), (210, 15 + 35 + 21, 0), (420, 30 + 70 + 21, 0)),
        # gate_up 30, weight 35, residual and output 21 each; dy 21, gate_up and its gradient 30 each, weight twice
        (bench_cases.swiglu_linear_case(3, 5, 7), (210, 30 + 35 + 42, 0), (420, 21 + 60 + 70, 0)),
        (bench_cases.linear_cross_entropy_case(3, 5, 7), (210, 15 + 35, 0), (420, 30 + 70, 0)),
    ],
    ids=lambda x: x.op if isinstance(x, bench_cases.BenchCase) else "",
)
def test_work_by_hand(case, forward, backward):
    assert tuple(case.work["fwd"]) == forward and tuple(case.work["bwd"]) == backward


def test_bytes_a_parameter():
    assert bench_cases.grad_norm_case([(2, 3), (4,)], "").work["fwd"] == Work(0, 10)
    assert bench_cases.adamw_case((2, 3), "split", "fp32").work["fwd"].bytes == 26 * 6  # w, low, g, m, v; w, low, m, v
    assert bench_cases.adamw_case((2, 3), "split", "8bit").work["fwd"].bytes == pytest.approx(14.0625 * 6)
    assert bench_cases.adamw_case((2, 3), None, "fp32").work["fwd"].bytes == 28 * 6
