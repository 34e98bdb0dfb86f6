"""Everything worth measuring on a GPU machine, in one command and one file, within minutes and without a network.

    python -m scripts.gpu_report [--minutes 10] [--only machine,ceilings,...] [--json benchmarks/<device>.json]

Parts: what the machine is; its ceilings (copy, GEMMs at the shapes of LLaMA-7B); the kernel tests on the device;
whole training steps at the shapes of LLaMA-7B and of a 1.1B model, where their time goes, and the same steps by peers;
what FSDP2 and states that are written meanwhile take from them; kernels.bench with every peer that is installed. The
JSON is replaced whole after each measurement, so that an interruption costs one at most; a part that fails is recorded
with its error and the rest goes on; no measurement begins once the time is spent, and what was left out is named. Tests
and benchmarks run in processes of their own, one a test file and one an op: a kernel that breaks the device's context
takes no other down.

--smoke runs every part at toy size on a CPU, the kernels in Triton's interpreter. scripts/pages/benchmarks.py turns
the JSON into README's table.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported, here and in the processes begun from here

from kernels.measure.cases import full_cases, toy_cases
from kernels.measure.clock import make_l2_flush, measure_gemm_rate, measure_peak_rates
from kernels.measure.machine import DEVICE, GPU, describe_machine, query_nvidia_smi, write_json
from kernels.measure.results import find_absent, format_record

ROOT = Path(__file__).parent.parent
TESTS = {  # name in the report: file
    **{name: f"tests/kernels/ops/test_{name}.py" for name in (
        "references", "attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy", "adamw"
    )},
    "llama": "tests/engine/model/test_llama.py", "run_ahead": "tests/engine/training/test_run_ahead.py",
}  # fmt: skip
TOKENS = (4096, 8192, 16384)  # of a micro-batch
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
TEST_LIMIT_S = 180  # of one test file


class Report:
    """The result so far, on disk after every change, and the time that is left."""

    def __init__(self, path, minutes, smoke):
        self.path, self.smoke = Path(path), smoke
        self.end = self.deadline = time.monotonic() + 60 * minutes
        self.result = {"what": "scripts.gpu_report", "smoke": smoke, "minutes": minutes, "parts": {}, "left_out": []}

    def save(self):
        write_json(self.path, self.result)

    def put(self, part, **figures):
        self.result["parts"].setdefault(part, {}).update(figures)
        self.save()

    def left(self):
        """Seconds until the part under way must have begun its last measurement."""
        return self.deadline - time.monotonic()

    def take(self, name):
        """Whether there is time to begin this measurement; noted if not."""
        if self.left() > 0:
            return True
        self.result["left_out"].append(name)
        self.save()
        return False


# ---- parts ----------------------------------------------------------------------------------------------------------


def machine_facts(report):
    report.put("machine", **describe_machine(), clocks=query_nvidia_smi(*CLOCKS))


def measure_ceilings(report):
    """Copy and GEMM rates; one layer's linear maps and the head: forward, input gradient, weight gradient."""
    repeats = 2 if report.smoke else 10
    flush = make_l2_flush()
    report.put("ceilings", **measure_peak_rates(repeats, flush))
    dim, hidden, vocab = (32, 88, 128) if report.smoke else (4096, 11008, 32000)
    dtype = torch.bfloat16 if GPU else torch.float32
    for tokens in (64,) if report.smoke else TOKENS:
        if not report.take(f"GEMMs at T={tokens}"):
            continue
        rates = {}
        for name, n_in, n_out, rows in (
            ("qkv", dim, 3 * dim, tokens), ("o", dim, dim, tokens), ("gate_up", dim, 2 * hidden, tokens),
            ("down", hidden, dim, tokens), ("head", dim, vocab, tokens // 2),
        ):  # fmt: skip
            shapes = {"fwd": (rows, n_out, n_in), "dgrad": (rows, n_in, n_out), "wgrad": (n_out, n_in, rows)}
            rates |= {
                f"{name}_{kind}": measure_gemm_rate(repeats, flush, *shape, dtype) for kind, shape in shapes.items()
            }
        report.put("ceilings", **{f"gemm_tflops_T{tokens}": rates})


def kernel_tests(report):
    """Each test file on the device in a process of its own: counts, and the first line of every failure."""
    names = list(TESTS)
    only = ["-k", "rms_norm"] if report.smoke else []
    for name in names[:1] if report.smoke else names:
        if report.take(TESTS[name]):
            limit = min(TEST_LIMIT_S, max(20, report.left()))
            report.put("tests", **{name: run_tests(TESTS[name], only, limit)})


def run_tests(path, only, limit):
    # The project's own addopts are for its CI; a plugin that this machine lacks must not matter.
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "-o", "addopts=", "-p", "no:cacheprovider", path, *only]
    with tempfile.TemporaryFile("w+") as output:
        began = time.monotonic()
        ended = run(command, limit, stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        figures = counted(output.read())
    if ended is None:
        figures["ended"] = f"after its limit of {limit:.0f} s"
    elif ended not in (0, 1):
        figures["ended"] = f"with exit code {ended}: {figures['last_line']}"
    return {**figures, "seconds": time.monotonic() - began}


def counted(output):
    """What pytest -v -rfE wrote, also when it was cut short."""
    outcomes = re.findall(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", output, re.M)
    outcome = [word for _, word in outcomes]
    told = dict(re.findall(r"^(?:FAILED|ERROR) (\S+(?: collecting)?.*?)(?: - (.*))?$", output, re.M))
    bad = {name: told.get(name, "") for name, word in outcomes if word in ("FAILED", "ERROR")}
    lines = output.strip().splitlines() or [""]
    return {
        "passed": outcome.count("PASSED"), "failed": outcome.count("FAILED"), "skipped": outcome.count("SKIPPED"),
        "failures": {**bad, **told}, "last_line": lines[-1].strip("= "),
    }  # fmt: skip


def kernel_benchmarks(report):
    """kernels.bench, an op a process; its JSON is taken over while it runs."""
    ops = list(dict.fromkeys(case.op for case in (toy_cases() if report.smoke else full_cases())))
    for group in [ops] if report.smoke else [[op] for op in ops]:
        if report.take(f"kernels.bench --op {' '.join(group)}"):
            bench(report, group)


def bench(report, ops):
    parts = report.result["parts"].setdefault("kernels", {"records": [], "absent": [], "left_out": [], "ended": {}})
    before = {name: list(parts[name]) for name in ("records", "absent", "left_out")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"

        def take_over():
            with contextlib.suppress(OSError):
                found = json.loads(path.read_text())
                parts.update({name: before[name] + found[name] for name in before})
                parts.update(dtype=found["dtype"], ceilings={**parts.get("ceilings", {}), ops[0]: found["ceilings"]})
                report.save()

        command = [sys.executable, "-m", "kernels.bench", "--op", *ops, "--json", str(path)]
        command += ["--minutes", f"{max(report.left(), 1) / 60:.3f}", *(["--smoke"] if report.smoke else [])]
        # A measurement that has begun when the time is up may end: torch.compile alone can take a minute.
        ended = run(command, max(report.left(), 1) + 60, every=take_over)
        take_over()
    if ended != 0:
        for op in ops:
            parts["ended"][op] = "after its limit" if ended is None else f"with exit code {ended}"
        report.save()


def run(command, limit, every=lambda: None, **options):
    """The exit code of a command, or None when it ran past its limit. `every` is called while it runs."""
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"COLUMNS": "240", "PYTHONPATH": paths()}, **options)
    try:
        end = time.monotonic() + limit
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(0.5)
            every()
        return None
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


STEP_PARTS = {  # whose processes are their own
    "step": "step.bench", "profile": "step.breakdown", "peers": "step.peers", "ranks": "step.ranks"
}  # fmt: skip


def step_part(name):
    """What a module of STEP_PARTS measures, imported when it is its turn: what it lacks must not matter before."""
    return lambda report: importlib.import_module(f"scripts.{STEP_PARTS[name]}").part(report, run)


PARTS = {  # name -> what measures it, and the share of the time then left that it may take; the last has all of it
    "machine": (machine_facts, 1.0),
    "ceilings": (measure_ceilings, 0.2),
    "tests": (kernel_tests, 0.4),
    "step": (step_part("step"), 0.5),
    "profile": (step_part("profile"), 0.4),
    "peers": (step_part("peers"), 0.6),
    "ranks": (step_part("ranks"), 0.5),
    "kernels": (kernel_benchmarks, 1.0),
}


# ---- around them ----------------------------------------------------------------------------------------------------

ADDED = []  # folders that --wheels put before everything else


def paths():
    return os.pathsep.join([*ADDED, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def unpack(wheels, folder):
    """Every wheel's files into one folder, first on the path: Triton needs kernels' source as files."""
    for wheel in sorted(Path(wheels).glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    ADDED.append(str(folder))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


def commit():
    """The commit that runs here, and whether files differ from it; None where there is no git."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("-modified" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def measure(report, only):
    for name in only:
        part, share = PARTS[name]
        if report.end < time.monotonic():
            report.result["left_out"].append(name)
            report.save()
            continue
        share = 1.0 if name == only[-1] else share
        report.deadline = time.monotonic() + share * (report.end - time.monotonic())
        began = time.monotonic()
        try:
            part(report)
        except Exception as error:  # what this machine cannot do is recorded as such; the rest goes on
            traceback.print_exc()
            report.put(name, failed=traceback.format_exception_only(error)[-1].strip()[:500])
        report.result.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        report.save()


def table(result):
    parts, lines = result["parts"], []
    facts = parts.get("machine", {})
    lines.append(f"{facts.get('device', DEVICE)}, commit {result.get('commit')}, {facts.get('date', '')}")
    for name, value in parts.get("ceilings", {}).items():
        rates = value if isinstance(value, dict) else {name: value}
        lines += [f"  {key if key == name else f'{name} {key}':<40}{rate:>14.1f}" for key, rate in rates.items()
                  if isinstance(rate, float)]  # fmt: skip
    for name, figures in parts.get("tests", {}).items():
        if isinstance(figures, dict):
            ended = f"; ended {figures['ended']}" if "ended" in figures else ""
            lines.append(
                f"{TESTS[name]}: {figures['passed']} passed, {figures['failed']} failed, "
                f"{figures['skipped']} skipped in {figures['seconds']:.0f} s{ended}"
            )
            lines += [f"    {test}: {said}" for test, said in figures["failures"].items()]
    if "records" in parts.get("kernels", {}):
        kernels = parts["kernels"]
        lines += [format_record(record) for record in kernels["records"]]
        lines += [
            f"{op}: without {who}{' at ' * bool(shapes)}{'; '.join(shapes)}: {reason}"
            for op, who, reason, shapes in find_absent(kernels)
        ]
        lines += [f"kernels.bench {op} ended {how}" for op, how in kernels["ended"].items()]
        lines += [f"left out for time: {name}" for name in kernels["left_out"]]
    for name, module in STEP_PARTS.items():
        if "records" in parts.get(name, {}):
            lines += importlib.import_module(f"scripts.{module}").table(parts[name])
    lines += [f"{name} failed: {part['failed']}" for name, part in parts.items() if "failed" in part]
    lines += [f"left out for time: {name}" for name in result["left_out"]]
    return "\n".join(lines)


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="begin nothing after this long (10)")
    parser.add_argument("--only", help=f"parts, comma-separated, of {', '.join(PARTS)} (all)")
    parser.add_argument("--json", help="where the report goes (benchmarks/<device>.json; with --smoke out/smoke.json)")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask (git's HEAD)")
    parser.add_argument("--wheels", metavar="DIR", help="put the wheels of this folder on the path: peers (none)")
    parser.add_argument("--smoke", action="store_true", help="every part at toy size, on a CPU too")
    args = parser.parse_args(argv)
    args.only = list(PARTS) if args.only is None else args.only.split(",")
    unknown = [name for name in args.only if name not in PARTS]
    if unknown:
        parser.error(f"--only: there is no {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    if not GPU and not args.smoke:
        parser.error("no GPU is visible to torch; --smoke tries every part at toy size on the CPU")
    if args.wheels and not list(Path(args.wheels).glob("*.whl")):
        parser.error(f"--wheels: no *.whl in {args.wheels}")
    slug = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()) if GPU else "cpu"
    args.json = args.json or ("out/smoke.json" if args.smoke else ROOT / "benchmarks" / f"{slug}.json")
    return args


def main(argv=None):
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes begun here end too
    with tempfile.TemporaryDirectory() as folder:
        if args.wheels:
            unpack(args.wheels, folder)
        report = Report(args.json, args.minutes, args.smoke)
        report.result |= {"commit": args.commit or commit(), "date": time.strftime("%Y-%m-%d %H:%M")}
        measure(report, args.only)
    if GPU:
        report.put("machine", clocks_at_the_end=query_nvidia_smi(*CLOCKS))
    print(table(report.result))
    print(f"written to {report.path}")


if __name__ == "__main__":
    main()
