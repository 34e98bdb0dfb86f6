"""Where the kernels of a test run: on a GPU, compiled on the PTX machine, or in Triton's interpreter."""

import os

import pytest
import torch

from kernels.ops.common import INTERPRETED

CUDA = torch.cuda.is_available()
CHIP = "" if CUDA else os.environ.get("CRIA_TEST_CHIP", "")  # sm_80 or sm_90: compiled for it, on the PTX machine
DEVICE = "cuda" if CUDA else "cpu"

needs_kernels = pytest.mark.skipif(
    not (CUDA or CHIP or INTERPRETED), reason="needs a GPU, CRIA_TEST_CHIP or Triton's interpreter"
)
needs_compiler = pytest.mark.skipif(
    not (CUDA or CHIP), reason="compiled: on a GPU, and on the PTX machine by tests/kernels/test_on_machine.py"
)
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs the memory of a GPU")
needs_counters = pytest.mark.skipif(
    not CHIP, reason="counts memory's sectors on the PTX machine: by tests/kernels/test_on_machine.py"
)


def check_sectors(run, *kernels):
    """Call run() on the machine; AssertionError if one of the kernels uses under 95% of the global sectors it moves."""
    from kernels.compiled.simulation import on_machine

    with on_machine(CHIP) as launches:
        run()
    chosen = [launch for launch in launches if launch.kernel in kernels]
    assert {launch.kernel for launch in chosen} == set(kernels)
    for launch in chosen:
        for way in ("load", "store"):
            used, moved = launch.counters[f"{way}_bytes"], 32 * launch.counters[f"{way}_sectors"]
            assert used >= 0.95 * moved, f"{launch.kernel}: {used} of {moved} bytes {way}ed are of use"


def sized(on_gpu, on_machine):
    """Return a size for a GPU, or the smaller one for the PTX machine."""
    return on_gpu if CUDA else on_machine
