"""Microbenchmarks of every kernel against the memory, the matrix units and other libraries, in one run.

    python -m kernels.bench [--op NAME ...] [--json FILE] [--plot DIR] [--minutes M] [--smoke]

A time is the median over at least 20 repetitions of device time between CUDA events. Each repetition takes the next
of several sets of random inputs, together over three times the L2, and the L2 is read full between forward and
backward. The device spins before each repetition so that all its launches are queued: what is measured is the device,
not the host, at the clocks of short bursts, and the two ceilings are measured in the same way. Before timing, outputs
and every gradient are held against the reference in fp32: an error over twice that of torch's own path in the same
dtype makes the record "wrong", without a time. A fraction is the roofline's time over the measured one; the roofline's
time is the larger of FLOPs / GEMM rate and bytes / copy rate (the formulas are in bench_cases.py).

Without a GPU the references are timed at toy sizes, and with TRITON_INTERPRET=1 the kernels are checked in Triton's
interpreter; such times say nothing of a GPU.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

from kernels.measure.cases import full, toy
from kernels.measure.peers import PEERS, UNCHECKED, Absent, plain
from kernels.measure.truth import Truth, as_tuple, leaves, results
from kernels.ops.common import INTERPRETED

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
IMPL = "triton" if GPU or INTERPRETED else "ref"
WARMUP, REPEATS = 5, 20
MAX_SETS = 16
SPIN_CYCLES = 2_000_000  # about a millisecond: longer than the host needs to queue one repetition
PACKAGES = ("liger-kernel", "cut-cross-entropy", "flashoptim", "bitsandbytes", "torchao", "transformers")


# ---- what is written ------------------------------------------------------------------------------------------------


def write_json(path, data):
    """Whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi(*fields):
    """What nvidia-smi says of the first card, or None where it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in out.strip().split(",")), strict=False))


def machine():
    facts = {
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d"),
        "packages": {name: installed(name) for name in PACKAGES},
    }  # fmt: skip
    if not GPU:
        return {"device": "CPU, Triton's interpreter" if INTERPRETED else "CPU", **facts}
    card = torch.cuda.get_device_properties(0)
    return {
        "device": card.name, "capability": f"sm_{card.major}{card.minor}", "sms": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size, "memory_bytes": card.total_memory,
        "driver": (nvidia_smi("driver_version") or {}).get("driver_version"), **facts,
    }  # fmt: skip


# ---- time -----------------------------------------------------------------------------------------------------------


def flusher():
    """Reads three times the L2 through it. Reading, since written lines would be put back at the next kernel's cost."""
    if not GPU:
        return lambda: None
    buffer = torch.zeros(3 * torch.cuda.get_device_properties(0).L2_cache_size // 4, device=DEVICE)
    return lambda: buffer.sum()


def times(steps, repeats, flush, warmup=WARMUP):
    """steps: one list of callables a set of inputs, each given what the one before returned. Returns for each of the
    callables its milliseconds in every repetition."""
    if not GPU:
        return host_times(steps, repeats, 0 if INTERPRETED else 1)
    recorded = []
    for r in range(warmup + repeats):
        torch.cuda._sleep(SPIN_CYCLES)
        events, value = [], None
        for step in steps[r % len(steps)]:
            if events:
                flush()
            events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[-1][0].record()
            value = step(value)
            events[-1][1].record()
        del value
        recorded.append(events)
    torch.cuda.synchronize()
    return list(zip(*([a.elapsed_time(b) for a, b in events] for events in recorded[warmup:]), strict=True))


def host_times(steps, repeats, warmup):
    recorded = []
    for r in range(warmup + repeats):
        value, spent = None, []
        for step in steps[r % len(steps)]:
            began = time.perf_counter()
            value = step(value)
            spent.append((time.perf_counter() - began) * 1e3)
        recorded.append(spent)
    return list(zip(*recorded[warmup:], strict=True))


def spread(ms):
    """Median, quartiles and extremes of a list of milliseconds."""
    low, _, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
    return {"ms": statistics.median(ms), "q1": low, "q3": high, "min": min(ms), "max": max(ms), "repeats": len(ms)}


def rate_of_copy(repeats, flush, n_bytes):
    x, y = (torch.randn(n_bytes // 4, device=DEVICE) for _ in range(2))
    return 2 * x.numel() * 4 / statistics.median(times([[lambda _: y.copy_(x)]], repeats, flush)[0]) / 1e6


def rate_of_gemm(repeats, flush, m, n, k, dtype=torch.bfloat16):
    """TFLOP/s of a (m, k) x (k, n) product of random numbers: zeros take less power and run faster."""
    x, w = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in ((m, k), (n, k)))
    return 2 * m * n * k / statistics.median(times([[lambda _: x @ w.T]], repeats, flush)[0]) / 1e9


def ceilings(repeats, flush):
    size, side = (2**31, 8192) if GPU else (2**22, 128)
    return {
        "copy_gb_per_s": rate_of_copy(repeats, flush, size), "copy_bytes": size,
        "gemm_tflops": rate_of_gemm(repeats, flush, side, side, side), "gemm_side": side,
    }  # fmt: skip


# ---- one case -------------------------------------------------------------------------------------------------------


def n_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(n_bytes(part) for part in parts)


def n_sets(inputs):
    """Sets of inputs that together are over three times the L2."""
    if not GPU:
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MAX_SETS, 3 * l2 // max(1, n_bytes(vars(inputs))) + 1))


def contenders(case, peers):
    ours = {"ours": plain(lambda case, i: case.ours(i, IMPL))} if IMPL == "triton" else {}
    theirs = {"torch eager": plain(lambda case, i: case.reference(i))}
    return {**ours, **theirs, **(PEERS.get(case.op, {}) if peers else {})}


def figures(case, kind, ms, ceiling, element_bytes):
    """Rates of one pass, and the fraction of the roofline."""
    works = [case.work[part] for part in kind.split("+")]
    moved = [w.elements * element_bytes + w.bytes for w in works]
    flops = sum(w.flops for w in works)
    bounds = [
        (w.flops / ceiling["gemm_tflops"] / 1e9, b / ceiling["copy_gb_per_s"] / 1e6)
        for w, b in zip(works, moved, strict=True)
    ]
    return {
        "gb_per_s": sum(moved) / ms / 1e6, "tflops": flops / ms / 1e9, "bytes": sum(moved), "flops": flops,
        "fraction": sum(max(b) for b in bounds) / ms,
        "bound": "gemm" if sum(b[0] for b in bounds) >= sum(b[1] for b in bounds) else "copy",
    }  # fmt: skip


def timed(case, ready_sets, repeats, flush):
    """pass -> milliseconds of every repetition."""

    def steps(ready):
        def back(out):
            return ready.back() if ready.back else torch.autograd.grad(as_tuple(out), ready.leaves, ready.upstream)

        return [lambda _: ready.run()] + ([back] if ready.back or ready.leaves else [])

    spent = times([steps(ready) for ready in ready_sets], repeats, flush)
    if len(spent) == 1:
        return {"fwd": spent[0]}
    both = [sum(pair) for pair in zip(*spent, strict=True)]
    return {kind: ms for kind, ms in {"fwd": spent[0], "bwd": spent[1], "fwd+bwd": both}.items() if kind in case.passes}


class Bench:
    """One run: its result, written after every record, and its time."""

    def __init__(self, path=None, minutes=None, repeats=REPEATS, dtype=None):
        self.path, self.repeats = path, repeats
        self.dtype = dtype or (torch.bfloat16 if GPU else torch.float32)
        self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.flush = flusher()
        self.result = {"what": "kernels.bench", "machine": machine(), "dtype": str(self.dtype).removeprefix("torch."),
                       "records": [], "absent": [], "left_out": []}  # fmt: skip
        self.result["ceilings"] = ceilings(repeats, self.flush)
        self.save()

    def save(self):
        if self.path:
            write_json(self.path, self.result)

    def spent(self):
        return time.monotonic() > self.deadline

    def case(self, case, peers=True):
        if self.spent():
            self.result["left_out"].append(f"{case.op} {case.shape}")
            return self.save()
        torch.manual_seed(0)
        first = len(self.result["records"])
        try:
            inputs = case.inputs(DEVICE, self.dtype)
            outputs = as_tuple(case.reference(leaves(case, inputs)))
            upstream = tuple(torch.randn_like(t) if t.is_floating_point() else t for t in outputs)
            truth = Truth(case, inputs, upstream, self.dtype)
            extra = [leaves(case, case.inputs(DEVICE, self.dtype)) for _ in range(n_sets(inputs) - 1)]
            sets = [leaves(case, inputs), *extra]
        except Exception as error:
            return self.failed(case, "inputs and reference", error)
        for who, prepare in contenders(case, peers).items():
            if self.spent():
                self.result["left_out"].append(f"{case.op} {case.shape}: {who}")
                continue
            try:
                self.contender(case, who, prepare, sets, upstream, truth)
            except (Absent, ImportError) as reason:
                absent = {"op": case.op, "shape": case.shape, "who": who, "reason": str(reason)}
                self.result["absent"].append(absent)
            except Exception as error:  # one contender's trouble is not another's
                self.failed(case, who, error)
            free()
        compare(self.result["records"][first:])
        return self.save()

    def contender(self, case, who, prepare, sets, upstream, truth):
        about = {"op": case.op, "shape": case.shape, "who": who}
        if who in UNCHECKED or who == "torch eager":
            ratio = None
        else:
            ratio, complaints = truth.held_against(results(prepare(case, leaves(case, sets[0]), upstream)))
            if complaints:
                return self.add({**about, "wrong": "; ".join(complaints)})
        ready = [prepare(case, inputs, upstream) for inputs in sets]
        for kind, ms in timed(case, ready, self.repeats, self.flush).items():
            figure = spread(ms)
            figure |= figures(case, kind, figure["ms"], self.result["ceilings"], self.dtype.itemsize)
            figure |= {name: case.sizes[name] for name in ("bytes_a_parameter",) if name in case.sizes}
            self.add({**about, "pass": kind, **figure, "error_over_torch": ratio, "sets": len(sets)})

    def failed(self, case, who, error):
        said = str(error).strip().splitlines() or [""]
        record = {"op": case.op, "shape": case.shape, "who": who, "failed": f"{type(error).__name__}: {said[0][:300]}"}
        self.add(record)
        if "CUDA error" in str(error):  # the process can use the device no more
            raise error

    def add(self, record):
        self.result["records"].append(record)
        print(line(record), flush=True)
        self.save()


def compare(records):
    """Adds to each record of one case how its time relates to ours, and to ours how it relates to the bare GEMMs."""
    ms = {(r["who"], r["pass"]): r["ms"] for r in records if "ms" in r}
    for r in records:
        if "ms" in r and ("ours", r["pass"]) in ms:
            r["times_ours"] = r["ms"] / ms["ours", r["pass"]]
        if "ms" in r and ("bare GEMM", r["pass"]) in ms:
            r["times_gemm"] = r["ms"] / ms["bare GEMM", r["pass"]]


def free():
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


# ---- what is printed ------------------------------------------------------------------------------------------------


def line(r):
    head = f"{r['op']:<21}{r['shape']:<42}{r['who']:<25}"
    for problem in ("wrong", "failed"):
        if problem in r:
            return f"{head}{'WRONG RESULT' if problem == 'wrong' else 'failed'}: {r[problem]}"
    rate = f"{r['tflops']:8.1f} TFLOP/s" if r["bound"] == "gemm" else f"{r['gb_per_s']:8.1f} GB/s   "
    times = f"  {r['times_ours']:5.2f}x ours" if "times_ours" in r and r["who"] != "ours" else ""
    gemm = f"  {r['times_gemm']:5.2f}x bare GEMM" if "times_gemm" in r and r["who"] == "ours" else ""
    return f"{head}{r['pass']:<8}{r['ms']:10.4f} ms {rate} {r['fraction']:7.1%} of {r['bound']}{times}{gemm}"


def missing(result):
    """[(op, who, reason, shapes)]: who took no part, and where; no shapes: nowhere."""
    took_part, grouped = {(r["op"], r["who"]) for r in result["records"]}, {}
    for r in result["absent"]:
        shapes = grouped.setdefault((r["op"], r["who"], r["reason"]), [])
        if (r["op"], r["who"]) in took_part:
            shapes.append(r["shape"])
    return [(*key, shapes) for key, shapes in grouped.items()]


def summary(result):
    """The last lines that are printed: every record, then what is not among them and why."""
    ceiling, device = result["ceilings"], result["machine"]["device"]
    lines = ["", f"{device}: copy {ceiling['copy_gb_per_s']:.1f} GB/s, GEMM {ceiling['gemm_tflops']:.2f} TFLOP/s"]
    lines += [line(record) for record in result["records"]]
    for op, who, reason, shapes in missing(result):
        lines.append(f"{op}: without {who}{' at ' * bool(shapes)}{'; '.join(shapes)}: {reason}")
    return "\n".join(lines + [f"left out for time: {name}" for name in result["left_out"]])


# ---- command --------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = list(full() if GPU else toy())
    ops = list(dict.fromkeys(case.op for case in cases))
    parser.add_argument("--op", nargs="+", metavar="NAME", choices=ops, default=ops, help=f"of {', '.join(ops)} (all)")
    parser.add_argument(
        "--json", metavar="FILE", help="where the figures go; written after every measurement (nowhere)"
    )
    parser.add_argument("--plot", metavar="DIR", help="draw rooflines there; needs matplotlib (no pictures)")
    parser.add_argument("--minutes", type=float, help="begin no measurement after this long (no limit)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"of each measurement ({REPEATS})")
    parser.add_argument("--no-peers", action="store_true", help="ours and torch eager alone (all that are installed)")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, each measured once, to see that it works")
    args = parser.parse_args(argv)
    if args.smoke:
        cases, args.repeats = list(toy()), 1
    if not GPU:
        kernels = "the kernels in Triton's interpreter" if INTERPRETED else "no kernels (TRITON_INTERPRET=1 adds them)"
        print(f"No GPU: the references and {kernels}, at toy sizes. These times say nothing of a GPU.")
        args.repeats = min(args.repeats, 5)
    bench = Bench(args.json, args.minutes, args.repeats)
    for case in cases:
        if case.op in args.op:
            bench.case(case, peers=not args.no_peers)
            free()
    print(summary(bench.result))
    if args.plot:
        from kernels.measure.plot import draw

        for path in draw(bench.result, args.plot):
            print(f"drew {path}")


if __name__ == "__main__":
    main()
