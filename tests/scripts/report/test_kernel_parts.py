"""The report's kernel benchmarks in processes that die."""

import itertools
import json
import re
from types import SimpleNamespace

import pytest

from scripts import gpu_report
from scripts.base.results import write_json
from scripts.report import kernel_parts
from scripts.report.report import Report
from tests.helpers.calls import Calls


def test_benchmarks_of_a_process_that_dies_are_kept(tmp_path, monkeypatch):
    report = Report(tmp_path / "report.json", minutes=600, smoke=True)
    record = {"op": "rope", "shape": "s", "who": "ours", "failed": "RuntimeError: CUDA error: ..."}

    def dies(command, limit_s, every):
        op = command[command.index("--op") + 1]
        found = {
            "records": [record | {"op": op}],
            "absent": [],
            "left_out": [f"{op} x"],
            "dtype": "bfloat16",
            "ceilings": {"a": 1.0},
        }
        write_json(command[command.index("--json") + 1], found)
        every()
        return -6

    monkeypatch.setattr(kernel_parts, "run_command", dies)
    kernel_parts.run_bench(report, ["rope"])
    kernel_parts.run_bench(report, ["swiglu"])
    kernels = json.loads(report.path.read_text())["parts"]["kernels"]
    assert kernels["records"] == [record, record | {"op": "swiglu"}]
    assert kernels["left_out"] == ["rope x", "swiglu x"]
    assert kernels["ended"] == {"rope": "with exit code -6", "swiglu": "with exit code -6"}
    assert "kernels.bench rope ended with exit code -6" in gpu_report.format_report(report.result)


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "report.json", minutes=600, smoke=False)


def bench(found_of, code=0):
    """Return a stand-in for run_command: kernels.bench that finds these records of its ops."""

    def run(command, limit_s, every=lambda: None, **_):
        ops = command[command.index("--op") + 1 : command.index("--json")]
        empty = {"absent": [], "left_out": [], "dtype": "bfloat16", "ceilings": {"of": ops[0]}}
        write_json(command[command.index("--json") + 1], empty | found_of(ops))
        return code

    return run


def test_an_op_that_was_cut_short_is_measured_again_and_told_once(report, monkeypatch):
    runs = iter([["a x", "a y"], []])

    def found(ops):
        return {"records": [{"op": op, "shape": "s"} for op in ops], "left_out": next(runs)} if ops == ["a"] else {
            "records": [{"op": op, "shape": "s"} for op in ops]}  # fmt: skip

    monkeypatch.setattr(kernel_parts, "run_command", bench(found))
    for _ in range(3):
        kernel_parts.run_benchmarks(report, ["a", "b"])
    part = json.loads(report.path.read_text())["parts"]["kernels"]
    assert sorted(r["op"] for r in part["records"]) == ["a", "b"] and part["left_out"] == []
    assert part["ceilings"] == {"a": {"of": "a"}, "b": {"of": "b"}}


def test_main_ops_and_all_others_are_every_op_once(report, monkeypatch):
    measured = []
    monkeypatch.setattr(kernel_parts, "run_bench", lambda report, ops: measured.extend(ops))
    kernel_parts.run_main_benchmarks(report)
    assert measured == list(kernel_parts.MAIN_OPS)
    kernel_parts.run_other_benchmarks(report)
    assert sorted(measured) == sorted({case.op for case in kernel_parts.full_cases()})


def test_a_linear_map_is_of_the_shape_that_its_name_says():
    maps = kernel_parts.linear_maps(64, smoke=False)
    dim, hidden = 4096, 11008
    assert maps == {
        "qkv": (64, dim, 3 * dim), "o": (64, dim, dim), "gate_up": (64, dim, 2 * hidden), "down": (64, hidden, dim),
        "head": (32, dim, 32000),
    }  # fmt: skip


