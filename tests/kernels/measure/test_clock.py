"""The clock without a GPU, and its summaries."""

import pytest
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


class Event:
    """A CUDA event that was reached as long after the first as the device was busy."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return 1.0


def test_the_device_spins_for_longer_than_the_host_queues(monkeypatch):
    """On a GPU that is not there, with a clock of its own: the first repetition compiles, the others take 8 ms."""
    now, spun, calls = [0.0], [], []

    def step(_):
        now[0] += 0.008 if calls else 30.0
        calls.append(1)

    monkeypatch.setattr(clock, "GPU", True)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    for name, fake in (("_sleep", spun.append), ("Event", Event), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, fake)
    assert clock.time_steps([[step]], 3, lambda: None) == [(1.0, 1.0, 1.0)]
    assert len(calls) == 3 + clock.WARMUP and len(spun) == 3
    assert all(1.2 * 8 < cycles / clock.CYCLES_PER_MS < 3 * 8 for cycles in spun)
    clock.time_steps([[lambda _: None]], 1, lambda: None)
    assert spun[-1] == clock.LEAST_SPIN_MS * clock.CYCLES_PER_MS


def test_ceilings_are_of_the_products_of_a_step():
    x, w, dy, dw = clock.make_map(8, 4, 6, torch.float32)
    leaf, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = torch.nn.functional.linear(leaf, weight)
    dx, dweight = torch.autograd.grad(y, (leaf, weight), dy)
    assert clock.PRODUCTS["fwd"](x, w, dy, dw).equal(y)
    assert clock.PRODUCTS["dgrad"](x, w, dy, dw).allclose(dx, atol=1e-5)
    before = dw.clone()
    assert clock.PRODUCTS["wgrad"](x, w, dy, dw) is dw and dw.allclose(
        before + dweight, atol=1e-5
    )  # beta = 1, in place


def test_a_sustained_rate_is_of_as_many_passes_as_fill_the_time(monkeypatch):
    calls = []
    monkeypatch.setitem(clock.PRODUCTS, "fwd", lambda *_: calls.append(1))
    monkeypatch.setattr(clock, "time_steps", lambda sets, *_, **__: (sets[0][0](None), [(2.0,)])[1])
    rate = clock.measure_sustained("fwd", [(8, 4, 6), (16, 4, 6)], 0.1, torch.float32)
    assert len(calls) == 2 + 2 * 50 and rate == 50 * 2 * (8 + 16) * 4 * 6 / 2.0 / 1e9  # 100 ms at 2 ms a pass


def test_a_number_of_a_flag_is_finite():
    assert [clock.parse_finite(text) for text in ("2.5", "0", "-1", "1e300")] == [2.5, 0, -1, 1e300]
    for text in ("nan", "inf", "-inf", "Infinity", "1e999", "-1e999", "", "ten"):
        with pytest.raises(ValueError):
            clock.parse_finite(text)
