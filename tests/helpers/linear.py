"""Time that grows with a text: a ratio of two lengths, which holds on a machine of any speed."""

import time


def measure_cpu_s(call, text):
    """Return the CPU seconds of the faster of two calls."""
    seconds = []
    for _ in range(2):
        start = time.process_time()
        call(text)
        seconds.append(time.process_time() - start)
    return min(seconds)


def assert_linear_time(call, quarter, whole):
    """Assert that four times the text takes less than ten times as long: linear is 4, quadratic 16. 0.2 s are noise."""
    short_s, long_s = measure_cpu_s(call, quarter), measure_cpu_s(call, whole)
    assert long_s < 10 * short_s + 0.2, f"{short_s:.3f} s, then {long_s:.3f} s for four times the text"
