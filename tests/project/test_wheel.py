"""`pip install .` gives everything: every command runs from an unpacked wheel, away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers.helps import run_commands

ROOT = Path(__file__).parents[2]
FOLDERS = ("engine", "kernels", "data_gen")  # what is installed
COMMANDS = sorted(
    f"{folder}.{path.stem}" for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"
)


def source_files():
    """Return the files of the installed folders, relative to the root; what Python leaves beside them is none."""
    found = {path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {str(path) for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build a wheel from a copy of the source, without the network, and return the folder it is unpacked into."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    for name in (*FOLDERS, "csrc"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    compiler = (
        folder / "compiler"
    )  # a stand-in: compiling takes longer than all the rest, and no test here runs the library
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo compiled > "$2"\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "NVCC": str(compiler)}
    done = subprocess.run(build, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("cria_engine-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_holds_every_module_and_data_file(installed):
    missing = sorted(name for name in source_files() if not (installed / name).exists())
    assert not missing, f"not in the wheel: {missing}; see [tool.setuptools] in pyproject.toml"


def test_the_wheel_holds_the_compiled_library_and_fits_every_python(installed):
    native = installed / "kernels" / "native"
    assert {path.name for path in native.glob("*.so")} == {"libcpu.so", "libcuda.so", "libptx_machine.so"}
    assert (native / "libcuda.so").read_text() == "compiled\n"
    assert [part["built"] for part in json.loads((native / "build.json").read_text()).values()] == [True] * 3
    assert not (installed / "csrc").exists()
    assert "Tag: py3-none-linux" in next(installed.glob("*.dist-info/WHEEL")).read_text()


READ_PACKAGE_DATA = {  # command: what it prints
    "engine.estimate --model llama-7b": "Memory: llama-7b",
    "engine.estimate --model llama-7b --data seed-tasks": "Memory: llama-7b",
    "data_gen.estimate": "gpt-4",
}


@pytest.fixture(scope="module")
def printed(installed, tmp_path_factory):
    """What each command prints, run from the wheel alone in another folder."""
    helps = [f"{command} --help" for command in COMMANDS]
    return run_commands([*helps, *READ_PACKAGE_DATA], installed, tmp_path_factory.mktemp("elsewhere"))


def test_every_command_answers_help_from_the_wheel_alone(printed):
    assert all(f"python -m {command}" in printed[f"{command} --help"] for command in COMMANDS)


@pytest.mark.parametrize("command", READ_PACKAGE_DATA)
def test_commands_that_read_package_data_run_from_the_wheel(printed, command):
    assert READ_PACKAGE_DATA[command] in printed[command]


def build_in(folder, *command, **environment):
    """Run setup.py in a copy of what it compiles, and return what it printed."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "kernels" / "native", folder / "kernels" / "native", ignore=shutil.ignore_patterns("*.so"))
    done = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=folder, capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_without_compilers_the_rest_is_installed_and_says_so(tmp_path):
    printed = build_in(tmp_path, "build_ext", "--inplace", CXX="no-such-compiler", NVCC="no-nvcc")
    for name, compiler in (("ptx_machine", "no-such-compiler"), ("cpu", "no-such-compiler"), ("cuda", "no-nvcc")):
        assert f"csrc: {name} is not built: {compiler}: No such file or directory" in printed
    assert not list(tmp_path.rglob("*.so"))
    record = json.loads((tmp_path / "kernels" / "native" / "build.json").read_text())
    assert not any(part["built"] for part in record.values())


def test_the_source_distribution_holds_what_is_compiled(tmp_path):
    build_in(tmp_path, "-q", "sdist", "--format", "tar")
    (archive,) = (tmp_path / "dist").glob("*.tar")
    with tarfile.open(archive) as files:
        names = {Path(name).relative_to(Path(name).parts[0]) for name in files.getnames()}
    missing = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.*")} - names
    assert not missing and Path("setup.py") in names
