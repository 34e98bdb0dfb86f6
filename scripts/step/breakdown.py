"""Where the time of a training step goes: its kernels by kind, the gaps between them, and whether the host ever waits.

    python -m scripts.step.breakdown [--only NAME ...] [--json FILE] [--minutes M] [--smoke]

torch.profiler watches steps of scripts.step.bench in their steady state. A kernel has the kind of the operator that
launched it, the innermost that KINDS knows. A library GEMM is known by the kernel's name, which decides first. Gaps are
the time from a step's first kernel to the next step's first one in which the computing stream runs no kernel. On a CPU
the table is made from the time that each operator takes itself. This is a part of scripts.gpu_report.
"""

import json
import re
import tempfile
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kernels.base.commands import run_command
from kernels.measure.machine import GPU
from scripts.report.processes import measure_in_processes
from scripts.step.bench import MAIN, VARIANTS, Steps, names_for_card
from scripts.step.records import Records, halve_until_it_fits, parse_arguments
from scripts.step.rows import TOY_TOKENS

PROFILED = ("llama-7b, fp32 states", "llama-7b", "tinyllama-1.1b")
TOP = 15  # kernels that are listed
STEP = "training step "  # begins the name of each step's range in the trace; its number follows
WARMUP = 4  # steps

KINDS = {  # kind: operators; torch.ops.cria.* are ours
    "GEMM": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul"),
    "attention": ("cria::attention_forward", "cria::attention_backward"),
    "norms": ("cria::rms_norm_forward", "cria::rms_norm_backward"),
    "rope": ("cria::rope_rotate", "cria::rope_rotated"),
    "swiglu": ("cria::swiglu_forward", "cria::swiglu_backward", "cria::swiglu_backward_over"),
    "cross entropy": ("cria::linear_cross_entropy_forward", "cria::scaled"),
    "dequantising": ("cria::nf4_dequantise",),
    "optimizer": ("cria::adamw_update", "cria::adamw_update_many"),
    "gradient norm": ("cria::grad_norm", "cria::grad_norm_sums", "cria::grad_norm_of_sums"),
    "embedding": ("aten::embedding", "aten::embedding_dense_backward"),
    "copies and fills": (
        "aten::copy_", "aten::fill_", "aten::zero_", "aten::cat", "aten::index_select", "aten::index",
        "aten::index_copy_", "aten::index_add_",
    ),
}  # fmt: skip
NAMES = (  # kind, pattern in a kernel's name
    ("attention", re.compile(r"flash|fmha|sdpa|^_(dq|dkdv|sum)_kernel", re.I)),
    ("GEMM", re.compile(r"gemm|gemv|nvjet|cutlass|xmma|cublas|split_?k", re.I)),
    # For kernels without a known operator. _forward_kernel and _backward_kernel are names in several files.
    ("rope", re.compile(r"^_rotate_kernel")),
    ("cross entropy", re.compile(r"^_(rows|scale)_kernel")),
    ("optimizer", re.compile(r"^update_(many_)?kernel|FusedAdam|fused_adam", re.I)),
    ("gradient norm", re.compile(r"^_(partial|total)_kernel")),
    ("embedding", re.compile(r"embedding", re.I)),
    ("copies and fills", re.compile(r"Memcpy|Memset|FillFunctor|copy_kernel|CatArray|index", re.I)),
)
KIND_OF = {operator: kind for kind, operators in KINDS.items() for operator in operators}
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace, as torch.profiler exports it
HOST_CALLS = ("cuda_runtime", "cuda_driver")
WAITS = re.compile(
    r"^cu(da)?(Stream|Device|Ctx)Synchronize|^cuda(Memcpy|Memset)(2D|3D|FromSymbol|ToSymbol)?$|^cudaFree$"
)


def kind_of(name: str, operators: list[str]) -> str:
    """Return the kind of a kernel that was launched within these operators, the innermost last."""
    named = next((kind for kind, pattern in NAMES if pattern.search(name)), None)
    if named == "GEMM" or name.startswith("Memcpy"):  # addmm copies its residual with a bare Memcpy first
        return named
    of_operator = next((KIND_OF[o] for o in reversed(operators) if o in KIND_OF), None)
    return of_operator or named or "other"


# ---- a trace --------------------------------------------------------------------------------------------------------


def nest_host_events(events):
    """Yield (event, names of the operators around it) for each event of the host. The outermost operator is first."""
    of_thread = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", *HOST_CALLS):
            of_thread[event["tid"]].append(event)
    for thread in of_thread.values():
        around = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e.get("dur", 0))):
            while around and around[-1]["ts"] + around[-1].get("dur", 0) <= event["ts"]:
                around.pop()
            yield event, [e["name"] for e in around]
            if event["cat"] == "cpu_op":
                around.append(event)


