"""The check of a contender's outputs and gradients."""

import pytest
import torch

from kernels.measure import cases as bench_cases
from kernels.measure import truth as bench_truth


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
