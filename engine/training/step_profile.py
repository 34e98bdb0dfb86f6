"""--profile: a trace of some steps by torch's profiler, and a table of where their time goes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine.base.files import write_atomically

WARM_UP, PROFILED = 2, 3  # steps that are let pass, since the first compile and allocate; steps of the trace
TRACE, TABLE = "profile.json.gz", "profile.txt"
ROWS = 15  # of the table


class StepProfile:
    """Traces a few steps of a run, those after its first two, and writes the trace and a table to its folder.

    A run of fewer steps has its last ones traced. Training is the same with it, but for the time.
    """

    def __init__(self, out: Path, first_step: int, last_step: int, device: torch.device, say: Callable[[str], None]):
        self.out, self.device, self.say = out, device, say
        self.first = max(first_step, min(first_step + WARM_UP, last_step - PROFILED + 1))
        self.last = min(self.first + PROFILED - 1, last_step)
        self.profiler: profile | None = None

    def watch(self, step: int) -> AbstractContextManager[object]:
        """Return a context for one step of the run, which is traced where it is one of those."""
        if not self.first <= step <= self.last:
            return nullcontext()
        stack = ExitStack()
        if self.profiler is None:
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
            self.profiler.start()
        if step == self.last:
            stack.callback(self.close)  # after the step
        stack.enter_context(record_function(f"step {step}"))
        return stack

    def close(self) -> None:
        """End the trace, if one was begun, and write it. A full disk costs the trace alone."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        profiler.stop()
        self.first = self.last + 1  # once
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=50)
        temporary = self.out / f".tmp-{TRACE}"
        try:
            profiler.export_chrome_trace(str(temporary))
            temporary.replace(self.out / TRACE)
            write_atomically(self.out / TABLE, table.encode())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self.say(f"warning: the profile could not be written ({error.strerror or error})")
            return
        self.say(f"{table}\nprofile: {self.out / TRACE} is the trace, for ui.perfetto.dev; {TABLE} is the table")
