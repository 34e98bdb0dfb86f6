"""scripts.gpu_report at toy size on a CPU, and what interruptions, failures and time do to it."""

import contextlib
import gc
import importlib
import io
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from scripts import gpu_report
from scripts.report import kernel_parts, processes
from scripts.report.report import Report
from tests.helpers.forks import Started
from tests.helpers.run import ROOT, environment
from tests.helpers.tiles import TOY, set_tiles


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "report.json", minutes=1, smoke=True)


def on_disk(report):
    return json.loads(report.path.read_text())


# ---- the whole, at toy size -----------------------------------------------------------------------------------------


def run_here(command, limit_s, every=lambda: None, **options):
    """Run `python -m MODULE ARGS` in this process, in place of processes.run_command: an import of torch is saved."""
    gc.freeze()  # kernels.bench collects garbage after every measurement, and there is much to look through here
    python, flag, module, *argv = command
    assert (python, flag) == (sys.executable, "-m")
    assert not options
    importlib.import_module(module).main(argv)
    every()
    return 0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The report of every part that measures, and its printed table."""
    out = tmp_path_factory.mktemp("smoke")
    parts = [name for name in gpu_report.PARTS if name not in ("tests", "warm_up", "tune")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        set_tiles(patch, TOY)
        patch.setattr(processes, "run_command", run_here)
        patch.setattr(kernel_parts, "run_command", run_here)
        patch.setattr(gpu_report.signal, "signal", lambda *_: None)
        flags = ["--smoke", "--out", str(out), "--commit", "abc", "--minutes", "600", "--only", ",".join(parts)]
        gpu_report.main(flags)
    result = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    (run,) = result["runs"]
    assert set(run["seconds"]) == set(parts) and run["commit"] == result["commit"] == "abc"
    assert result["smoke"] and not result["left_out"]
    assert f"written to {out}" in printed.getvalue().splitlines()[-1]
    return result["parts"], printed.getvalue().split("commit abc")[-1]  # the table comes last


@pytest.mark.timeout(1200)
def test_kernels_at_toy_size(smoke):
    parts, table = smoke
    assert parts["machine"]["torch"] == torch.__version__
    assert parts["ceilings"]["copy_gb_per_s"] > 0 and parts["ceilings"]["gemm_tflops_T64"]["down_wgrad"] > 0
    assert "gemm_tflops_T64 down_wgrad" in table
    kernels = parts["kernels"]
    assert not kernels["ended"] and not [r for r in kernels["records"] if "failed" in r or "wrong" in r]
    assert {r["op"] for r in kernels["records"] if r["who"] == "ours"} == {
        "attention", "rope_attention", "rms_norm", "norm_linear", "rope", "swiglu", "swiglu_linear",
        "linear_cross_entropy", "grad_norm", "adamw", "nf4",
    }  # fmt: skip
    assert "attention: without varlen_attn" in table  # every absent peer


@pytest.mark.timeout(1200)
def test_steps_at_toy_size(smoke):
    parts, table = smoke
    for part, figure in (
        ("step", "tokens_per_s"), ("profile", "kinds"), ("peers", "tokens_per_s"), ("ranks", "largest_loss_apart")
    ):  # fmt: skip
        records = parts[part]["records"]
        assert figure in records[0] and not [r for r in records if "failed" in r], records
    step, peer = parts["step"]["records"][0], parts["peers"]["records"][0]
    assert step["all_finite"] and step["peak_gib"] is None and "computed tokens/s" in step["mfu_formula"]
    kinds = parts["profile"]["records"][0]["kinds"]
    assert all((kinds[kind]["ms"] > 0) == (kind != "dequantising") for kind in kinds)  # no weight is in 4 bits
    assert kinds["attention"]["share"] > kinds["rope"]["share"]
    assert peer["ours_over_peer"] == step["tokens_per_s"] / peer["tokens_per_s"]
    assert "projected from the measured step" in parts["step"]["projections"][0]["what"]
    assert [r.get("over_plain", 0) > 0 for r in parts["ranks"]["records"]] == [False, True, False]
    assert parts["ranks"]["records"][2]["over_unsaved_an_epoch"] > 0
    assert "training step, ours:" in table and "0 times the host waited" in table and "x the plain step" in table


def test_a_report_that_stops_half_way_is_on_disk(tmp_path):
    """Processes of their own: the report's, which ends the tests it has begun when it is told to end, and theirs."""
    path = tmp_path / "report.json"
    flags = ["--smoke", "--only", "machine,tests,second,third", "--out", str(tmp_path), "--minutes", "600"]
    code = f"""
import os, signal
from scripts import gpu_report
def stop(report):
    report.add("second", begun=1)
    os.kill(os.getpid(), signal.SIGKILL)
gpu_report.PARTS |= {{"second": (stop, 1.0), "third": (stop, 1.0)}}
gpu_report.main({flags})
"""
    process = Started(code, env=environment())
    out, err = process.communicate(timeout=250)
    assert process.returncode == -signal.SIGKILL, out + err
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == ["machine", "tests", "second"] and "device" in parts["machine"]
    assert parts["tests"]["references"]["passed"] > 0 and "ended" not in parts["tests"]["references"], parts["tests"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "report.json"]
    assert "test_references.py" in (tmp_path / "log.txt").read_text()


