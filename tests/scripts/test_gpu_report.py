"""scripts.gpu_report at toy size on a CPU; what interruptions, failures and time do to it; README's tables of it."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from scripts import gpu_report
from scripts.pages import benchmarks
from tests.helpers.run import ROOT, command, environment

TARGETS = json.loads((ROOT / "benchmarks" / "targets.json").read_text())


@pytest.fixture
def report(tmp_path):
    return gpu_report.Report(tmp_path / "report.json", minutes=1, smoke=True)


def on_disk(report):
    return json.loads(report.path.read_text())


# ---- the whole ------------------------------------------------------------------------------------------------------


STEPS = tuple(gpu_report.STEP_PARTS)


def at_toy_size(path, parts):
    done = command(
        "scripts.gpu_report", "--smoke", "--json", path, "--commit", "abc", "--minutes", 3, "--only", ",".join(parts)
    )
    result = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert list(result["parts"]) == parts and set(result["seconds"]) == set(parts)
    assert result["smoke"] and result["commit"] == "abc" and not result["left_out"]
    assert f"written to {path}" in done.stdout.splitlines()[-1]
    return result["parts"], done.stdout.split("commit abc")[-1]  # the table comes last


def test_kernels_at_toy_size(tmp_path):
    parts, table = at_toy_size(tmp_path / "report.json", [name for name in gpu_report.PARTS if name not in STEPS])
    assert parts["machine"]["torch"] == torch.__version__
    assert parts["ceilings"]["copy_gb_per_s"] > 0 and parts["ceilings"]["gemm_tflops_T64"]["down_wgrad"] > 0
    assert parts["tests"]["kernels"]["passed"] > 0 and "ended" not in parts["tests"]["kernels"]
    kernels = parts["kernels"]
    assert not kernels["ended"] and not [r for r in kernels["records"] if "failed" in r or "wrong" in r]
    assert {r["op"] for r in kernels["records"] if r["who"] == "ours"} == {
        "attention", "rope_attention", "rms_norm", "norm_linear", "rope", "swiglu", "swiglu_linear",
        "linear_cross_entropy", "grad_norm", "adamw",
    }  # fmt: skip
    assert "attention: without varlen_attn" in table  # every absent peer


def test_steps_at_toy_size(tmp_path):
    parts, table = at_toy_size(tmp_path / "report.json", ["machine", *STEPS])
    for part, figure in (
        ("step", "tokens_per_s"), ("profile", "kinds"), ("peers", "tokens_per_s"), ("ranks", "largest_loss_apart")
    ):  # fmt: skip
        records = parts[part]["records"]
        assert figure in records[0] and not [r for r in records if "failed" in r], records
    step, peer = parts["step"]["records"][0], parts["peers"]["records"][0]
    assert step["all_finite"] and step["peak_gib"] is None and "logical tokens/s" in step["mfu_formula"]
    kinds = parts["profile"]["records"][0]["kinds"]
    assert all(kinds[kind]["ms"] > 0 for kind in kinds) and kinds["attention"]["share"] > kinds["rope"]["share"]
    assert peer["ours_over_peer"] == step["tokens_per_s"] / peer["tokens_per_s"]
    assert "projected from the measured step" in parts["step"]["projections"][0]["what"]
    assert [r.get("over_plain", 0) > 0 for r in parts["ranks"]["records"]] == [False, True, False]
    assert parts["ranks"]["records"][2]["over_unsaved_an_epoch"] > 0
    assert "training step, ours:" in table and "0 times the host waited" in table and "x the plain step" in table


def test_a_killed_report_keeps_what_it_had(tmp_path):
    path = tmp_path / "report.json"
    script = (
        "import os, signal\nfrom scripts import gpu_report as g\n"
        "def killed(report):\n    report.put('second', begun=1)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "g.PARTS['second'] = (killed, 1.0)\n"
        f"g.main(['--smoke', '--only', 'machine,second,tests', '--json', {str(path)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    result = json.loads(path.read_text())
    assert list(result["parts"]) == ["machine", "second"] and "device" in result["parts"]["machine"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


# ---- parts that fail, and time --------------------------------------------------------------------------------------


def test_a_part_that_fails_is_recorded_and_the_next_runs(report, monkeypatch):
    def broken(report):
        report.put("broken", before=1)
        raise RuntimeError("no such card")

    monkeypatch.setitem(gpu_report.PARTS, "broken", (broken, 1.0))
    gpu_report.measure(report, ["broken", "machine"])
    parts = on_disk(report)["parts"]
    assert parts["broken"] == {"before": 1, "failed": "RuntimeError: no such card"} and "device" in parts["machine"]
    assert "broken failed: RuntimeError: no such card" in gpu_report.table(report.result)


def test_nothing_begins_after_the_time(tmp_path):
    report = gpu_report.Report(tmp_path / "report.json", minutes=0, smoke=True)
    gpu_report.measure(report, list(gpu_report.PARTS))
    assert on_disk(report)["left_out"] == list(gpu_report.PARTS) and not report.result["parts"]


def test_a_part_has_its_share_of_the_time(report, monkeypatch):
    left = []

    def measured(report):
        left.append(report.left())
        report.deadline = 0
        assert not report.take("the last")

    for name in ("half", "again", "end"):
        monkeypatch.setitem(gpu_report.PARTS, name, (measured, 0.5))
    gpu_report.measure(report, ["half", "again", "end"])
    assert 25 < left[0] < 30.1 and left[1] > 25  # of a minute; the second's is of what was left again
    assert left[2] > 50  # nothing comes after the last
    assert on_disk(report)["left_out"] == ["the last"] * 3
    assert "left out for time: the last" in gpu_report.table(report.result)


def test_a_command_ends_at_its_limit_and_with_the_report(tmp_path):
    began, calls = time.monotonic(), []
    assert gpu_report.run([sys.executable, "-c", "input()"], 1.2, every=lambda: calls.append(1), stdin=-1) is None
    assert time.monotonic() - began < 10 and calls
    assert gpu_report.run([sys.executable, "-c", "raise SystemExit(5)"], 30) == 5

    path = tmp_path / "pid"

    def stopped():
        if path.exists() and path.read_text():
            raise KeyboardInterrupt

    script = f"import os, time, pathlib; pathlib.Path({str(path)!r}).write_text(str(os.getpid())); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        gpu_report.run([sys.executable, "-c", script], 50, every=stopped)
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)


def test_benchmarks_of_a_process_that_dies_are_kept(report, monkeypatch):
    record = {"op": "rope", "shape": "s", "who": "ours", "failed": "RuntimeError: CUDA error: ..."}

    def dies(command, limit, every):
        found = {"records": [record], "absent": [], "left_out": ["x"], "dtype": "bfloat16", "ceilings": {"a": 1.0}}
        gpu_report.write_json(command[command.index("--json") + 1], found)
        every()
        return -6

    monkeypatch.setattr(gpu_report, "run", dies)
    gpu_report.bench(report, ["rope"])
    gpu_report.bench(report, ["swiglu"])
    kernels = on_disk(report)["parts"]["kernels"]
    assert kernels["records"] == [record, record] and kernels["left_out"] == ["x", "x"]
    assert kernels["ended"] == {"rope": "with exit code -6", "swiglu": "with exit code -6"}
    assert "kernels.bench rope ended with exit code -6" in gpu_report.table(report.result)


# ---- tests ----------------------------------------------------------------------------------------------------------

OUTPUT = """\
tests/kernels/ops/test_rope.py::test_a[T=3 H=2] PASSED                               [ 20%]
tests/kernels/ops/test_rope.py::test_b[x] FAILED                                     [ 40%]
tests/kernels/ops/test_rope.py::test_c SKIPPED (needs a GPU)                         [ 60%]
tests/kernels/ops/test_rope.py::test_d ERROR                                         [ 80%]
"""
SUMMARY = """\
=========================== short test summary info ============================
FAILED tests/kernels/ops/test_rope.py::test_b[x] - AssertionError: assert 2 < 1
ERROR tests/kernels/ops/test_rope.py::test_d - fixture 'z' not found
========================= 1 failed, 1 passed in 0.1s ==========================
"""


def test_counts_of_pytest():
    found = gpu_report.counted(OUTPUT + SUMMARY)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"] == {
        "tests/kernels/ops/test_rope.py::test_b[x]": "AssertionError: assert 2 < 1",
        "tests/kernels/ops/test_rope.py::test_d": "fixture 'z' not found",
    }
    cut = gpu_report.counted(OUTPUT)  # killed before its summary
    assert list(cut["failures"]) == list(found["failures"]) and cut["passed"] == 1
    missing = gpu_report.counted("ERROR tests/test_x.py - ModuleNotFoundError: No module named 'hypothesis'\n")
    assert missing["failures"] == {"tests/test_x.py": "ModuleNotFoundError: No module named 'hypothesis'"}
    assert gpu_report.counted("")["passed"] == 0


def test_a_test_file_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "test_here.py"
    path.write_text("import os\ndef test_one(): pass\ndef test_two(): assert 1 == 2\ndef test_three(): os._exit(7)\n")
    found = gpu_report.run_tests(str(path), ["-k", "not three"], 60)
    assert (found["passed"], found["failed"]) == (1, 1) and "ended" not in found
    assert list(found["failures"].values()) == ["assert 1 == 2"]
    found = gpu_report.run_tests(str(path), ["-k", "one or three"], 60)
    assert found["passed"] == 1 and found["ended"].startswith("with exit code 7")
    assert "with exit code" in gpu_report.run_tests("tests/no_such_file.py", [], 60)["ended"]


# ---- command line ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_report.parse([])
    assert stop.value.code == 2 and "no GPU is visible to torch" in capsys.readouterr().err


def test_mistakes_on_the_command_line(capsys, tmp_path):
    for flags, said in ((["--only", "kernels,roofs"], "there is no roofs"), (["--wheels", str(tmp_path)], "no *.whl")):
        with pytest.raises(SystemExit) as stop:
            gpu_report.parse(["--smoke", *flags])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert gpu_report.parse(["--smoke"]).json == "out/smoke.json"  # never among the figures of README


def test_wheels_come_first_on_the_path_as_files(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "peer_of_ours-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_ours/__init__.py", "WHERE = __file__\n")
        wheel.writestr(
            "peer_of_ours-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: peer-of-ours\nVersion: 1.0\n"
        )
    monkeypatch.setattr(gpu_report, "ADDED", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu_report.unpack(tmp_path / "wheels", tmp_path / "unpacked")
    script = "import importlib.metadata as m, peer_of_ours; print(peer_of_ours.WHERE, m.version('peer-of-ours'))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": gpu_report.paths()},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(tmp_path / "unpacked" / "peer_of_ours" / "__init__.py"), "1.0"]


# ---- README's table -------------------------------------------------------------------------------------------------


def record(op, shape, who="ours", kind="fwd", **figures):
    return {"op": op, "shape": shape, "who": who, "pass": kind, "ms": 1.0, **figures}


@pytest.fixture
def synthetic():
    mix, dense = "Alpaca mix H=32 Dh=128", "dense s=4096 H=32 Dh=128"
    records = [
        record("rms_norm", "a", fraction=0.95), record("rms_norm", "b", kind="bwd", fraction=0.912),
        record("rms_norm", "a", "torch eager", fraction=0.2), record("swiglu", "a", fraction=0.5),
        record("rope", "a", fraction=0.1), record("rope", "a", "ours, in place", fraction=0.97),
        {"op": "grad_norm", "shape": "a", "who": "ours", "wrong": "output 0 is off"},
        record("attention", mix, "ours", times_ours=1.0), record("attention", mix, "torch eager", times_ours=0.5),
        record("attention", mix, "varlen_attn", times_ours=1.5),
        record("attention", mix, "FlexAttention", times_ours=1.25),
        record("attention", mix, "varlen_attn", "bwd", times_ours=0.75),
        record("attention", dense, kind="fwd+bwd", tflops=312.4),
        record("attention", "dense s=512", kind="fwd+bwd", tflops=9.0),
        record("linear_cross_entropy", "a", kind="fwd+bwd", times_gemm=1.1),
        record("linear_cross_entropy", "b", kind="fwd+bwd", times_gemm=1.2),
    ]  # fmt: skip
    tests = {
        "rope": {"passed": 5, "failed": 0, "skipped": 1},
        "adamw": {"passed": 2, "failed": 1, "skipped": 0, "ended": "x"},
    }
    rate = {"tokens_per_s": 22500.0, "mfu": 0.92, "mfu_formula": "6 x N x t", "peak_gib": 70.06}
    over = {
        "over_plain_min": 1.07, "over_plain_max": 1.09, "pairs": 3, "peak_gib": 74.0, "plain_peak_gib": 71.0,
    }  # fmt: skip
    steps = {
        "step": {
            "records": [
                {"name": "llama-7b", **rate},
                {"name": "llama-7b, no sharing", **rate, "tokens_per_s": 15000.0, "peak_gib": 76.0},
                {"name": "llama-7b, low memory: offload, recompute block", "failed": "TooLarge: out of memory"},
            ],
            "projections": [{
                "what": "Alpaca, projected from the measured step", "of": "llama-7b", "steps": 1221, "minutes": 14.66,
                "dollars": 0.66, "dollars_an_hour": 2.69, "price_of": "March 2026",
            }],
        },
        "profile": {"records": [{
            "name": "llama-7b", "syncs": 0, "launches": 3210,
            "kinds": {kind: {"ms": 10 * x, "share": x} for kind, x in (("norms", 0.1), ("GEMM", 0.9), ("rope", 0.0))},
        }]},
        "peers": {"records": [
            {"name": "llama-7b, transformers", "tokens_per_s": 7500.0, "peak_gib": 71.0, "ours_over_peer": 3.0,
             "ours_without_sharing_over_peer": 2.0},
            {"name": "llama-7b, transformers + liger", "absent": "liger-kernel is not installed"},
        ]},
        "ranks": {"records": [
            {"name": "llama-7b, one rank", **over, "over_plain": 1.08},
            {"name": "tinyllama-1.1b, one rank", **over, "over_plain": 1.02},
            {"name": "llama-7b, saves", "over_unsaved_an_epoch": 1.001},
            {"name": "tinyllama-1.1b, saves", "absent": "the host's memory has 1.0 GB free, wanted 7.0"},
        ]},
    }  # fmt: skip
    return {
        "what": "scripts.gpu_report", "smoke": False, "commit": "0123456789abcdef", "date": "2000-01-02 03:04",
        "left_out": [],
        "parts": {
            **steps,
            "machine": {"device": "Synthetic 9000", "torch": "2.11.0", "driver": "1.2", "triton": "3.6.0"},
            "ceilings": {"copy_gb_per_s": 3000.0, "gemm_tflops": 700.0, "gemm_side": 8192}, "tests": tests,
            "kernels": {"records": records},
        },
    }  # fmt: skip


def test_the_table_holds_measured_beside_target(synthetic, tmp_path):
    (tmp_path / "synthetic_9000.json").write_text(json.dumps(synthetic))
    text = benchmarks.rendered_page(tmp_path)
    rows = {
        line.split(" | ")[0].strip("| "): [c.strip() for c in line.strip("|").split("|")[1:]]
        for line in text.splitlines()
        if line
    }
    assert (
        "GPU" not in rows
        and "Synthetic 9000, driver 1.2, torch 2.11.0, triton 3.6.0, commit 0123456789ab, 2000-01-02 03:04" in rows
    )
    assert rows["device copy; bf16 GEMM of 8192 cubed"] == ["3,000 GB/s, 700 TFLOP/s", ""]
    assert rows["kernel tests on the device"][0] == "7 passed, 1 failed, 1 skipped; 1 files did not finish"
    found = {row["what"]: rows[row["what"]] for row in TARGETS["rows"]}
    values = [cells[0] for cells in found.values()]
    assert values[:6] == ["15,000", "**22,500**", "**70.06**", "76.00", "failed", "**0**"]
    assert values[6:10] == ["1.08", "**1.02**", "**1.00**", "not measured"]
    assert values[10:] == [
        "**0.91**", "**0.97**", "0.50", "wrong result", "not measured", "not measured", "**1.25**", "0.75", "**312**",
        "not measured", "not measured", "1.20",
    ]  # fmt: skip
    assert [cells[1] for cells in found.values()][-1] == "≤ 1.15" and found[TARGETS["rows"][10]["what"]][1] == "≥ 0.9"
    assert [cells[1] for cells in found.values()][:6] == ["≥ 16,000", "≥ 22,000", "≤ 75", "≤ 75", "≤ 40", "≤ 0"]
    assert [cells[1] for cells in found.values()][6:10] == ["≤ 1.03", "≤ 1.03", "≤ 1.02", "≤ 1.02"]
    assert rows["FSDP2 over the plain step, llama-7b, one rank: 3 pairs of blocks"][0] == (
        "1.080x (1.070 to 1.090); 74.0 GiB, plain 71.0 GiB"
    )
    assert rows["step, llama-7b: MFU = 6 x N x t"][0] == "22,500 tokens/s, 92.0%, 70.1 GiB"
    run = rows["Alpaca, projected from the measured step (llama-7b): 1,221 steps"]
    assert run[0] == "14.7 minutes, $0.66 at $2.69 an hour (March 2026)"
    assert rows["where a step of llama-7b goes: 3,210 launches"][0] == "GEMM 90.0%, norms 10.0%"
    peer = rows["llama-7b, transformers"][0]
    assert peer == "7,500 tokens/s, 71.0 GiB; ours is 3.00x, 2.00x without sharing"
    assert "llama-7b, transformers + liger" not in rows


def test_without_a_report_of_a_gpu_nothing_is_claimed(synthetic, tmp_path):
    (tmp_path / "targets.json").write_text(json.dumps(TARGETS))
    (tmp_path / "smoke.json").write_text(json.dumps({**synthetic, "smoke": True}))
    assert "Not measured yet" in benchmarks.rendered_page(tmp_path)
    assert "Synthetic" not in benchmarks.rendered_page(tmp_path)


def test_targets_name_what_is_measured():
    """A row that selects nothing would read "not measured" for ever."""
    from kernels.measure import cases as bench_cases
    from scripts.step import bench as step_bench
    from scripts.step import breakdown as step_profile
    from scripts.step import ranks as rank_bench

    names = {"step": step_bench.VARIANTS, "profile": step_profile.PROFILED, "ranks": rank_bench.VARIANTS}
    cases = list(bench_cases.full_cases())
    for row in TARGETS["rows"]:
        if "part" in row:
            assert row["name"] in names[row["part"]], row
            continue
        chosen = [c for c in cases if c.op == row["op"] and c.shape == row.get("shape", c.shape)]
        assert chosen and all(row.get("pass", c.passes[0]) in c.passes for c in chosen), row
