"""What a server counts, as Prometheus reads it."""

import threading
from collections import Counter
from collections.abc import Iterable

from engine.inference.scheduler import Load

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds


class Histogram:
    """How many observations were at most so many seconds."""

    def __init__(self) -> None:
        self.counts, self.total, self.n = [0] * len(BOUNDS), 0.0, 0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self.n, self.total = self.n + 1, self.total + seconds
        self.counts = [count + (seconds <= bound) for count, bound in zip(self.counts, BOUNDS, strict=True)]

    def lines(self, name: str) -> Iterable[str]:
        """Yield the lines of Prometheus's text format."""
        yield f"# TYPE {name} histogram"
        for bound, count in zip(BOUNDS, self.counts, strict=True):
            yield f'{name}_bucket{{le="{bound:g}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self.n}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {self.n}"


class Metrics:
    """Requests by path and status, and the time to their first token and to their end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: Counter[tuple[str, int]] = Counter()
        self.first_token, self.whole = Histogram(), Histogram()

    def count(self, path: str, status: int, seconds: float, first: float | None) -> None:
        """Count a request that has ended. first: seconds to its first token, None if it had none."""
        with self.lock:
            self.requests[path, status] += 1
            self.whole.observe(seconds)
            if first is not None:
                self.first_token.observe(first)

    def text(self, load: Load) -> str:
        """Return everything in Prometheus's text format."""
        with self.lock:
            lines = ["# TYPE cria_requests_total counter"]
            lines += [
                f'cria_requests_total{{path="{path}",status="{status}"}} {n}'
                for (path, status), n in sorted(self.requests.items())
            ]
            for name, kind, value in (
                ("cria_answers_running", "gauge", load.running),
                ("cria_answers_waiting", "gauge", load.waiting),
                ("cria_prompt_tokens_total", "counter", load.prompt_tokens),
                ("cria_prompt_tokens_kept_total", "counter", load.kept_tokens),
                ("cria_answer_tokens_total", "counter", load.answer_tokens),
            ):
                lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
            lines += self.first_token.lines("cria_first_token_seconds")
            lines += self.whole.lines("cria_request_seconds")
            return "\n".join(lines) + "\n"