# ---- parts that fail, and time --------------------------------------------------------------------------------------


def test_a_part_that_fails_is_recorded_and_the_next_runs(report, monkeypatch):
    def broken(report):
        report.add("broken", before=1)
        raise RuntimeError("no such card")

    monkeypatch.setitem(gpu_report.PARTS, "broken", (broken, 1.0))
    gpu_report.measure_parts(report, ["broken", "machine"])
    parts = on_disk(report)["parts"]
    assert parts["broken"] == {"before": 1, "failed": "RuntimeError: no such card"} and "device" in parts["machine"]
    assert "broken failed: RuntimeError: no such card" in gpu_report.format_report(report.result)


def test_nothing_begins_after_the_time(tmp_path):
    report = Report(tmp_path / "report.json", minutes=0, smoke=True)
    gpu_report.measure_parts(report, list(gpu_report.PARTS))
    assert on_disk(report)["left_out"] == list(gpu_report.PARTS) and not report.result["parts"]


def test_a_part_has_its_share_of_the_time(tmp_path, monkeypatch):
    report = Report(tmp_path / "report.json", minutes=1000, smoke=True)  # so long that a slow machine does not matter
    left = []

    def measure(report):
        left.append(report.seconds_left() / 60)
        report.deadline = 0
        assert not report.may_begin("the last")

    for name in ("half", "again", "end"):
        monkeypatch.setitem(gpu_report.PARTS, name, (measure, 0.5))
    gpu_report.measure_parts(report, ["half", "again", "end"])
    assert left == pytest.approx([500, 500, 1000], abs=5)  # half of all, half of the rest, all of the rest
    assert on_disk(report)["left_out"] == ["the last"] * 3
    assert "left out for time: the last" in gpu_report.format_report(report.result)


