"""What a server counts, as Prometheus reads it."""

from engine.inference.scheduler import Load
from engine.serving.metrics import BOUNDS, Histogram, Metrics


def test_a_histogram_counts_up_to_each_bound():
    histogram = Histogram()
    assert list(histogram.lines("x"))[-3:] == ['x_bucket{le="+Inf"} 0', "x_sum 0.000000", "x_count 0"]
    for seconds in (0.05, 0.06, 120, 121):
        histogram.observe(seconds)
    lines = list(histogram.lines("x"))
    assert lines[:3] == ["# TYPE x histogram", 'x_bucket{le="0.05"} 1', 'x_bucket{le="0.1"} 2']
    assert lines[len(BOUNDS) :] == ['x_bucket{le="120"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 241.110000", "x_count 4"]


def test_all_that_is_counted_is_told():
    metrics = Metrics()
    metrics.count("/v1/b", 200, 3.0, 0.5)
    metrics.count("/v1/a", 400, 1.0, None)
    metrics.count("/v1/b", 200, 2.0, 0.25)
    text = metrics.text(Load(running=1, waiting=2, prompt_tokens=3, kept_tokens=4, answer_tokens=5))
    assert text.splitlines()[:3] == [
        "# TYPE cria_requests_total counter", 'cria_requests_total{path="/v1/a",status="400"} 1',
        'cria_requests_total{path="/v1/b",status="200"} 2',
    ]  # fmt: skip
    for line in ("cria_answers_running 1", "cria_answers_waiting 2", "cria_prompt_tokens_total 3",
                 "cria_prompt_tokens_kept_total 4", "cria_answer_tokens_total 5", "cria_first_token_seconds_count 2",
                 "cria_first_token_seconds_sum 0.750000", "cria_request_seconds_count 3"):  # fmt: skip
        assert f"\n{line}\n" in text
