"""Processes of the report: limits, interruptions, wheels, and records of a process that dies."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.base.results import ROOT, write_json
from scripts.report import processes
from scripts.report.report import Report
from tests.helpers.calls import Calls


def has_ended(pid):
    """Wait for a process that nobody of ours can wait for, and return whether it is gone."""
    for _ in range(500):
        path = Path(f"/proc/{pid}/stat")
        try:
            if path.read_text().rpartition(")")[2].split()[0] == "Z":  # nobody has read its exit code yet
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_what_is_printed_is_in_a_file_too(tmp_path, capfd):
    """By this process and its children."""
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    with processes.copy_output(log):
        os.write(1, b"own\n")
        subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
    assert log.read_text() == "before\nown\na child\n" and capfd.readouterr().out == "own\na child\n"


def test_a_process_that_outlives_its_parent_does_not_keep_the_report_from_ending(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "TEE_S", 0.1)
    with processes.copy_output(tmp_path / "log.txt"):
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert orphan.poll() is None
    orphan.communicate(b"\n")


def test_a_command_ends_at_its_limit_and_with_the_report(tmp_path):
    calls = []
    assert (
        processes.run_command([sys.executable, "-c", "input()"], 1.2, every=lambda: calls.append(1), stdin=-1) is None
    )
    assert calls
    assert processes.run_command([sys.executable, "-c", "raise SystemExit(5)"], 200) == 5

    path = tmp_path / "pid"

    def stopped():
        if path.exists() and path.read_text():
            raise KeyboardInterrupt

    # The process notes a child of its own, and waits; both must end.
    script = (
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(250)'])\n"
        f"pathlib.Path({str(path)!r}).write_text(str(child.pid)); child.wait()"
    )
    with pytest.raises(KeyboardInterrupt):
        processes.run_command([sys.executable, "-c", script], 200, every=stopped)
    assert has_ended(int(path.read_text()))


def test_wheels_come_first_on_the_path_as_files(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "peer_of_ours-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_ours/__init__.py", "WHERE = __file__\n")
        wheel.writestr(
            "peer_of_ours-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: peer-of-ours\nVersion: 1.0\n"
        )
    monkeypatch.setattr(processes, "UNPACKED", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    processes.unpack_wheels(tmp_path / "wheels", tmp_path / "unpacked")
    assert sys.path[0] == str(tmp_path / "unpacked")
    script = "import importlib.metadata as m, peer_of_ours; print(peer_of_ours.WHERE, m.version('peer-of-ours'))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": processes.python_path()},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(tmp_path / "unpacked" / "peer_of_ours" / "__init__.py"), "1.0"]


CHILD = """
import json, os, signal, sys
path, names = sys.argv[2], sys.argv[sys.argv.index("--only") + 1 :]
smoke = names.pop()
made = {"records": [], "left_out": []}
for name in names:
    if name == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "late":
        made["left_out"].append(name)
    else:
        made["records"].append({"name": name, "smoke": smoke})
    with open(path + ".new", "w") as file:
        json.dump(made, file)
    os.replace(path + ".new", path)
