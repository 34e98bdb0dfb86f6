"""Where the time of a training step goes: its kernels by kind, the gaps between them, and whether the host ever waits.

    python -m scripts.step.breakdown [--only NAME ...] [--json FILE] [--minutes M] [--smoke]

torch.profiler watches steps of scripts.step.bench in their steady state. A kernel's kind is that of the operator which
launched it, the innermost one that KINDS knows; what library GEMMs are called decides before that. Gaps are the time
from the step's first kernel to the next step's in which the computing stream runs none. On a CPU the same is made of
what each operator takes itself. Part of scripts.gpu_report.
"""

import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kernels.measure.machine import GPU
from scripts.step.bench import TOY_TOKENS, VARIANTS, Steps
from scripts.step.common import Records, in_processes, parse, within_memory

PROFILED = ("llama-7b", "tinyllama-1.1b")
TOP = 15
STEP = "training step "  # of what number: the ranges that steps are told apart by
WARMUP = 4

KINDS = {  # of an operator: torch.ops.cria.* is ours
    "GEMM": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul"),
    "attention": ("cria::attention_forward", "cria::attention_backward"),
    "norms": ("cria::rms_norm_forward", "cria::rms_norm_backward"),
    "rope": ("cria::rope_rotate", "cria::rope_rotated"),
    "swiglu": ("cria::swiglu_forward", "cria::swiglu_backward", "cria::swiglu_backward_over"),
    "cross entropy": ("cria::linear_cross_entropy_forward", "cria::scaled"),
    "optimizer": ("cria::adamw_update",),
    "gradient norm": ("cria::grad_norm",),
    "embedding": ("aten::embedding", "aten::embedding_dense_backward"),
    "copies and fills": (
        "aten::copy_", "aten::fill_", "aten::zero_", "aten::cat", "aten::index_select", "aten::index",
        "aten::index_copy_", "aten::index_add_",
    ),
}  # fmt: skip
NAMES = (  # of a kernel: kind, what its name holds
    ("attention", re.compile(r"flash|fmha|sdpa|^_(dq|dkdv|sum)_kernel", re.I)),
    ("GEMM", re.compile(r"gemm|gemv|nvjet|cutlass|xmma|cublas|split_?k", re.I)),
    # Where no operator is known; _forward_kernel and _backward_kernel are names in several files.
    ("rope", re.compile(r"^_rotate_kernel")),
    ("cross entropy", re.compile(r"^_(rows|scale)_kernel")),
    ("optimizer", re.compile(r"^_update_kernel|FusedAdam|fused_adam", re.I)),
    ("gradient norm", re.compile(r"^_(partial|total)_kernel")),
    ("embedding", re.compile(r"embedding", re.I)),
    ("copies and fills", re.compile(r"Memcpy|Memset|FillFunctor|copy_kernel|CatArray|index", re.I)),
)
ALL = (*KINDS, "other", "gaps")
KIND_OF = {operator: kind for kind, operators in KINDS.items() for operator in operators}
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace, as torch.profiler exports it
HOST_CALLS = ("cuda_runtime", "cuda_driver")
WAITS = re.compile(
    r"^cu(da)?(Stream|Device|Ctx)Synchronize|^cuda(Memcpy|Memset)(2D|3D|FromSymbol|ToSymbol)?$|^cudaFree$"
)


def kind_of(name: str, operators: list[str]) -> str:
    """Of a kernel, launched within these operators, the innermost last."""
    named = next((kind for kind, pattern in NAMES if pattern.search(name)), None)
    if named == "GEMM":
        return named
    of_operator = next((KIND_OF[o] for o in reversed(operators) if o in KIND_OF), None)
    return of_operator or named or "other"


# ---- a trace --------------------------------------------------------------------------------------------------------


def within(events):
    """(event, names of the host's operators around it, the outermost first) of each event of the host; its thread's."""
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


def union(intervals) -> float:
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def bounds(events):
    """[(begin, end)] of the steps' ranges on the host, in their order, and the thread that gave them to the device."""
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(STEP)]
    ranges.sort(key=lambda e: e["ts"])
    return [(e["ts"], e["ts"] + e["dur"]) for e in ranges], ranges[0]["tid"]


def breakdown(events: list[dict], number: int, device: bool) -> dict:
    """Of the step of this number, from 0; in ms. events: of a trace, times in us. device: of a GPU's work, which must
    be in the trace, of this step and of one after it; else of the host's."""
    events = [e for e in events if e.get("ph") == "X"]
    if device and not any(e.get("cat") == "kernel" for e in events):
        raise RuntimeError("the profiler saw no kernel of the device")
    ranges, thread = bounds(events)
    begin, end = ranges[number]
    after = ranges[number + 1][0] if number + 1 < len(ranges) else end
    hosts = list(within(events))
    if device:
        wall, work, elsewhere, busy = of_device(events, hosts, ranges, number)
    else:
        wall, work, busy = of_host(hosts, thread, begin, after)
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
        **host_calls([(e, around) for e, around in hosts if begin <= e["ts"] < after]),
        "pageable_copies": sum("Pageable" in name for name, *_ in [*work, *elsewhere]),
        "host_ms": (end - begin) / 1e3,
    }  # fmt: skip


