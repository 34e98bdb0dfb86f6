"""The clock of every kernel measurement: device time between CUDA events, or host time where no GPU is.

The device spins before each repetition for longer than the host needs to queue its launches, so that the host's time is
not measured.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from kernels.measure.machine import DEVICE, GPU
from kernels.ops.common import INTERPRETED

WARMUP = 5  # repetitions before the first that counts
CYCLES_PER_MS = 2_000_000  # of the fastest SM clock
LEAST_SPIN_MS, MOST_SPIN_MS = 1.0, 50.0  # a repetition that takes the host longer overflows the queue of launches
SPARE = 1.5  # times the host's time: it varies from repetition to repetition

Step = Callable[[Any], Any]  # takes what the step before returned


def parse_finite(text: str) -> float:
    """Return the number of a flag's text. Raise ValueError for a text that is none, NaN or an infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def l2_bytes() -> int:
    """Return the size of the GPU's L2 cache in bytes; 0 without a GPU."""
    return torch.cuda.get_device_properties(0).L2_cache_size if GPU else 0


def make_l2_flush() -> Callable[[], Any]:
    """Return a function that reads three times the L2's size, which leaves nothing else in it.

    It reads, because written lines would go back to memory at the cost of the next kernel.
    """
    if not GPU:
        return lambda: None
    buffer = torch.zeros(3 * l2_bytes() // 4, device=DEVICE)
    return lambda: buffer.sum()


def count_input_sets(set_bytes: int, times_l2: int, most: int) -> int:
    """Return how many sets of inputs together exceed the L2 times_l2 times: 2 to `most`, or 1 without a GPU."""
    return max(2, min(most, times_l2 * l2_bytes() // max(1, set_bytes) + 1)) if GPU else 1


def time_steps(
    sets: Sequence[Sequence[Step]], repeats: int, flush: Callable[[], Any], warmup: int = WARMUP
) -> list[tuple[float, ...]]:
    """Return the milliseconds of every repetition for each step.

    sets: a list of steps for each set of inputs; repetitions take the sets in turn. flush is called between steps.
    Without a GPU the host's clock is used, with one repetition of warm-up, or none in the interpreter.
    """
    if not GPU:
        return time_steps_on_host(sets, repeats, 0 if INTERPRETED else 1)
    spin_ms = LEAST_SPIN_MS
    for r in range(warmup):
        torch.cuda.synchronize()
        began = time.perf_counter()
        queue_steps(sets[r % len(sets)], flush)
        host_ms = 1e3 * (time.perf_counter() - began)  # of the last one, because the first ones may compile
        spin_ms = max(LEAST_SPIN_MS, min(MOST_SPIN_MS, SPARE * host_ms))
    recorded = []
    for r in range(warmup, warmup + repeats):
        torch.cuda._sleep(int(spin_ms * CYCLES_PER_MS))
        recorded.append(queue_steps(sets[r % len(sets)], flush))
    torch.cuda.synchronize()
    return list(zip(*([a.elapsed_time(b) for a, b in events] for events in recorded), strict=True))


def queue_steps(steps: Sequence[Step], flush: Callable[[], Any]) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    """Give the device one repetition of the steps, and return the events before and after each."""
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    value = None
    for step in steps:
        if events:
            flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        value = step(value)
        end.record()
        events.append((start, end))
    return events


def time_steps_on_host(sets: Sequence[Sequence[Step]], repeats: int, warmup: int) -> list[tuple[float, ...]]:
    """Return the milliseconds of every repetition for each step, by the host's clock."""
    recorded = []
    for r in range(warmup + repeats):
        value, spent = None, []
        for step in sets[r % len(sets)]:
            began = time.perf_counter()
            value = step(value)
            spent.append((time.perf_counter() - began) * 1e3)
        recorded.append(spent)
    return list(zip(*recorded[warmup:], strict=True))


def summarize_ms(ms: Sequence[float]) -> dict[str, float]:
    """Return the median, quartiles and extremes of milliseconds."""
    low, _, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else [*ms] * 3
    return {"ms": statistics.median(ms), "q1": low, "q3": high, "min": min(ms), "max": max(ms), "repeats": len(ms)}


# ---- ceilings -------------------------------------------------------------------------------------------------------


def measure_copy_rate(repeats: int, flush: Callable[[], Any], n_bytes: int) -> float:
    """Return the GB/s, reads and writes together, of a copy of n_bytes."""
    x, y = (torch.randn(n_bytes // 4, device=DEVICE) for _ in range(2))
    return 2 * x.numel() * 4 / statistics.median(time_steps([[lambda _: y.copy_(x)]], repeats, flush)[0]) / 1e6


def measure_gemm_rate(
    repeats: int, flush: Callable[[], Any], m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Return the TFLOP/s of a (m, k) x (k, n) product of random numbers: zeros take less power and run faster."""
    x, w = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in ((m, k), (n, k)))
    return 2 * m * n * k / statistics.median(time_steps([[lambda _: x @ w.T]], repeats, flush)[0]) / 1e9


# The products of a linear map, as a step computes them: y = x W^T, dx = dy W, dW += dy^T x in the GEMM's epilogue.
PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "fwd": lambda x, w, dy, dw: torch.nn.functional.linear(x, w),
    "dgrad": lambda x, w, dy, dw: dy @ w,
    "wgrad": lambda x, w, dy, dw: dw.addmm_(dy.T, x),
}


def make_map(rows: int, n_in: int, n_out: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return random x (rows, n_in), w (n_out, n_in), dy (rows, n_out) and dw (n_out, n_in) of a linear map."""
    shapes = (rows, n_in), (n_out, n_in), (rows, n_out), (n_out, n_in)
    return [torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in shapes]


def measure_product_rate(
    repeats: int, flush: Callable[[], Any], product: str, rows: int, n_in: int, n_out: int, dtype: torch.dtype
) -> float:
    """Return the TFLOP/s of one of PRODUCTS, in short bursts."""
    tensors = make_map(rows, n_in, n_out, dtype)
    ms = time_steps([[lambda _: PRODUCTS[product](*tensors)]], repeats, flush)[0]
    return 2 * rows * n_in * n_out / statistics.median(ms) / 1e9


def measure_sustained(product: str, maps: Iterable[tuple[int, int, int]], seconds: float, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of one of PRODUCTS over linear maps (rows, inputs, outputs) in turn, for so many seconds.

    A GPU lowers its clocks under a load that lasts, which bursts do not show.
    """
    sizes = list(maps)
    tensors = [make_map(*size, dtype) for size in sizes]

    def run_all(_):
        for each in tensors:
            PRODUCTS[product](*each)

    pass_ms = statistics.median(time_steps([[run_all]], 3, lambda: None)[0])
    n_passes = max(1, round(1e3 * seconds / pass_ms))

    def run_long(_):
        for _ in range(n_passes):
            run_all(None)

    ms = time_steps([[run_long]], 1, lambda: None, warmup=0)[0][0]
    return n_passes * sum(2 * rows * n_in * n_out for rows, n_in, n_out in sizes) / ms / 1e9


def measure_peak_rates(repeats: int, flush: Callable[[], Any]) -> dict[str, float]:
    """Return the copy rate and the GEMM rate that a roofline is drawn under, with the sizes they were measured at."""
    size, side = (2**31, 8192) if GPU else (2**22, 128)
    return {
        "copy_gb_per_s": measure_copy_rate(repeats, flush, size), "copy_bytes": size,
        "gemm_tflops": measure_gemm_rate(repeats, flush, side, side, side), "gemm_side": side,
    }  # fmt: skip
