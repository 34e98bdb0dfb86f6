"""The tuner: measures candidate configurations of the launch tables on this GPU and keeps the fastest correct one.

A candidate that the static gate would refuse is left out. The others are checked against the operator's plain torch
path, then timed on the cases that read the entry and compared by the geometric mean. The entry changes if one is faster
by more than NOISE.
"""

import copy
import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from kernels.compiled.launch_cases import Call, Case, Make
from kernels.compiled.launches import call_case
from kernels.measure.candidates import (
    Config,
    Entry,
    Table,
    drop_source,
    find_entries,
    list_candidates,
    replace_config,
    try_tables,
    use_table,
)
from kernels.measure.clock import count_input_sets, time_steps
from kernels.ops import common

NOISE = 0.02  # repeated measurements differ by this share; a configuration must be faster by more
REPEATS = 7  # repetitions of the input sets that a median is taken over
MAX_SETS = 8  # sets of inputs of one case
SMOKE = 2  # candidates of an entry in a quick try
TOY: dict[str, Any] = dict(tokens=24, largest=64, dtype=torch.float32)  # the interpreter computes bf16 wrongly

Errors = list[tuple[float, float]]  # (error, allowed error) of each result


# ---- correct results ------------------------------------------------------------------------------------------------


def find_tensors(*values: Any) -> list[torch.Tensor]:
    """Return all tensors among values, which may hold lists and tuples."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += find_tensors(*value)
        elif torch.is_tensor(value):
            found.append(value)
    return found


def _copy_to(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_copy_to(v, device, dtype) for v in value)
    if not torch.is_tensor(value):
        return value
    return value.detach().to(device, dtype if dtype and value.is_floating_point() else value.dtype, copy=True)


def _results(call: Call) -> list[torch.Tensor]:
    """Return the tensors a call returns and its arguments, which it may write."""
    op, *args = call
    return find_tensors(op(*args), args)


def expected_results(case: Case, make: Make) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the results of the operator's torch path for a case with seed 0, in the case's dtype and in fp64."""
    torch.manual_seed(0)
    op, *args = case.build(make)
    own = _results((op.cpu, *_copy_to(args, "cpu")))
    try:
        return own, _results((op.cpu, *_copy_to(args, "cpu", torch.float64)))
    except (RuntimeError, ValueError, TypeError, triton.TritonError):  # an operator on bits, of which fp64 has others
        return own, own