def test_ceilings_are_measured_once_and_each_product_by_itself(report, monkeypatch):
    asked = []
    monkeypatch.setattr(kernel_parts, "measure_peak_rates", lambda *_: {"copy_gb_per_s": 1.0})
    rate = lambda repeats, flush, product, *sizes: asked.append((product, sizes[:3])) or 1.0  # noqa: E731
    monkeypatch.setattr(kernel_parts, "measure_product_rate", rate)
    monkeypatch.setattr(
        kernel_parts, "measure_sustained", lambda product, *_: {"fwd": 1, "dgrad": 2, "wgrad": 3}[product]
    )
    monkeypatch.setattr(kernel_parts, "query_nvidia_smi", lambda *_: None)
    for _ in range(2):
        kernel_parts.measure_ceilings(report)
    found = report.result["parts"]["ceilings"]
    maps = [sizes for tokens in kernel_parts.TOKENS for sizes in kernel_parts.linear_maps(tokens, False).values()]
    wanted = [(product, sizes) for sizes in maps for product in kernel_parts.PRODUCTS]
    assert asked == wanted and found["gemm_tflops_sustained"] == {"fwd": 1, "dgrad": 2, "wgrad": 3}


@pytest.mark.parametrize(("code", "said"), [(0, "7 launches, 2 violations"), (1, "7 launches, 2 violations"), (3, "x")])
def test_what_the_gate_counts_is_told_and_a_gate_that_dies(code, said, report, monkeypatch):
    def run(command, limit_s, environment, stdout, stderr):
        assert environment["TRITON_INTERPRET"] == "0" and command[command.index("--chip") + 1] == "sm_90"
        stdout.write(f"noise\n{said}, Triton 3\n")
        return code

    monkeypatch.setattr(kernel_parts, "run_command", run)
    kernel_parts.warm_up(report)
    found = report.result["parts"]["warm_up"]
    if code < 3:
        assert (found["launches"], found["violations"]) == (7, 2) and "failed" not in found
    else:
        assert found["failed"] == "kernels.static ended with exit code 3" and found["launches"] is None


@pytest.mark.parametrize("code", [0, 1, None])
def test_tuning_takes_the_time_that_is_left_and_writes_beside_the_report(code, report, monkeypatch, tmp_path):
    given = []

    def run(command, limit_s, environment):
        given.append(dict(zip(command[3::2], command[4::2], strict=False)))
        (tmp_path / "launch").mkdir(exist_ok=True)
        (tmp_path / "launch" / "rope.json").touch()
        return code

    monkeypatch.setattr(kernel_parts, "run_command", run)
    report.deadline = report.clock() + 120
    if code == 0:
        kernel_parts.tune_kernels(report, tmp_path / "launch")
        assert report.result["parts"]["tune"] == {"tables": ["rope.json"]}
    else:
        with pytest.raises(RuntimeError, match=r"kernels\.tune ended"):
            kernel_parts.tune_kernels(report, tmp_path / "launch")
    assert given[0]["--out"] == str(tmp_path / "launch") and 1.9 < float(given[0]["--minutes"]) <= 2.0


def test_a_report_goes_on_on_the_device_it_began_on(report, monkeypatch):
    monkeypatch.setattr(kernel_parts, "query_nvidia_smi", lambda *_: None)
    for device in ("H200", "H200"):
        monkeypatch.setattr(kernel_parts, "describe_machine", lambda device=device: {"device": device})
        kernel_parts.measure_machine(report)
    monkeypatch.setattr(kernel_parts, "describe_machine", lambda: {"device": "H100"})
    with pytest.raises(ValueError, match="is a report of H200, this is H100"):
        kernel_parts.measure_machine(report)


def test_peers_that_took_no_part_are_printed():
    absent = [{"op": "rope", "shape": "s", "who": "liger", "reason": "is not installed"}]
    part = {"records": [], "absent": absent, "left_out": ["rope t"], "ended": {"swiglu": "after its limit"}}
    text = "\n".join(kernel_parts.format_benchmarks(part))
    assert "rope: without liger: is not installed" in text and "left out for time: rope t" in text
    assert "kernels.bench swiglu ended after its limit" in text


def test_kernels_are_compiled_for_the_chip_at_hand(report, monkeypatch):
    asked = []
    monkeypatch.setattr(kernel_parts, "GPU", True)
    monkeypatch.setattr(kernel_parts, "chip", lambda device: "sm_80")
    monkeypatch.setattr(kernel_parts, "run_command", lambda command, *_, **__: asked.append(command) or 0)
    kernel_parts.warm_up(report)
    assert asked[0][asked[0].index("--chip") + 1] == "sm_80"


