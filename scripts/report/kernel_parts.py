"""Parts of scripts.gpu_report about kernels: the machine, its ceilings, compiling, benchmarks and tuning."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from kernels.measure.cases import full_cases, toy_cases
from kernels.measure.clock import PRODUCTS, make_l2_flush, measure_peak_rates, measure_product_rate, measure_sustained
from kernels.measure.machine import GPU, describe_machine, query_nvidia_smi
from kernels.measure.results import find_absent, format_record
from kernels.ops.common import chip
from scripts.report.processes import GRACE_S, describe_exit, read_records, run_command
from scripts.report.report import Report

TOKENS = (16384, 8192, 4096)  # of a micro-batch
SUSTAINED_S = 5.0
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
MAIN_OPS = ("attention", "adamw", "rms_norm", "swiglu")
WARM_UP_LIMIT_S = 120


# ---- machine and ceilings -------------------------------------------------------------------------------------------


def measure_machine(report: Report) -> None:
    """Add what the machine is and its clocks. Raises ValueError if an earlier run was on another device."""
    found, old = describe_machine(), report.result["parts"].get("machine", {})
    if old.get("device", found["device"]) != found["device"]:
        raise ValueError(f"{report.path} is a report of {old['device']}, this is {found['device']}")
    report.add("machine", **found, clocks=query_nvidia_smi(*CLOCKS))


def linear_maps(tokens: int, smoke: bool) -> dict[str, tuple[int, int, int]]:
    """Return (rows, inputs, outputs) of one LLaMA-7B layer's linear maps, and of the head, whose rows carry loss."""
    dim, hidden, vocab = (32, 88, 128) if smoke else (4096, 11008, 32000)
    return {
        "qkv": (tokens, dim, 3 * dim), "o": (tokens, dim, dim), "gate_up": (tokens, dim, 2 * hidden),
        "down": (tokens, hidden, dim), "head": (tokens // 2, dim, vocab),
    }  # fmt: skip


def measure_ceilings(report: Report) -> None:
    """Add the rates of copies and of GEMMs: as one cube, in each layout of a step at 7B's shapes, and sustained."""
    repeats, flush = 2 if report.smoke else 10, make_l2_flush()
    done = report.result["parts"].get("ceilings", {})
    if "copy_gb_per_s" not in done:
        report.add("ceilings", **measure_peak_rates(repeats, flush))
    dtype = torch.bfloat16 if GPU else torch.float32
    sizes = (64,) if report.smoke else TOKENS
    for tokens in sizes:
        name, maps = f"gemm_tflops_T{tokens}", linear_maps(tokens, report.smoke)
        if name not in done and report.may_begin(f"GEMMs at T={tokens}"):
            rates = {
                f"{name}_{product}": measure_product_rate(repeats, flush, product, *sizes, dtype)
                for name, sizes in maps.items() for product in PRODUCTS
            }  # fmt: skip
            report.add("ceilings", **{name: rates})
        if tokens == sizes[0] and "gemm_tflops_sustained" not in done and report.may_begin("sustained GEMMs"):
            seconds = 0.01 if report.smoke else SUSTAINED_S
            rates = {product: measure_sustained(product, maps.values(), seconds, dtype) for product in PRODUCTS}
            report.add("ceilings", gemm_tflops_sustained=rates, sustained_s=seconds, sustained_tokens=tokens)
            report.add("ceilings", clocks_after=query_nvidia_smi(*CLOCKS))


def format_ceilings(figures: dict) -> list[str]:
    """Return a line for each rate."""
    lines = []
    for name, value in figures.items():
        rates = {f"{name} {key}": rate for key, rate in value.items()} if isinstance(value, dict) else {name: value}
        lines += [f"  {key:<40}{rate:>14.1f}" for key, rate in rates.items() if isinstance(rate, float)]
    return lines


# ---- compiling ------------------------------------------------------------------------------------------------------


def warm_up(report: Report) -> None:
    """Add how long the static gate took to fill Triton's cache with the kernels of this chip, on all but two cores."""
    workers, name = max(1, (os.cpu_count() or 1) - 2), chip(torch.device("cuda")) if GPU else "sm_90"
    command = [sys.executable, "-m", "kernels.static", "--chip", name, "--workers", str(workers)]
    command += ["--op", "grad_norm"] if report.smoke else []
    began = report.clock()
    with tempfile.TemporaryFile("w+") as output:
        environment = {"TRITON_INTERPRET": "0"}  # which the gate does not run under
        code = run_command(command, WARM_UP_LIMIT_S, environment=environment, stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    counts = re.search(r"^(\d+) launches, (\d+) violations", text, re.M)
    figures = {"seconds": report.clock() - began, "workers": workers, "violations": None, "launches": None}
    if counts:
        figures |= {"launches": int(counts[1]), "violations": int(counts[2])}
    elif code != 0:
        figures["failed"] = f"kernels.static ended {describe_exit(code)}"
    report.add("warm_up", **figures)


# ---- benchmarks and tuning ------------------------------------------------------------------------------------------


def bench_ops(smoke: bool) -> list[str]:
    """Return the ops of kernels.bench, the main ones first."""
    ops = dict.fromkeys(case.op for case in (toy_cases() if smoke else full_cases()))
    return [*MAIN_OPS, *(op for op in ops if op not in MAIN_OPS)]


def run_main_benchmarks(report: Report) -> None:
    """Add the records of kernels.bench for the ops that take most of a step."""
    run_benchmarks(report, list(MAIN_OPS))


def run_other_benchmarks(report: Report) -> None:
    """Add the records of kernels.bench for all other ops."""
    run_benchmarks(report, bench_ops(report.smoke)[len(MAIN_OPS) :])


def run_benchmarks(report: Report, ops: Sequence[str]) -> None:
    """Add the records of the ops that have none yet, one process for each op. A smoke run has one process for all."""
    part = report.result["parts"].setdefault("kernels", {"records": [], "absent": [], "left_out": [], "ended": {}})
    cut = {line.split()[0] for line in part["left_out"]}
    done = ({r["op"] for r in part["records"]} | part["ended"].keys()) - cut
    waiting = [op for op in ops if op not in done]
    for group in [waiting] if report.smoke else [[op] for op in waiting]:
        if group and report.may_begin(f"kernels.bench --op {' '.join(group)}"):
            run_bench(report, group)


def run_bench(report: Report, ops: Sequence[str]) -> None:
    """Add the records of one kernels.bench process while it makes them, and how it ended if it failed."""
    part = report.result["parts"].setdefault("kernels", {"records": [], "absent": [], "left_out": [], "ended": {}})
    for name in ("records", "absent"):  # of an earlier run that was cut short
        part[name] = [r for r in part[name] if r["op"] not in ops]
    part["left_out"] = [line for line in part["left_out"] if line.split()[0] not in ops]
    before = {name: list(part[name]) for name in ("records", "absent", "left_out")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"

        def take_over():
            if found := read_records(path):
                part.update({name: before[name] + found[name] for name in before})
                part.update(dtype=found["dtype"], ceilings={**part.get("ceilings", {}), ops[0]: found["ceilings"]})
                report.save()

        left_s = max(report.seconds_left(), 1)
        command = [sys.executable, "-m", "kernels.bench", "--op", *ops, "--json", str(path)]
        command += ["--minutes", f"{left_s / 60:.3f}", *(["--smoke"] if report.smoke else [])]
        code = run_command(command, left_s + GRACE_S, every=take_over)  # torch.compile can take a minute
        take_over()
    if code != 0:
        part["ended"] |= dict.fromkeys(ops, describe_exit(code))
        report.save()


def format_benchmarks(part: dict) -> list[str]:
    """Return every record's line, then what is absent, died or was left out."""
    if "records" not in part:
        return []
    lines = [format_record(record) for record in part["records"]]
    for op, who, reason, shapes in find_absent(part):
        where = f" at {'; '.join(shapes)}" if shapes else ""
        lines.append(f"{op}: without {who}{where}: {reason}")
    lines += [f"kernels.bench {op} ended {how}" for op, how in part["ended"].items()]
    return lines + [f"left out for time: {name}" for name in part["left_out"]]


def tune_kernels(report: Report, folder: Path) -> None:
    """Measure launch configurations in the time that is left, and write the tables that change into a folder."""
    left_s = max(report.seconds_left(), 1)
    command = [sys.executable, "-m", "kernels.tune", "--minutes", f"{left_s / 60:.3f}", "--out", str(folder)]
    command += ["--smoke"] if report.smoke else []
    with tempfile.TemporaryDirectory() as cache:  # of its own: candidates that lose are not worth carrying
        code = run_command(command, left_s + GRACE_S, environment={"TRITON_CACHE_DIR": cache})
    if code != 0:
        raise RuntimeError(f"kernels.tune ended {describe_exit(code)}")
    report.add("tune", tables=sorted(path.name for path in folder.glob("*.json")))