def covered_length(intervals) -> float:
    """Return the length of the union of (begin, end) intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def step_ranges(events):
    """Return [(begin, end)] of the steps' ranges on the host, in order, and the id of the thread that ran them."""
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(STEP)]
    ranges.sort(key=lambda e: e["ts"])
    return [(e["ts"], e["ts"] + e["dur"]) for e in ranges], ranges[0]["tid"]


def break_down_step(events: list[dict], number: int, device: bool) -> dict:
    """Return where the time of one step of a trace goes, in ms. Steps count from 0; times in the trace are in us.

    device: describe the GPU's work, which the trace must hold for this step and the next one; otherwise the host's.
    """
    events = [e for e in events if e.get("ph") == "X"]
    if device and not any(e.get("cat") == "kernel" for e in events):
        raise RuntimeError("the profiler saw no kernel of the device")
    ranges, thread = step_ranges(events)
    begin, end = ranges[number]
    after = ranges[number + 1][0] if number + 1 < len(ranges) else end
    hosts = list(nest_host_events(events))
    if device:
        wall, work, elsewhere, busy = device_work_of_step(events, hosts, ranges, number)
    else:
        wall, work, busy = host_work_between(hosts, thread, begin, after)
        elsewhere = []
    kinds, by_kernel = dict.fromkeys(KINDS, 0.0) | {"other": 0.0}, defaultdict(lambda: [0.0, 0])
    for name, operators, spent in work:
        kind = kind_of(name, operators)
        kinds[kind] += spent
        by_kernel[name, kind][0] += spent
        by_kernel[name, kind][1] += 1
    kinds["gaps"] = wall - busy
    top = sorted(by_kernel.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "wall_ms": wall / 1e3, "busy_ms": busy / 1e3, "launches": len(work),
        "kinds": {kind: {"ms": us / 1e3, "share": us / wall} for kind, us in kinds.items()},
        "top": [
            {"name": name[:160], "kind": kind, "ms": us / 1e3, "share": us / wall, "times": times}
            for (name, kind), (us, times) in top
        ],
        "other_streams_ms": sum(spent for *_, spent in elsewhere) / 1e3,
        **count_host_calls([(e, around) for e, around in hosts if begin <= e["ts"] < after]),
        "pageable_copies": sum("Pageable" in name for name, *_ in [*work, *elsewhere]),
        "host_ms": (end - begin) / 1e3,
    }  # fmt: skip


def group_device_work(events, hosts, ranges):
    """Return {step number: [(stream, event, operators)]} of the device's work.

    Work belongs to the step in whose range it was launched, by whichever thread; -1 is outside all ranges. None holds
    work whose launch the trace does not show.
    """
    launched = {e["args"]["correlation"]: (e["ts"], o) for e, o in hosts if "correlation" in e.get("args", {})}
    operator = {
        e["args"]["External id"]: (e["ts"], [*around, e["name"]])
        for e, around in hosts
        if e["cat"] == "cpu_op" and "External id" in e.get("args", {})
    }
    work = defaultdict(list)
    for e in events:
        if e.get("cat") not in DEVICE_WORK:
            continue
        args = e.get("args", {})
        launch, operators = launched.get(args.get("correlation"), (None, []))
        if not operators and args.get("External id") in operator:
            began, operators = operator[args["External id"]]
            launch = began if launch is None else launch
        step = None
        if launch is not None:
            step = next((i for i, (begin, end) in enumerate(ranges) if begin <= launch < end), -1)
        work[step].append((args.get("stream"), e, operators))
    return work


def device_work_of_step(events, hosts, ranges, number):
    """Return (wall us, work, work on other streams, busy us) of one step, each work as [(name, operators, us)].

    The computing stream is the busiest one. Work whose launch is unknown belongs to the step during which it ran.
    """
    work = group_device_work(events, hosts, ranges)
    us = Counter()
    for stream, e, _ in work[number]:
        us[stream] += e["dur"]
    if not us:
        raise RuntimeError("no kernel in the trace is known to have been launched by the step")
    computing = us.most_common(1)[0][0]
    began, ended = (min(e["ts"] for stream, e, _ in work[i] if stream == computing) for i in (number, number + 1))
    mine = work[number] + [item for item in work[None] if began <= item[1]["ts"] < ended]
    here = [(e, operators) for stream, e, operators in mine if stream == computing]
    elsewhere = [(e, operators) for stream, e, operators in mine if stream != computing]
    busy = covered_length((e["ts"], e["ts"] + e["dur"]) for e, _ in here)
    return ended - began, *([(e["name"], o, e["dur"]) for e, o in part] for part in (here, elsewhere)), busy