def test_a_machine_is_told_with_its_clocks(report, monkeypatch):
    monkeypatch.setattr(kernel_parts, "describe_machine", lambda: {"device": "H200", "torch": "2"})
    monkeypatch.setattr(kernel_parts, "query_nvidia_smi", lambda *names: list(names))
    kernel_parts.measure_machine(report)
    clocks = ["clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit"]
    assert report.result["parts"]["machine"] == {"device": "H200", "torch": "2", "clocks": clocks}


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_ceilings_are_told_whole(smoke, gpu, tmp_path, monkeypatch, snapshot):
    """What is measured, how often, in what type; sustained rates come after the first size, and before the others."""
    calls, rates = Calls(), itertools.count(1)
    report = Report(tmp_path / "report.json", minutes=600, smoke=smoke)
    monkeypatch.setattr(kernel_parts, "GPU", gpu)
    for name, result in {
        "make_l2_flush": "flush", "measure_peak_rates": {"copy_gb_per_s": 4.0}, "query_nvidia_smi": "clocks",
        "measure_product_rate": lambda *_: float(next(rates)), "measure_sustained": lambda *_: float(next(rates)),
    }.items():  # fmt: skip
        monkeypatch.setattr(kernel_parts, name, calls.stand_in(name, result))
    begun = report.may_begin
    monkeypatch.setattr(report, "may_begin", calls.stand_in("may_begin", begun))
    kernel_parts.measure_ceilings(report)
    log = [line.replace(repr(kernel_parts.CLOCKS)[1:-1], "CLOCKS") for line in calls.lines]
    if not smoke:  # of three sizes, the first and the sustained ones are told
        log = [*log[:20], f"{len(log)} lines"]
    log = [re.sub(r"dict_values\((.*)\)", r"\1", line) for line in log]
    assert "\n".join([*log, *kernel_parts.format_ceilings(report.result["parts"]["ceilings"])]) == snapshot


def test_what_there_is_no_time_for_is_left_out(report, monkeypatch):
    monkeypatch.setattr(kernel_parts, "make_l2_flush", lambda: None)
    monkeypatch.setattr(kernel_parts, "measure_peak_rates", lambda *_: {"copy_gb_per_s": 4.0})
    for name in ("measure_product_rate", "measure_sustained"):
        monkeypatch.setattr(kernel_parts, name, lambda *_: pytest.fail("it is measured"))
    report.deadline = report.clock() - 1
    kernel_parts.measure_ceilings(report)
    assert report.result["parts"]["ceilings"] == {"copy_gb_per_s": 4.0}
    sizes = [f"GEMMs at T={tokens}" for tokens in (16384, 8192, 4096)]
    assert report.result["left_out"] == [sizes[0], "sustained GEMMs", *sizes[1:]]


def test_numbers_alone_are_ceilings():
    figures = {"a": 1.25, "b": {"c": 2.0, "d": "x"}, "e": 7, "f": "text"}
    assert kernel_parts.format_ceilings(figures) == [f"  a{' ' * 50}1.2", f"  b c{' ' * 48}2.0"]


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("cores", [1, 2, 8, None])
def test_the_gate_has_all_cores_but_two(smoke, cores, tmp_path, monkeypatch):
    ran, now = [], iter([100.0, 107.5])
    report = Report(tmp_path / "report.json", minutes=600, smoke=smoke)
    report.clock = lambda: next(now)
    monkeypatch.setattr(kernel_parts, "GPU", False)
    monkeypatch.setattr(kernel_parts.os, "cpu_count", lambda: cores)
    run = lambda command, limit_s, **how: ran.append((command, limit_s, how)) or 0  # noqa: E731
    monkeypatch.setattr(kernel_parts, "run_command", run)
    kernel_parts.warm_up(report)
    ((command, limit_s, how),) = ran
    workers = 6 if cores == 8 else 1
    more = ["--op", "grad_norm"] if smoke else []
    assert command[1:] == ["-m", "kernels.static", "--chip", "sm_90", "--workers", str(workers), *more]
    assert limit_s == 120 and how["stderr"] == kernel_parts.subprocess.STDOUT
    found = report.result["parts"]["warm_up"]
    assert found == {"seconds": 7.5, "workers": workers, "violations": None, "launches": None}


