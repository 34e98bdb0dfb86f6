"""One run of the microbenchmarks: every contender of a case is checked, then timed, and each record is written at once.

A time is the median over at least 20 repetitions of device time between CUDA events. Each repetition takes the next
of several sets of random inputs, together over three times the L2, and the L2 is flushed between forward and backward.
Before timing, outputs and every gradient are checked against the reference in fp32: an error over twice that of torch's
own path in the same dtype makes the record "wrong", without a time.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.measure.cases import BenchCase, Inputs
from kernels.measure.clock import count_input_sets, make_l2_flush, measure_peak_rates, summarize_ms, time_steps
from kernels.measure.cuda_peers import CUDA_PEERS
from kernels.measure.machine import DEVICE, GPU, IMPL, describe_machine, free_memory, write_json
from kernels.measure.peers import PEERS, UNCHECKED, Absent, Prepare, Ready, plain
from kernels.measure.results import Record, Result, add_ratios, compute_rates, format_record
from kernels.measure.truth import Truth, as_tuple, copy_as_leaves, run_once

REPEATS = 20
MAX_SETS = 16


def _count_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_count_bytes, value)) if isinstance(value, list) else 0


def _contenders(case: BenchCase, peers: bool) -> dict[str, Prepare]:
    found: dict[str, Prepare] = {}
    if IMPL == "triton":
        found["ours"] = plain(lambda case, i: case.ours(i, IMPL))
    found["torch eager"] = plain(lambda case, i: case.reference(i))
    return found | CUDA_PEERS.get(case.op, {}) | PEERS.get(case.op, {}) if peers else found


def time_passes(
    case: BenchCase, sets: Sequence[Ready], repeats: int, flush: Callable[[], Any]
) -> dict[str, Sequence[float]]:
    """Return pass -> milliseconds of every repetition, for the passes of the case.

    sets: one contender, prepared on each set of inputs.
    """

    def steps(ready):
        def back(out):
            return ready.back() if ready.back else torch.autograd.grad(as_tuple(out), ready.leaves, ready.upstream)

        return [lambda _: ready.run()] + ([back] if ready.back or ready.leaves else [])

    spent = time_steps([steps(ready) for ready in sets], repeats, flush)
    if len(spent) == 1:
        return {"fwd": spent[0]}
    both = [sum(pair) for pair in zip(*spent, strict=True)]
    return {kind: ms for kind, ms in {"fwd": spent[0], "bwd": spent[1], "fwd+bwd": both}.items() if kind in case.passes}


class Benchmark:
    """One run and its result, which is written after every record.

    minutes: no measurement begins after them. dtype: bf16 on a GPU, fp32 elsewhere, if none is given. is_toy: the cases
    are so small that no rate is printed; the file has them all the same.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        minutes: float | None = None,
        repeats: int = REPEATS,
        dtype: torch.dtype | None = None,
        is_toy: bool = False,
    ) -> None:
        self.path, self.repeats = path, repeats
        self.dtype = dtype or (torch.bfloat16 if GPU else torch.float32)
        self.deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.flush = make_l2_flush()
        self.result: Result = {
            "what": "kernels.bench", "machine": describe_machine(), "dtype": str(self.dtype).removeprefix("torch."),
            "is_toy": is_toy, "records": [], "absent": [], "left_out": [],
        }  # fmt: skip
        self.result["ceilings"] = measure_peak_rates(repeats, self.flush)
        self.save()

    def save(self) -> None:
        """Write the result to the file, if one was named."""
        if self.path:
            write_json(self.path, self.result)

    def is_late(self) -> bool:
        """Return whether the time is up."""
        return time.monotonic() > self.deadline

    def run_case(self, case: BenchCase, peers: bool = True) -> None:
        """Check and time every contender of a case. Raise a CUDA error, after which the process cannot go on."""
        if self.is_late():
            self.result["left_out"].append(f"{case.op} {case.shape}")
            return self.save()
        torch.manual_seed(0)
        first = len(self.result["records"])
        try:
            inputs = case.inputs(DEVICE, self.dtype)
            leaves = copy_as_leaves(case, inputs)
            outputs = as_tuple(case.results(leaves, case.reference(leaves)))
            upstream = tuple(torch.randn_like(t) if t.is_floating_point() else t for t in outputs)
            truth = Truth(case, inputs, upstream, self.dtype)
            n_sets = count_input_sets(_count_bytes(vars(inputs)), times_l2=3, most=MAX_SETS)
            extra = [copy_as_leaves(case, case.inputs(DEVICE, self.dtype)) for _ in range(n_sets - 1)]
            sets = [copy_as_leaves(case, inputs), *extra]
        except Exception as error:
            return self._add_failure(case, "inputs and reference", error)
        for who, prepare in _contenders(case, peers).items():
            if self.is_late():
                self.result["left_out"].append(f"{case.op} {case.shape}: {who}")
                continue
            try:
                self._run_contender(case, who, prepare, sets, upstream, truth)
            except (Absent, ImportError) as reason:
                absent = {"op": case.op, "shape": case.shape, "who": who, "reason": str(reason)}
                self.result["absent"].append(absent)
            except Exception as error:  # one contender's trouble is not another's
                self._add_failure(case, who, error)
            free_memory()
        add_ratios(self.result["records"][first:])
        return self.save()

    def _run_contender(
        self,
        case: BenchCase,
        who: str,
        prepare: Prepare,
        sets: Sequence[Inputs],
        upstream: tuple[torch.Tensor, ...],
        truth: Truth,
    ) -> None:
        about = {"op": case.op, "shape": case.shape, "who": who}
        ratio = None
        if who not in UNCHECKED and who != "torch eager":
            ratio, complaints = truth.check(run_once(prepare(case, copy_as_leaves(case, sets[0]), upstream)))
            if complaints:
                return self._add({**about, "wrong": "; ".join(complaints)})
        ready = [prepare(case, inputs, upstream) for inputs in sets]
        for kind, ms in time_passes(case, ready, self.repeats, self.flush).items():
            record: Record = {**about, "pass": kind, **summarize_ms(ms)}
            record |= compute_rates(case, kind, record["ms"], self.result["ceilings"], self.dtype.itemsize)
            if "bytes_a_parameter" in case.sizes:
                record["bytes_a_parameter"] = case.sizes["bytes_a_parameter"]
            self._add({**record, "error_over_torch": ratio, "sets": len(sets)})

    def _add_failure(self, case: BenchCase, who: str, error: Exception) -> None:
        said = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {said[0][:300]}"
        self._add({"op": case.op, "shape": case.shape, "who": who, "failed": reason})
        if "CUDA error" in str(error):  # the process can use the device no more
            raise error

    def _add(self, record: Record) -> None:
        self.result["records"].append(record)
        print(format_record(record, self.result["is_toy"]), flush=True)
        self.save()
