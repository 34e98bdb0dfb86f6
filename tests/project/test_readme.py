"""README and docs/ tell the truth: folders are the disk's, commands and flags exist, figures are the measured ones."""

import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from scripts.pages import faults as render_faults
from tests.helpers.helps import read_helps

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "findings").glob("*.md"))
)
FOLDERS = ("kernels", "engine", "data_gen", "scripts")  # shown with the folders inside them


def tree() -> dict[str, list[str]]:
    """Return README's tree: each folder at the top and the folders inside it."""
    block = re.search(r"```text\ncria/\n(.*?)```", README, re.S)[1]
    found: dict[str, list[str]] = {}
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)/", line).groups()
        if len(indent) == 2:
            found[name] = []
        else:
            found[list(found)[-1]].append(name)
    return found


def folders(path: Path) -> set[str]:
    """Return the folders inside a folder that hold files of the project, not what Python or a build left."""
    done = subprocess.run(["git", "ls-files", "."], cwd=path, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout:
        return {name.split("/")[0] for name in done.stdout.split() if "/" in name and not name.startswith(".")}
    return {p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "_"))} - {"out", "build"}


def test_readme_is_short():
    assert len(README.splitlines()) < 200


def test_the_tree_of_folders_is_the_disks():
    shown = tree()
    assert set(shown) == folders(ROOT)
    for folder in FOLDERS:
        assert set(shown[folder]) == folders(ROOT / folder), folder


def test_the_tree_names_every_command():
    block = re.search(r"```text\ncria/\n(.*?)```", README, re.S)[1]
    for folder in ("kernels", "engine", "data_gen"):
        words = re.search(rf"^  {folder}/(.*)$", block, re.M)[1]
        commands = {path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}
        assert commands <= set(re.findall(r"\w+", words)), folder


def test_the_files_to_open_are_there():
    table = README.split("| to change | open |")[1].split("\n\n")[0]
    names = re.findall(r"`([\w/]+/(?:\w+\.\w+)?)`", table)
    assert len(names) > 10
    assert not [name for name in names if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    wrong = []
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text) + re.findall(
        r'(?:src|srcset)="(?!https?:)([^"]+)"', text
    ):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert not wrong


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def commands_of(page: str) -> list[tuple[str, str]]:
    """Return (module, what follows it) of every `python -m` and `torchrun -m` of ours on a page."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    return re.findall(r"-m ((?:engine|kernels|data_gen|scripts)(?:\.\w+)+)([^\n`#|]*)", text)


def test_every_command_of_the_pages_exists():
    named = {(module, page) for page in PAGES for module, _ in commands_of(page)}
    missing = [
        pair for pair in named if not (ROOT / pair[0].replace(".", "/")).with_suffix(".py").exists()
    ]  # fmt: skip
    assert len(named) > 20 and not missing


COMMANDS = sorted(
    f"{name}.{path.stem}" for name in ("engine", "kernels", "data_gen") for path in (ROOT / name).glob("[!_]*.py")
)
USED = [
    (page, module, flag)
    for page in PAGES
    for module, rest in commands_of(page)
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", rest)
    if not module.startswith("scripts.pages") and flag != "--help"
]


@cache
def helps_of_all() -> dict[str, str]:
    """Return the help of every command, and of every script whose flags are on a page."""
    return read_helps(sorted({*COMMANDS, *(module for _, module, _ in USED)}), ROOT, ROOT)


def test_the_flags_of_the_pages_are_in_help():
    helps = helps_of_all()
    for module, text in helps.items():
        assert text.startswith(f"usage: python -m {module}") or module.startswith("scripts."), module
        assert module.startswith("scripts.") or max(map(len, text.splitlines())) <= 100, module
    wrong = [found for found in USED if found[2].replace("_", "-") not in helps[found[1]].replace("_", "-")]
    assert not wrong


def test_every_help_is_kept_whole_and_has_three_examples_of_its_own_flags(snapshot):
    """Flags, their defaults and choices are what others' scripts rely on."""
    assert len(COMMANDS) > 15
    for module in COMMANDS:
        text = helps_of_all()[module]
        if not module.startswith("kernels."):  # which tests/kernels/test_info.py holds: it depends on the machine
            assert text == snapshot(name=module)
        described, _, examples = text.replace("\\\n", " ").partition("\nexamples:\n")
        commands = [line for line in examples.splitlines() if f"-m {module}" in line]
        assert len(commands) >= 3 and len(set(commands)) == len(commands), module
        flags = {
            flag for line in commands for flag in re.findall(r" (--[a-z][a-z-]*)", line.partition(f"-m {module}")[2])
        }
        assert not {flag for flag in flags if f"\n  {flag}" not in described}, module


def test_the_page_of_faults_is_of_tests_that_are_there():
    assert render_faults.find_missing_tests() == []
    rows = [line.split(" | ") for line in render_faults.PAGE.read_text().splitlines() if re.match(r"\| \d+ \| ", line)]
    told = [(row[1], [name.strip("`") for name in row[3].split("<br>") if name.strip()]) for row in rows]
    assert told == [
        (render_faults.escape_cell(fault), [f"{file.removesuffix('.py')}::{test}" for file, test in tests])
        for _, (fault, _, tests) in render_faults.ROWS
    ]
    assert not [row for row in rows if re.search("failure|error|not run", row[4])]


@pytest.mark.parametrize("script", ["benchmarks", "picture"])
def test_the_figures_are_those_of_the_measurements(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    importlib.import_module(f"scripts.pages.{script}").main()  # exits with what is wrong