def test_ops_of_a_smoke_run_are_those_of_its_cases(monkeypatch):
    case = lambda *ops: [SimpleNamespace(op=op) for op in ops]  # noqa: E731
    monkeypatch.setattr(kernel_parts, "toy_cases", lambda: case("rope", "adamw", "rope"))
    monkeypatch.setattr(kernel_parts, "full_cases", lambda: case("nf4", "swiglu", "rope"))
    main = ["attention", "adamw", "rms_norm", "swiglu"]
    assert kernel_parts.bench_ops(True) == [*main, "rope"] and kernel_parts.bench_ops(False) == [*main, "nf4", "rope"]


@pytest.mark.parametrize("smoke", [False, True])
def test_ops_have_a_process_each_and_in_a_smoke_run_one(smoke, tmp_path, monkeypatch):
    ran = []
    report = Report(tmp_path / "report.json", minutes=600, smoke=smoke)
    monkeypatch.setattr(report, "seconds_left", lambda: 90.0)

    def run(command, limit_s, every):
        ran.append((command[1:], limit_s))
        return 0

    monkeypatch.setattr(kernel_parts, "run_command", run)
    kernel_parts.run_benchmarks(report, ["a", "b"])
    groups = [["a", "b"]] if smoke else [["a"], ["b"]]
    words = [(["-m", "kernels.bench", "--op", *group, "--json"], ["--minutes", "1.500"]) for group in groups]
    for (command, limit_s), (first, last) in zip(ran, words, strict=True):
        assert command[: len(first)] == first and command[len(first) + 1 :] == last + ["--smoke"] * smoke
        assert limit_s == 90.0 + kernel_parts.GRACE_S
    kernel_parts.run_benchmarks(report, [])
    assert len(ran) == len(groups)


def test_what_is_printed_of_benchmarks(monkeypatch):
    record = {"op": "rope", "shape": "s", "who": "ours", "pass": "fwd", "failed": "it broke"}
    part = {
        "records": [record], "absent": [{"op": "rope", "shape": "s", "who": "x", "reason": "not there"}],
        "left_out": ["nf4 t"], "ended": {"adamw": "after its limit"},
    }  # fmt: skip
    monkeypatch.setattr(
        kernel_parts, "find_absent", lambda part: [("rope", "x", "no", ["s", "t"]), ("nf4", "y", "z", [])]
    )
    assert kernel_parts.format_benchmarks(part) == [
        kernel_parts.format_record(record), "rope: without x at s; t: no", "nf4: without y: z",
        "kernels.bench adamw ended after its limit", "left out for time: nf4 t",
    ]  # fmt: skip
    assert kernel_parts.format_benchmarks({"failed": "x"}) == []


@pytest.mark.parametrize("smoke", [False, True])
def test_tuning_has_a_cache_of_its_own(smoke, tmp_path, monkeypatch):
    ran = []
    report = Report(tmp_path / "report.json", minutes=600, smoke=smoke)
    monkeypatch.setattr(report, "seconds_left", lambda: -5.0)
    run = lambda command, limit_s, environment: ran.append((command[1:], limit_s, environment)) or 0  # noqa: E731
    monkeypatch.setattr(kernel_parts, "run_command", run)
    (tmp_path / "launch").mkdir()
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / "launch" / name).touch()
    kernel_parts.tune_kernels(report, tmp_path / "launch")
    ((command, limit_s, environment),) = ran
    flags = ["--minutes", "0.017", "--out", str(tmp_path / "launch")]
    assert command == ["-m", "kernels.tune", *flags, *["--smoke"] * smoke] and limit_s == 1 + kernel_parts.GRACE_S
    assert list(environment) == ["TRITON_CACHE_DIR"] and report.result["parts"]["tune"] == {
        "tables": ["a.json", "b.json"]
    }
