"""Launches of Triton's kernels on the PTX machine."""

import json
import sys
from pathlib import Path

import pytest
from triton import knobs

from kernels.compiled.ptx import PtxError
from kernels.compiled.simulation import _allocate, on_machine
from tests.helpers.compiler import run_compiler

OLDEST = Path(sys.prefix) / "triton-3.6"  # put there by `make test`


@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_tiles_by_tensor_descriptors(version):
    if version == "3.6" and not OLDEST.exists():
        pytest.skip(f"needs Triton 3.6 in {OLDEST}: pip install --no-deps --target {OLDEST} triton==3.6.0")
    done = run_compiler("tests.helpers.descriptor_kernels", path=[OLDEST] if version == "3.6" else ())
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 10
    for case in cases:
        specialised = "specialised" in case["case"]
        assert case["error"] < 2**-7 and case["bulk copies"] >= 1 and (case["wgmma"] >= 2 or case["case"] == "sum"), (
            case
        )
        assert bool(case["setmaxnreg"]) is specialised
        if specialised and version == "3.6":  # a tile overwrites what stores passed to the warps, without a fence
            assert case["findings"] and all(text.startswith("proxy: overwrites") for text in case["findings"])
        else:
            assert case["findings"] == []


@pytest.mark.parametrize(("n_bytes", "alignment"), [(0, 1), (1, 16), (48, 128), (1000, 256)])
def test_a_kernels_own_memory_is_aligned_and_no_longer_than_asked(n_bytes, alignment):
    """A byte more would hide a write past it."""
    for _ in range(5):
        memory = _allocate(n_bytes, alignment)
        assert memory.nbytes == n_bytes and memory.data_ptr() % alignment == 0


def test_it_does_not_run_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(PtxError, match="TRITON_INTERPRET is set"), on_machine("sm_90"):
        pass
