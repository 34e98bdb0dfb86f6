"""The clock without a GPU, and its summaries."""

import torch

from kernels.measure import clock


def test_times_of_steps():
    def slow(value):
        torch.randn(200_000).sort()
        return value + 1

    seen = []
    first, second = clock.time_steps_on_host([[lambda _: 1, slow, seen.append]], repeats=3, warmup=1)[:2]
    assert len(first) == 3 and min(second) > max(first) and seen == [2] * 4
    assert clock.summarize_ms([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "ms": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 5.0, "repeats": 5,
    }  # fmt: skip
