"""README tells the truth: its file tree is the disk's, its commands exist, its figures are the measured ones."""

import re
import subprocess
import sys
from pathlib import Path

from scripts.pages import faults as render_faults

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def tracked():
    """Files under version control, or all that are there where there is no git."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    return set(done.stdout.split()) if done.returncode == 0 else None


def tree():
    """The paths in README's file tree."""
    block = re.search(r"```text\n(cria/\n.*?)```", README, re.S)[1]
    paths, folder = set(), ""
    for line in block.splitlines()[1:]:
        indent, name = re.match(r"( *)(\S+)", line).groups()
        if len(indent) == 2:
            folder = name if name.endswith("/") else ""
        paths.add(name if len(indent) == 2 else folder + name)
    return paths


def test_the_file_tree_is_the_disks():
    files = tracked()
    assert files, "git ls-files finds nothing"
    shown = {path for path in tree() if not path.endswith("/")}
    python = {f for f in files if f.endswith(".py") and not f.endswith("__init__.py")}
    top = {f for f in files if "/" not in f and not f.startswith(".")}
    missing = (python | top) - shown
    assert not missing, f"on disk, not in README: {sorted(missing)}"
    gone = {path for path in tree() if not (ROOT / path).exists()}
    assert not gone, f"in README, not on disk: {sorted(gone)}"


def test_every_module_that_readme_runs_answers_help_and_has_its_flags():
    modules = sorted(set(re.findall(r"python -m ((?:engine|kernels|data_gen)\.\w+)", README)))
    assert modules
    helps = {}
    for module in modules:
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and f"usage: python -m {module}" in done.stdout, module
        helps[module] = done.stdout.replace("_", "-")
    for module, rest in re.findall(r"python -m ((?:engine|data_gen)\.\w+)([^\n`#]*)", README.replace("\\\n", " ")):
        flags = set(re.findall(r"--[a-z][a-z0-9_-]*", rest))
        missing = {flag for flag in flags if flag.replace("_", "-") not in helps[module]}
        assert not missing, f"{module}: {missing}"


def test_the_page_of_faults_is_of_tests_that_are_there():
    assert render_faults.missing() == []
    rows = [line.split(" | ") for line in render_faults.PAGE.read_text().splitlines() if re.match(r"\| \d+ \| ", line)]
    told = [(row[1], [name.strip("`") for name in row[3].split("<br>") if name.strip()]) for row in rows]
    assert told == [
        (render_faults.escaped(fault), [f"{file.removesuffix('.py')}::{test}" for file, test in tests])
        for fault, _, tests in render_faults.FAULTS
    ]
    assert not [row for row in rows if re.search("failure|error|not run", row[4])]


def test_the_figures_are_those_of_the_measurements():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.pages.benchmarks", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