def host_work_between(hosts, thread, begin, end):
    """Return (wall us, work, busy us) of a thread, where work is the time each operator takes without its children."""
    mine = [(e, around) for e, around in hosts if e["tid"] == thread and begin <= e["ts"] < end]
    own, inside = [], []
    for e, around in mine:  # parents come before their children
        del inside[len(around) :]
        if inside:
            own[inside[-1]] -= e["dur"]
        inside.append(len(own))
        own.append(e["dur"])
    work = [(e["name"], [*around, e["name"]], us) for (e, around), us in zip(mine, own, strict=True)]
    return end - begin, work, covered_length((e["ts"], e["ts"] + e["dur"]) for e, _ in mine)


def count_host_calls(hosts):
    """Return the host's CUDA calls in a step, how often it waited for the device, and where.

    Waiting for an event is counted apart: the loop reads the figures of the step before in this way, and that does not
    wait for the step under way.
    """
    calls = Counter(e["name"] for e, _ in hosts if e["cat"] in HOST_CALLS)
    waits = [(e["name"], around) for e, around in hosts if e["cat"] in HOST_CALLS and WAITS.match(e["name"])]
    where = Counter(f"{name} in {around[-1] if around else 'no operator'}" for name, around in waits)
    return {
        "syncs": len(waits), "syncs_where": dict(where.most_common(TOP)),
        "event_waits": calls["cudaEventSynchronize"] + calls["cuEventSynchronize"], "host_calls": dict(calls),
    }  # fmt: skip


# ---- measurement ----------------------------------------------------------------------------------------------------


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if GPU:
        torch.cuda.synchronize()


def trace_steps(steps: Steps, first: int, last: int) -> list[dict]:
    """Return the profiler's events of these steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    synchronize()
    with profile(activities=activities) as watched:
        for step in range(first, last + 1):
            with record_function(f"{STEP}{step}"):
                steps.run(step)
        steps.read_figures()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"), strict=False)["traceEvents"]


def measure_breakdown(name: str, smoke: bool) -> dict:
    """Return the record of a variant's step under the profiler."""
    variant = VARIANTS[name]
    warmup, n_profiled, watched_step = (0, 1, 0) if smoke else (WARMUP, 3, 1)

    def attempt(tokens):
        steps = Steps(replace(variant, tokens=tokens), tokens, warmup + n_profiled, smoke)
        try:
            for step in range(1, warmup + 1):
                steps.run(step)
            steps.read_figures()
            plain = steps.seconds()[1:]  # without the profiler
            events = trace_steps(steps, warmup + 1, warmup + n_profiled)
            return {
                "tokens": tokens, "steps": n_profiled, **break_down_step(events, watched_step, GPU),
                "step_ms_without_profiler": 1e3 * min(plain) if plain else None,
            }  # fmt: skip
        finally:
            steps.close()

    return halve_until_it_fits(TOY_TOKENS if smoke else variant.tokens, 64 if smoke else 512, attempt)


# ---- in scripts.gpu_report ------------------------------------------------------------------------------------------


def measure_part(report) -> None:
    """Add the breakdown of every profiled variant."""
    names = [MAIN] if report.smoke else names_for_card(PROFILED, smoke=False)
    measure_in_processes(report, "profile", "scripts.step.breakdown", names)


def format_part(found: dict) -> list[str]:
    """Return the lines that the report prints."""
    lines = []
    for record in found.get("records", []):
        if "kinds" not in record:
            lines.append(f"where a step of {record['name']} goes: failed: {record['failed']}")
            continue
        lines.append(
            f"where a step of {record['name']} goes: {record['wall_ms']:.1f} ms, {record['launches']} launches, "
            f"{record['syncs']} times the host waited for the device"
        )
        kinds = sorted(record["kinds"].items(), key=lambda item: -item[1]["ms"])
        lines += [f"  {kind:<62}{part['ms']:>10.2f} ms {part['share']:>7.1%}" for kind, part in kinds]
        lines += [
            f"    {top['name'][:58]:<60}{top['ms']:>10.2f} ms {top['share']:>7.1%} in {top['times']} ({top['kind']})"
            for top in record["top"][:TOP]
        ]
        lines += [f"  {where}: {times} times" for where, times in record["syncs_where"].items()]
    return lines


# ---- command --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments("scripts.step.breakdown", __doc__, list(PROFILED), argv)
    records = Records(args.json, args.minutes)
    for name in args.only:
        records.attempt(name, partial(measure_breakdown, name, args.smoke))
    print("\n".join(format_part(records.result)))


if __name__ == "__main__":
    run_command(main)
