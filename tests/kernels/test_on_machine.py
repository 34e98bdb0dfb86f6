"""The tests of every op, compiled for a chip and run on the PTX machine, which fails them for what it finds."""

import os
import subprocess
import sys

import pytest

from tests.helpers.kernels import CUDA
from tests.helpers.run import ROOT

FILES = sorted(path.name for path in (ROOT / "tests" / "kernels" / "ops").glob("test_*.py"))


@pytest.mark.skipif(CUDA, reason="they run on the GPU")
@pytest.mark.parametrize("file", FILES)
def test_compiled_for_sm_90(file):
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/ops/{file}"],
        cwd=ROOT, env=env | {"CRIA_TEST_CHIP": "sm_90"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