def measure_errors(case: Case, make: Make, own: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> Errors:
    """Return the launch's error and the allowed error for every floating-point result of a case with seed 0.

    own, truth: what expected_results returns. Allowed is twice the error of the torch path in the case's own dtype, and
    one rounding of the result.
    """
    torch.manual_seed(0)
    op, *args = case.build(make)
    got = find_tensors(call_case((op, *args)), args)
    found = []
    for g, o, t in zip(got, own, truth, strict=True):
        if g.numel() and g.is_floating_point():
            t = t.double()
            allowed = 2 * (o.double() - t).abs().max() + torch.finfo(o.dtype).eps * t.abs().max()
            found.append(((g.detach().cpu().double() - t).abs().max().item(), allowed.item()))
    return found


def find_problem(errors: Errors, incumbent: Errors | None) -> str | None:
    """Return a message about the first error that is too large, or None.

    incumbent: the errors of the incumbent, of which twice as much is also allowed. None if `errors` are the incumbent's
    own: then only NaN and Inf are too large, because it has passed the stricter tests of its op.
    """
    for i, (error, allowed) in enumerate(errors):
        limit = max(allowed, 2 * incumbent[i][0]) if incumbent else sys.float_info.max
        if not error <= limit:
            return f"result {i} is off by {error:.1e}, wanted at most {limit:.1e}"
    return None


# ---- time -----------------------------------------------------------------------------------------------------------


def measure_ms(case: Case, make: Make) -> float:
    """Return the median milliseconds of one launch, over sets of inputs that exceed the L2 twice."""
    sets = [case.build(make)]
    set_bytes = sum(t.nbytes for t in find_tensors(sets[0]))
    sets += [case.build(make) for _ in range(count_input_sets(set_bytes, times_l2=2, most=MAX_SETS) - 1)]

    def run(_):
        for call in sets:
            call_case(call)

    repeats = REPEATS if make.device.type == "cuda" else 1
    return statistics.median(time_steps([[run]], repeats, lambda: None, warmup=1)[0]) / len(sets)


# ---- tuning ---------------------------------------------------------------------------------------------------------


class Tuner:
    """Measures the entries of launch tables one by one until the time is up.

    show: prints a line. toy: tries everything at toy size, without the static gate. workers: processes that compile.
    """

    def __init__(
        self,
        device: str,
        chip: str,
        minutes: float,
        show: Callable[[str], None],
        toy: bool = False,
        workers: int = 1,
    ) -> None:
        self.chip, self.show, self.toy, self.workers = chip, show, toy, workers
        self.deadline = time.monotonic() + 60 * minutes
        self.make = Make(device, **TOY) if toy else Make(device)
        self.small = Make(device, **TOY) if toy else Make(device, tokens=515)  # for checks: no multiple of a tile
        name = torch.cuda.get_device_name(device) if device == "cuda" else "no device"
        self.source = f"measured on {name}, Triton {triton.__version__}, {datetime.date.today()}"

    def is_late(self) -> bool:
        """Return whether the time is up."""
        return time.monotonic() > self.deadline

    def tune(
        self, op: str, write: Callable[[str, Table], None], advance: Callable[[], None] = lambda: None
    ) -> list[Entry]:
        """Measure the entries of one op, and return the entries that were not reached in time.

        write(op, table) and advance() are called after each entry.
        """
        table = copy.deepcopy(common.launch_table(op))
        waiting = find_entries(op, self.chip, self.small if self.toy else Make(), table)
        while waiting and not self.is_late():
            entry = waiting[0]
            chosen = self.choose(entry, table)
            if chosen is None:
                break
            config, ratio = chosen
            old = drop_source(entry.config(table))
            if not math.isfinite(ratio):
                self.show(f"{entry}: {old} itself failed and nothing beat it; left as it is")
            else:
                self.show(f"{entry}: {old} " + ("kept" if config == old else f"-> {config}, {ratio:.3f} of its time"))
                table = replace_config(table, entry, config, self.source)
                write(op, table)
            waiting.pop(0)
            advance()
        return waiting

    def choose(self, entry: Entry, table: Table) -> tuple[Config, float] | None:
        """Return the best configuration and its time over the incumbent's, or None if the time is up."""
        configs = list_candidates(entry, entry.config(table))
        configs = configs[:SMOKE] if self.toy else self._accepted(entry, table, configs)
        cases = entry.cases[:1] if self.toy else entry.cases
        expected = [expected_results(case, self.small) for case in cases]
        scores: list[float] = []
        incumbent: list[Errors] | None = None
        for config in configs:
            if self.is_late():
                return None
            score, errors = self.score(entry, replace_config(table, entry, config), cases, expected, incumbent)
            incumbent = incumbent or errors
            scores.append(score)
        best = min(range(len(configs)), key=lambda i: scores[i])
        if not scores[best] < (1 - NOISE) * scores[0]:
            best = 0
        return configs[best], scores[best] / scores[0]

    def _accepted(self, entry: Entry, table: Table, configs: list[Config]) -> list[Config]:
        """Return the incumbent and the candidates that the static gate accepts: compiling is cheaper than a crash."""
        trials = try_tables(entry, [replace_config(table, entry, config) for config in configs], self.workers)
        accepted = [not any(violations for _, _, violations in trial) for trial in trials]
        n_refused = len(configs) - sum(accepted)
        self.show(f"{entry}: {len(configs)} candidates, {n_refused} refused by the static gate")
        return [config for i, config in enumerate(configs) if accepted[i] or i == 0]

    def score(
        self,
        entry: Entry,
        table: Table,
        cases: Sequence[Case],
        expected: Sequence[tuple[list[torch.Tensor], list[torch.Tensor]]],
        incumbent: list[Errors] | None,
    ) -> tuple[float, list[Errors] | None]:
        """Return the geometric mean of the cases' milliseconds and the errors of each case.

        The mean is infinite, and the errors None, if a result is wrong or a launch fails.
        """
        logs: list[float] = []
        errors: list[Errors] = []
        with use_table(table, self.chip):
            for i, case in enumerate(cases):
                try:
                    errors.append(measure_errors(case, self.small, *expected[i]))
                    problem = find_problem(errors[i], incumbent[i] if incumbent else None)
                    logs.append(math.log(measure_ms(case, self.make)))
                except (RuntimeError, triton.TritonError) as error:
                    problem = f"{type(error).__name__}: {error}"
                if problem:
                    self.show(f"{entry}: {drop_source(entry.config(table))} in {case.label}: {problem}")
                    return math.inf, None
        return math.exp(sum(logs) / len(logs)), errors
