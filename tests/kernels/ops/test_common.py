"""Parts that ops share."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from tests.helpers.run import ROOT, environment

OLDEST = Path(sys.prefix) / "triton-3.6"  # put there by `make test`


def test_an_interpreter_that_numpy_has_left_behind_is_named():
    """Else the first loop of a kernel raises TypeError from within Triton."""
    if not OLDEST.exists() or numpy.lib.NumpyVersion(numpy.__version__) < "2.4.0":
        pytest.skip(f"needs Triton 3.6 in {OLDEST} and NumPy 2.4 or newer")
    for interpret, ends in (("1", 1), ("0", 0)):
        env = environment() | {"PYTHONPATH": f"{OLDEST}:{ROOT}", "TRITON_INTERPRET": interpret}
        done = subprocess.run(
            [sys.executable, "-c", "import kernels"], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == ends, done.stderr
        assert ("install numpy<2.4 or a newer Triton" in done.stderr) == bool(ends)
