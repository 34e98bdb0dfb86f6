"""docs/faults.md: its tests are run, and every line of the page."""

import platform
import sys
from pathlib import Path

import pytest

from scripts.pages import faults
from tests.helpers.calls import Calls

ROWS = [(1, ("a < b", "c | d", [("a/test_b.py", "test_c"), ("a/test_d.py", "test_e")])),
        (7, ("f", "g", [("a/test_b.py", "test_c")]))]  # fmt: skip
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a.test_b" name="test_c"/>
<testcase classname="tests.a.test_d" name="test_e[1]"><failure/></testcase>
<testcase classname="tests.a.test_d" name="test_e[a\n[2]]"/>
<testcase classname="tests.a.test_d" name="test_e[3]"><properties/><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.setattr(faults, "ROWS", ROWS)
    monkeypatch.setattr(faults, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(faults, "find_missing_tests", lambda: [])
    monkeypatch.setattr(platform, "python_version", lambda: "3.99")
    monkeypatch.setattr(platform, "machine", lambda: "a machine")
    monkeypatch.setattr(faults.time, "strftime", lambda form: f"today as {form}")


def test_the_page_is_told_whole(table, tmp_path, snapshot):
    (tmp_path / "junit.xml").write_text(JUNIT)
    found = faults.read_outcomes(tmp_path / "junit.xml")
    assert found == {
        ("a/test_b.py", "test_c"): ["passed"], ("a/test_d.py", "test_e"): ["failure", "passed", "skipped"]
    }  # fmt: skip
    assert faults.format_page(found) == snapshot


def test_each_named_test_is_run_once_whatever_comes_of_it(table, monkeypatch, tmp_path, call_main):
    calls = Calls()

    def run(command, cwd, check):
        Path(next(word for word in command if "--junitxml" in word).partition("=")[2]).write_text(JUNIT)

    monkeypatch.setattr(faults.tempfile, "TemporaryDirectory", lambda: calls.folder_of(tmp_path))
    monkeypatch.setattr(faults.subprocess, "run", calls.stand_in("run", run))
    assert not call_main(faults)
    nodes = ["tests/a/test_b.py::test_c", "tests/a/test_d.py::test_e"]
    flags = ["-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", f"--junitxml={tmp_path}/junit.xml"]
    assert calls.lines == [f"run({[sys.executable, *flags, *nodes]}, cwd={faults.ROOT!r}, check=False)"]
    assert "1 failure, 1 as expected, 1 skipped" in faults.PAGE.read_text()


def test_a_check_writes_nothing_and_a_test_that_is_not_there_is_told(table, monkeypatch, call_main):
    assert not call_main(faults, "--check") and not faults.PAGE.exists()
    monkeypatch.setattr(faults, "find_missing_tests", lambda: ["a::b", "c::d"])
    assert call_main(faults, "--check") == "scripts.pages.faults: no such tests: a::b, c::d"


def test_the_page_of_the_docs_has_todays_rows():
    page = faults.PAGE.read_text()
    empty = faults.format_page({}).splitlines()
    heads = [line.split(" | ")[:4] for line in empty if line[:3] == "| " + line[2:3] and line[2].isdigit()]
    assert len(heads) == len(faults.ROWS) and faults.ROWS[-1][0] == 57
    assert not [head for head in heads if " | ".join(head[:3]) not in page]