def test_packages_that_a_gpu_machine_lacks_are_not_imported():
    """Only a part that measures with such a package may import it."""
    code = """
import importlib, sys
absent = {"openai", "rapidfuzz", "gguf", "hypothesis", "transformers", "liger_kernel", "matplotlib", "httpx2"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
from scripts import gpu_report
for name in gpu_report.STEP_PARTS:
    gpu_report.step_module(name)
import kernels.bench
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.stdout.endswith("imported\n"), done.stderr


# ---- command line ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_report.parse_arguments([])
    assert stop.value.code == 2 and "no GPU is visible to torch" in capsys.readouterr().err


def test_mistakes_on_the_command_line(capsys, tmp_path):
    for flags, said in ((["--only", "kernels,roofs"], "there is no roofs"), (["--wheels", str(tmp_path)], "no *.whl")):
        with pytest.raises(SystemExit) as stop:
            gpu_report.parse_arguments(["--smoke", *flags])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert str(gpu_report.parse_arguments(["--smoke"]).json) == "out/smoke/report.json"  # not among README's figures


@pytest.mark.parametrize(
    ("status", "error", "commit"),
    [("", None, "abc"), (" M engine/x.py\n", None, "abc-modified"), ("", FileNotFoundError("git"), None),
     ("", subprocess.CalledProcessError(128, "git"), None)],
)  # fmt: skip
def test_figures_of_a_changed_checkout_are_not_those_of_its_commit(status, error, commit, monkeypatch):
    def git(command, **_):
        if error:
            raise error
        return SimpleNamespace(stdout="abc\n" if command[1] == "rev-parse" else status)

    monkeypatch.setattr(gpu_report.subprocess, "run", git)
    assert gpu_report.find_commit() == commit


def test_every_part_is_measured_by_its_own_function():
    """Each of the parts that share a module by another one."""
    measured = []
    with pytest.MonkeyPatch.context() as patch:
        for part in gpu_report.STEP_PARTS:
            for function in ("measure_part", "measure_other_variants", "measure_checks"):
                name = f"{part} {function}"
                if hasattr(module := gpu_report.step_module(part), function):
                    patch.setattr(module, function, lambda report, name=name: measured.append(name))
        for part in ("step", "profile", "checks", "peers", "variants", "ranks"):
            gpu_report.PARTS[part][0](None)
    assert measured == [
        "step measure_part", "profile measure_part", "ranks measure_checks", "peers measure_part",
        "step measure_other_variants", "ranks measure_part",
    ]  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch):
    """What main() gives its parts, by their names."""
    given = SimpleNamespace(carried=[], copied=[], dropped=0, wheels=[], measured=[])

    class Stand:
        def __init__(self, path, minutes, smoke, **facts):
            given.report = {"path": path, "minutes": minutes, "smoke": smoke, **facts}
            self.result = {}

        def drop_failures(self):
            given.dropped += 1

    @contextlib.contextmanager
    def note(places, *_):
        yield places.append(_[0])

    monkeypatch.setattr(gpu_report, "Report", Stand)
    monkeypatch.setattr(gpu_report, "copy_output", lambda path: note(given.copied, path))
    monkeypatch.setattr(gpu_report, "carry_cache", lambda out, folder: note(given.carried, out))
    monkeypatch.setattr(gpu_report, "unpack_wheels", lambda wheels, folder: given.wheels.append(wheels))
    monkeypatch.setattr(gpu_report, "measure_parts", lambda report, names: given.measured.append(names))
    monkeypatch.setattr(gpu_report, "format_report", lambda result: "")
    monkeypatch.setattr(gpu_report, "GPU", False)
    monkeypatch.setattr(gpu_report.signal, "signal", lambda number, handler: given.__setattr__("handler", handler))
    return given


def test_every_flag_reaches_the_part_that_obeys_it(stand_ins, tmp_path):
    (tmp_path / "a.whl").touch()
    flags = {"--out": tmp_path / "out", "--minutes": "3", "--only": "tune,machine", "--json": tmp_path / "x.json",
             "--commit": "abc", "--wheels": tmp_path}  # fmt: skip
    gpu_report.main([str(word) for pair in flags.items() for word in pair] + ["--smoke", "--again"])
    report = stand_ins.report
    assert (report["path"], report["minutes"], report["smoke"]) == (tmp_path / "x.json", 3.0, True)
    assert (report["out"], report["commit"], report["device"]) == (tmp_path / "out", "abc", "CPU")
    assert stand_ins.measured == [["tune", "machine"]] and stand_ins.dropped == 1
    assert stand_ins.wheels == [str(tmp_path)] and stand_ins.carried == [tmp_path / "out"]
    assert stand_ins.copied == [tmp_path / "out" / "log.txt"] and (tmp_path / "out").is_dir()
    with pytest.raises(SystemExit) as stop:
        stand_ins.handler()
    assert stop.value.code == 143  # not as a run that is done


def test_without_flags_every_part_is_measured_and_nothing_is_forgotten(stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_report, "find_commit", lambda: "of git")
    gpu_report.main(["--smoke"])
    assert stand_ins.measured == [list(gpu_report.PARTS)] and stand_ins.dropped == 0 and stand_ins.wheels == []
    assert str(stand_ins.report["path"]) == "out/smoke/report.json" and stand_ins.report["commit"] == "of git"


def test_what_failed_is_printed_beside_what_was_measured():
    tests = {"rope": {"passed": 5, "failed": 1, "skipped": 2, "seconds": 3.0, "failures": {"test_a": "why"}}}
    result = {"parts": {"tests": tests, "tune": {"failed": "no time"}}, "commit": "abc", "left_out": ["peers: a"]}
    text = gpu_report.format_report(result)
    for said in ("5 passed, 1 failed, 2 skipped", "test_a: why", "tune failed: no time", "left out for time: peers: a"):
        assert said in text


def test_a_report_is_printed_in_the_order_of_its_parts(monkeypatch):
    for module, name in ((kernel_parts, "format_ceilings"), (kernel_parts, "format_benchmarks"),
                         (gpu_report.kernel_tests, "format_tests")):  # fmt: skip
        monkeypatch.setattr(module, name, lambda part, name=name: [f"{name} {part}"])
    for part in gpu_report.STEP_PARTS:
        formatted = lambda found, part=part: [f"{part}: {found['records']}"]  # noqa: E731
        monkeypatch.setattr(gpu_report.step_module(part), "format_part", formatted)
    parts = {
        "machine": {"device": "H200", "date": "today"}, "ceilings": 1, "tests": 2, "kernels": {"records": 3},
        "ranks": {"records": [4]}, "step": {"records": [5], "failed": "x"}, "profile": {"failed": "y"},
    }  # fmt: skip
    parts = {name: part if isinstance(part, dict) else {"n": part} for name, part in parts.items()}
    result = {"parts": parts, "commit": "abc", "left_out": ["z"]}
    assert gpu_report.format_report(result).splitlines() == [
        "H200, commit abc, today", "format_ceilings {'n': 1}", "format_tests {'n': 2}",
        "format_benchmarks {'records': 3}", "step: [5]", "ranks: [4]", "step failed: x", "profile failed: y",
        "left out for time: z",
    ]  # fmt: skip
    first = gpu_report.format_report({"parts": {}, "left_out": []}).splitlines()[0]
    assert first == f"{gpu_report.DEVICE}, commit None, "


def test_shares_of_the_time():
    shares = {name: share for name, (_, share) in gpu_report.PARTS.items()}
    assert shares == {
        "machine": 1.0, "warm_up": 0.3, "tests": 0.45, "ceilings": 0.3, "step": 0.9, "profile": 0.4, "kernels": 0.7,
        "checks": 0.7, "peers": 0.7, "variants": 0.5, "ranks": 0.5, "other_kernels": 0.6, "tune": 1.0,
    }  # fmt: skip


def test_tables_are_tuned_beside_the_report(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(kernel_parts, "tune_kernels", lambda report, folder: given.append(folder))
    gpu_report.tune(SimpleNamespace(out=tmp_path))
    assert given == [tmp_path / "launch"]


@pytest.mark.parametrize(("smoke", "out"), [(True, "out/smoke"), (False, "out/nvidia_h100_80gb_hbm3")])
def test_on_a_gpu_the_folder_is_named_after_it(smoke, out, monkeypatch):
    monkeypatch.setattr(gpu_report, "GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    args = gpu_report.parse_arguments(["--smoke"] if smoke else [])
    assert (str(args.out), str(args.json)) == (out, f"{out}/report.json") and args.device == "NVIDIA H100 80GB HBM3"
    assert args.minutes == 8.0 and args.only == list(gpu_report.PARTS) and not args.again


def test_on_a_gpu_its_clocks_are_told_at_the_end_and_the_report_is_printed(stand_ins, tmp_path, monkeypatch, capsys):
    added = []
    monkeypatch.setattr(gpu_report, "GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H")
    monkeypatch.setattr(gpu_report.Report, "add", lambda self, part, **more: added.append((part, more)), raising=False)
    monkeypatch.setattr(gpu_report, "query_nvidia_smi", lambda *names: list(names))
    monkeypatch.setattr(gpu_report, "format_report", lambda result: "the table")
    monkeypatch.setattr(gpu_report.time, "strftime", lambda form: f"as {form}")
    gpu_report.main(["--out", str(tmp_path), "--commit", "abc"])
    assert added == [("machine", {"clocks_at_the_end": list(kernel_parts.CLOCKS)})]
    assert capsys.readouterr().out == f"the table\nwritten to {tmp_path}\n"
    assert (stand_ins.report["date"], stand_ins.report["device"]) == ("as %Y-%m-%d %H:%M", "H")


def test_a_report_of_another_device_ends_the_command(stand_ins, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise ValueError("is of another")

    monkeypatch.setattr(gpu_report, "Report", refuse)
    with pytest.raises(SystemExit) as stop:
        gpu_report.main(["--smoke", "--out", str(tmp_path)])
    assert stop.value.code == "scripts.gpu_report: is of another" and stand_ins.measured == []