"""


def test_a_process_that_dies_costs_what_it_was_at(tmp_path, monkeypatch):
    """Real processes: two die at one measurement each, and the last one has no time for its last."""
    (tmp_path / "measuring.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = Report(tmp_path / "report.json", minutes=600, smoke=True)
    processes.measure_in_processes(report, "step", "measuring", ["a", "dies", "b", "late"])
    found = json.loads(report.path.read_text())
    assert found["parts"]["step"]["records"] == [
        {"name": "a", "smoke": "--smoke"}, {"name": "dies", "failed": "its process ended with exit code -11"},
        {"name": "b", "smoke": "--smoke"},
    ]  # fmt: skip
    assert found["left_out"] == ["step: late"]


def test_the_order_of_processes_and_their_limits(tmp_path, monkeypatch):
    report, began = Report(tmp_path / "report.json", minutes=600, smoke=True), []

    def run(command, limit_s, every):
        names = command[command.index("--only") + 1 : -1]
        began.append(names)
        every()  # before anything is written
        records = [{"name": n} for n in names[: names.index("dies")]] if "dies" in names else [{"name": names[0]}]
        write_json(command[command.index("--json") + 1], {"records": records, "left_out": []})
        every()
        written = json.loads(report.path.read_text())["parts"]["step"]["records"]  # should this process end now
        assert written == report.result["parts"]["step"]["records"] and all(one in written for one in records)
        return -11 if "dies" in names else 0

    monkeypatch.setattr(processes, "run_command", run)
    processes.measure_in_processes(report, "step", "m", ["a", "dies", "b"])
    assert began == [["a", "dies", "b"], ["dies", "b"], ["b"]]
    assert [r["name"] for r in report.result["parts"]["step"]["records"]] == ["a", "dies", "b"]
    late = Report(tmp_path / "late.json", minutes=0, smoke=True)
    processes.measure_in_processes(late, "step", "m", ["a", "b"])
    assert late.result["left_out"] == ["step: a, b"] and len(began) == 3
    report.result["parts"] = {}
    monkeypatch.setattr(processes, "run_command", lambda *a, **k: None)
    processes.measure_in_processes(report, "step", "m", ["a"])
    assert report.result["parts"]["step"]["records"] == [{"name": "a", "failed": "its process ended after its limit"}]


def test_a_process_without_its_gpu_still_begins_others(tmp_path, monkeypatch):
    """After a CUDA error in a part that the report measures itself, freeing memory fails too."""

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    report, began = Report(tmp_path / "report.json", minutes=600, smoke=True), []
    monkeypatch.setattr(processes, "free_memory", fail)
    monkeypatch.setattr(processes, "run_command", lambda *a, **k: began.append(1) or 0)
    processes.measure_in_processes(report, "step", "m", ["a"])
    assert began


def test_a_child_runs_in_the_project_with_what_it_is_given_before_what_there_was(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "UNPACKED", ["wheels"])
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setenv("A", "old")
    monkeypatch.setenv("B", "kept")
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "told").open("w") as told:
        command = ["bash", "-c", "pwd; echo $PYTHONPATH $A $B"]
        assert processes.run_command(command, 200, environment={"A": "new"}, stdout=told) == 0
    folder, words = (tmp_path / "told").read_text().splitlines()
    assert folder == str(ROOT) and words == f"wheels:{ROOT}:before new kept"


def test_what_each_stream_was_before_it_is_after(tmp_path, capfd):
    with processes.copy_output(tmp_path / "log.txt"):
        os.write(2, b"within\n")
    os.write(1, b"to stdout\n")
    os.write(2, b"to stderr\n")
    out, err = capfd.readouterr()
    assert out == "within\nto stdout\n" and err == "to stderr\n"


def test_the_last_records_of_a_process_are_taken_over_and_a_failed_one_stays(tmp_path, monkeypatch):
    """They are written after the last look at its file; what failed is only tried again when it is asked for."""
    report = Report(tmp_path / "report.json", minutes=600, smoke=True)
    report.result["parts"]["step"] = {"records": [{"name": "old", "failed": "x"}]}

    def run(command, limit_s, every):
        assert command[command.index("--only") + 1 :] == ["a", "--smoke"]
        write_json(command[command.index("--json") + 1], {"records": [{"name": "a"}], "left_out": []})
        return 0

    monkeypatch.setattr(processes, "run_command", run)
    processes.measure_in_processes(report, "step", "m", ["old", "a"])
    assert json.loads(report.path.read_text())["parts"]["step"]["records"] == [
        {"name": "old", "failed": "x"}, {"name": "a"},
    ]  # fmt: skip


@pytest.mark.parametrize("ends", [True, False])
def test_a_command_has_its_limit_and_no_more(ends, monkeypatch):
    """It is looked at twice a second; one that is ended takes what it has started along."""
    now, calls = [0.0], Calls()

    def wait(seconds=None):
        calls.lines.append(f"wait({seconds})")
        now[0] += seconds or 0
        if seconds and not (ends and now[0] > 1):
            raise subprocess.TimeoutExpired("it", seconds)
        return 5

    process = SimpleNamespace(pid=77, wait=wait, poll=lambda: 5 if ends else None)

    def start(command, cwd, env, start_new_session, **options):
        assert start_new_session and cwd == ROOT and env["COLUMNS"] == "240" and env["MINE"] == "1"
        calls.lines.append(f"{command} {options}")
        return process

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    monkeypatch.setattr(processes.os, "killpg", calls.stand_in("killpg"))
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    every = calls.stand_in("every")
    found = processes.run_command(["it"], 2.0, every, {"MINE": "1"}, stdout=3)
    look = ["wait(0.5)", "every()"]
    assert found == (5 if ends else None) and calls.lines == [
        "['it'] {'stdout': 3}", *look * (2 if ends else 4),
        *(["wait(0.5)"] if ends else ["killpg(77, <Signals.SIGKILL: 9>)", "wait(None)"]),
    ]  # fmt: skip


@pytest.mark.parametrize(("left", "minutes", "limit"), [(90.0, "1.500", 150.0), (-3.0, "0.017", 61.0)])
def test_a_measuring_process_gets_the_time_that_is_left(left, minutes, limit, tmp_path, monkeypatch):
    report, ran = Report(tmp_path / "report.json", minutes=600, smoke=False), []
    monkeypatch.setattr(report, "seconds_left", lambda: left)

    def run(command, limit_s, every):
        ran.append((command[1:4], command[5:], limit_s))
        return 3

    monkeypatch.setattr(processes, "run_command", run)
    found = []
    assert processes.measure_in_one_process(report, found, "a.module", ["x", "y"]) == (3, []) and found == []
    assert ran == [(["-m", "a.module", "--json"], ["--minutes", minutes, "--only", "x", "y"], limit)]


def test_a_process_that_ends_well_is_the_last_and_one_that_does_nothing_fails_its_first(tmp_path, monkeypatch):
    report = Report(tmp_path / "report.json", minutes=600, smoke=False)
    ends = iter([(7, []), (7, ["c"]), (0, [])])
    asked = []

    def measure(report, found, module, names):
        asked.append(list(names))
        code, left_out = next(ends)
        return code, left_out

    monkeypatch.setattr(processes, "measure_in_one_process", measure)
    monkeypatch.setattr(processes, "free_memory", lambda: None)
    processes.measure_in_processes(report, "step", "m", ["a", "b", "c", "d"])
    assert asked == [["a", "b", "c", "d"], ["b", "c", "d"], ["b", "d"]]
    failed = {"failed": "its process ended with exit code 7"}
    assert report.result["parts"]["step"]["records"] == [{"name": "a", **failed}]
    assert report.result["left_out"] == ["step: c"]
