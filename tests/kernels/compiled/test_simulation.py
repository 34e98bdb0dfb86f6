"""Launches of Triton's kernels on the PTX machine."""

import json
import sys
from pathlib import Path

import pytest
from triton import knobs

from kernels.compiled.ptx import PtxError
from kernels.compiled.simulation import on_machine
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


def test_it_does_not_run_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(PtxError, match="TRITON_INTERPRET is set"), on_machine("sm_90"):
        pass
