"""The project as pip installs it."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.helpers.run import ROOT


def test_a_wheel_carries_every_file_that_is_read_at_run_time(tmp_path):
    pytest.importorskip("setuptools.build_meta", reason="needs setuptools, which builds the project")
    for name in ("kernels", "engine", "data_gen"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
    files = {str(path.relative_to(tmp_path)) for name in ("kernels", "engine", "data_gen")
               for path in (tmp_path / name).rglob("*") if path.is_file()}  # fmt: skip
    assert files <= packed
