"""The clock without a GPU, and its summaries."""

from types import SimpleNamespace

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


def test_repetitions_take_the_sets_in_turn_and_flush_between_steps(monkeypatch):
    """On a GPU that is not there: events stand around each step, and warm-up is not counted."""
    log, made = [], []

    class Noting:
        def __init__(self, enable_timing):
            assert enable_timing
            made.append(self)

        def record(self):
            log.append(f"event {made.index(self) % 4}")

        def elapsed_time(self, other):
            return float(made.index(self) * 100 + made.index(other))

    def steps(name):
        return [lambda _: log.append(f"{name} forward") or name, lambda value: log.append(f"{value} backward")]

    monkeypatch.setattr(clock, "GPU", True)
    monkeypatch.setattr(torch.cuda, "Event", Noting)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("spin"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    sets = [steps("a"), steps("b")]
    forward, backward = clock.time_steps(sets, 3, lambda: log.append("flush"), warmup=1)
    one = ["event 0", "{} forward", "event 1", "flush", "event 2", "{} backward", "event 3"]
    want = ["wait", *one, "spin", *one, "spin", *one, "spin", *one, "wait"]
    names = iter(name for name in "abab" for _ in range(2))
    assert log == [line.format(next(names)) if "{}" in line else line for line in want]
    assert forward == (405, 809, 1213) and backward == (607, 1011, 1415)  # events 4 and 5, 8 and 9, 12 and 13


def test_on_a_cpu_the_host_tells_the_time_after_one_repetition_or_none(monkeypatch):
    given = []
    monkeypatch.setattr(clock, "GPU", False)
    monkeypatch.setattr(clock, "time_steps_on_host", lambda *args: given.append(args) or ["ms"])
    for interpreted, warmup in ((True, 0), (False, 1)):
        monkeypatch.setattr(clock, "INTERPRETED", interpreted)
        assert clock.time_steps("sets", 3, None) == ["ms"] and given.pop() == ("sets", 3, warmup)
    now = iter(range(100))
    monkeypatch.undo()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now) ** 2)
    seen = []
    sets = [[lambda _, name=name: seen.append(name) or name, seen.append] for name in "abc"]
    assert clock.time_steps_on_host(sets, 2, 2) == [(17e3, 25e3), (21e3, 29e3)]
    assert "".join(seen) == "aabbccaa"
    assert clock.summarize_ms([2.0]) == {"ms": 2, "q1": 2, "q3": 2, "min": 2, "max": 2, "repeats": 1}


def test_sets_of_inputs_exceed_the_l2(monkeypatch):
    """Two at least, so that no set is read twice in a row, and one without a GPU."""
    card = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(clock, "GPU", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card if index == 0 else None)
    assert clock.l2_bytes() == 0 and clock.count_input_sets(10, 3, 16) == 1 and clock.make_l2_flush()() is None
    monkeypatch.setattr(clock, "GPU", True)
    found = {size: clock.count_input_sets(size, 3, 16) for size in (0, 10, 200, 250, 1000, 1500, 2999, 3001, 10**9)}
    assert found == {0: 16, 10: 16, 200: 16, 250: 13, 1000: 4, 1500: 3, 2999: 2, 3001: 2, 10**9: 2}
    assert clock.count_input_sets(1000, 2, 16) == 3
    monkeypatch.setattr(clock, "DEVICE", "cpu")
    zeros = torch.zeros
    made = []
    monkeypatch.setattr(torch, "zeros", lambda *args, **named: made.append((args, named)) or zeros(*args, **named))
    assert clock.make_l2_flush()() == 0 and made == [((750,), {"device": "cpu"})]


def test_rates_are_of_what_is_moved_and_multiplied(monkeypatch):
    """A copy reads and writes; a product is of two FLOPs a multiply-add. At 2 ms, the median of three."""
    given = []

    def time_steps(sets, repeats, flush):
        ((step,),) = sets
        given.append((step(None), repeats, flush))
        return [(9.0, 2.0, 1.0)]

    monkeypatch.setattr(clock, "DEVICE", "cpu")
    monkeypatch.setattr(clock, "time_steps", time_steps)
    assert clock.measure_copy_rate(5, len, 4000) == 2 * 4000 / 2.0 / 1e6
    assert clock.measure_gemm_rate(6, max, 3, 5, 7) == 2 * 3 * 5 * 7 / 2.0 / 1e9
    assert clock.measure_gemm_rate(6, max, 3, 5, 7, torch.float32) == 2 * 3 * 5 * 7 / 2.0 / 1e9
    assert clock.measure_product_rate(7, min, "dgrad", 3, 5, 7, torch.float64) == 2 * 3 * 5 * 7 / 2.0 / 1e9
    shapes = [(tuple(out.shape), out.dtype, *rest) for out, *rest in given]
    assert shapes == [
        ((1000,), torch.float32, 5, len), ((3, 5), torch.bfloat16, 6, max), ((3, 5), torch.float32, 6, max),
        ((3, 5), torch.float64, 7, min),
    ]  # fmt: skip
    assert given[0][0].unique().numel() > 900
    asked = []
    monkeypatch.setattr(clock, "measure_copy_rate", lambda *args: asked.append(args) or 1.5)
    monkeypatch.setattr(clock, "measure_gemm_rate", lambda *args: asked.append(args) or 2.5)
    for gpu, size, side in ((False, 2**22, 128), (True, 2**31, 8192)):
        monkeypatch.setattr(clock, "GPU", gpu)
        want = {"copy_gb_per_s": 1.5, "copy_bytes": size, "gemm_tflops": 2.5, "gemm_side": side}
        assert clock.measure_peak_rates(4, len) == want
        assert asked == [(4, len, size), (4, len, side, side, side)]
        asked.clear()


def test_a_sustained_rate_is_timed_in_one_go(monkeypatch):
    given = []

    def time_steps(sets, repeats, flush, warmup=None):
        given.append((repeats, flush(), warmup))
        return [(3000.0, 500.0, 400.0)]

    monkeypatch.setattr(clock, "time_steps", time_steps)
    assert clock.measure_sustained("wgrad", [(8, 4, 6)], 0.1, torch.float32) == 2 * 8 * 4 * 6 / 3000.0 / 1e9
    assert given == [(3, None, None), (1, None, 0)]
