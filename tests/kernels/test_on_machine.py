"""The tests of every op, compiled for a chip and run on the PTX machine, which fails them for what it finds."""

import pytest

from tests.helpers.compiler import run_compiler
from tests.helpers.kernels import CUDA
from tests.helpers.run import ROOT

FILES = sorted({path.name for path in (ROOT / "tests" / "kernels" / "ops").glob("test_*.py")} - {"test_common.py"})


@pytest.mark.skipif(CUDA, reason="they run on the GPU")
@pytest.mark.parametrize("file", FILES)
def test_compiled_for_sm_90(file):
    words = ("pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/ops/{file}")
    done = run_compiler(*words, CRIA_TEST_CHIP="sm_90")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