def of_device(events, hosts, ranges, number):
    """(wall, [(name, operators, us)] on the computing stream, the same on others, busy) of one step. What is launched
    in the range of a step, by whichever thread, belongs to it; what nothing tells the launch of, where it ran."""
    launched = {e["args"]["correlation"]: (e["ts"], o) for e, o in hosts if "correlation" in e.get("args", {})}
    operator = {
        e["args"]["External id"]: (e["ts"], [*around, e["name"]])
        for e, around in hosts
        if e["cat"] == "cpu_op" and "External id" in e.get("args", {})
    }
    of_step = defaultdict(list)  # number -> [(stream, event, operators)]; None: launched no one knows when
    for e in events:
        if e.get("cat") in DEVICE_WORK:
            args = e.get("args", {})
            at, operators = launched.get(args.get("correlation"), (None, []))
            if not operators and args.get("External id") in operator:
                began, operators = operator[args["External id"]]
                at = began if at is None else at
            step = next((i for i, (begin, end) in enumerate(ranges) if at is not None and begin <= at < end), -1)
            of_step[None if at is None else step].append((args.get("stream"), e, operators))
    us = Counter()
    for stream, e, _ in of_step[number]:
        us[stream] += e["dur"]
    if not us:
        raise RuntimeError("no kernel in the trace is known to have been launched by the step")
    computing = us.most_common(1)[0][0]
    began, ended = (min(e["ts"] for stream, e, _ in of_step[i] if stream == computing) for i in (number, number + 1))
    work = of_step[number] + [item for item in of_step[None] if began <= item[1]["ts"] < ended]
    here, elsewhere = (
        [(e, operators) for stream, e, operators in work if (stream == computing) == is_computing]
        for is_computing in (True, False)
    )
    busy = union((e["ts"], e["ts"] + e["dur"]) for e, _ in here)
    return ended - began, *([(e["name"], o, e["dur"]) for e, o in part] for part in (here, elsewhere)), busy


def of_host(hosts, thread, begin, end):
    """The same where there is no device: what each operator of the step's thread takes without those inside it."""
    mine = [(e, around) for e, around in hosts if e["tid"] == thread and begin <= e["ts"] < end]
    own, inside = [], []
    for e, around in mine:  # parents come before their children
        del inside[len(around) :]
        if inside:
            own[inside[-1]] -= e["dur"]
        inside.append(len(own))
        own.append(e["dur"])
    work = [(e["name"], [*around, e["name"]], us) for (e, around), us in zip(mine, own, strict=True)]
    return end - begin, work, union((e["ts"], e["ts"] + e["dur"]) for e, _ in mine)


def host_calls(hosts):
    """What the host called in a step: how often it waited for the device, and where; waiting for one event, as reading
    the figures of the step before does, is no wait for what is under way."""
    calls = Counter(e["name"] for e, _ in hosts if e["cat"] in HOST_CALLS)
    waits = [(e["name"], around) for e, around in hosts if e["cat"] in HOST_CALLS and WAITS.match(e["name"])]
    where = Counter(f"{name} in {around[-1] if around else 'no operator'}" for name, around in waits)
    return {
        "syncs": len(waits), "syncs_where": dict(where.most_common(TOP)),
        "event_waits": calls["cudaEventSynchronize"] + calls["cuEventSynchronize"], "host_calls": dict(calls),
    }  # fmt: skip


# ---- taking it ------------------------------------------------------------------------------------------------------


def measure(name: str, smoke: bool) -> dict:
    variant = VARIANTS[name]
    warmup, profiled, watched_step = (0, 1, 0) if smoke else (WARMUP, 3, 1)

    def attempt(tokens):
        steps = Steps(replace(variant, tokens=tokens), tokens, warmup + profiled, smoke)
        try:
            for step in range(1, warmup + 1):
                steps.take(step)
            steps.read()
            plain = steps.seconds()[1:]  # without the profiler
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
            if GPU:
                torch.cuda.synchronize()
            with profile(activities=activities) as watched:
                for step in range(warmup + 1, warmup + profiled + 1):
                    with record_function(f"{STEP}{step}"):
                        steps.take(step)
                steps.read()
                if GPU:
                    torch.cuda.synchronize()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                watched.export_chrome_trace(str(path))
                events = json.loads(path.read_text(errors="replace"), strict=False)["traceEvents"]
            return {
                "tokens": tokens, "steps": profiled, **breakdown(events, watched_step, GPU),
                "step_ms_without_profiler": 1e3 * min(plain) if plain else None,
            }  # fmt: skip
        finally:
            steps.close()

    least = 64 if smoke else 512
    record, failed = within_memory(TOY_TOKENS if smoke else variant.tokens, least, attempt)
    return record | ({"out_of_memory_at": failed} if failed else {})


# ---- in scripts.gpu_report ------------------------------------------------------------------------------------------


def part(report, run):
    in_processes(report, run, "profile", "scripts.step.breakdown", PROFILED[:1] if report.smoke else PROFILED)


def table(found: dict) -> list[str]:
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


def main(argv=None):
    args = parse("scripts.step.breakdown", __doc__, list(PROFILED), argv)
    records = Records(args.json, args.minutes)
    for name in args.only:
        records.attempt(name, partial(measure, name, args.smoke))
    print("\n".join(table(records.result)))


if __name__ == "__main__":
    sys.exit(main())
