"""What training steps compile on a GPU, found without one: kernels go through Triton's own binder."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.compiler import run_compiler

OLDEST = Path(sys.prefix) / "triton-3.6"  # the GPU machines'; put there by `make test`


def take_steps(*args, path=()):
    done = run_compiler("tests.helpers.fake_gpu", *args, path=path)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("sharing", [1, 0])
def test_no_kernel_compiles_after_the_second_step(sharing):
    """Rows of real lengths, packed: numbers of tokens, targets and documents differ from step to step."""
    found = take_steps("small", 40, sharing, "8bit")
    assert len(found["compiled"][0]) > 10 and len(found["micro_batches"]) == 40
    assert not any(found["compiled"][2:]), found["compiled"]


def test_the_static_gate_compiles_the_launches_of_a_step():
    """Then the gate judges what runs, and fills Triton's cache before the first step on a GPU."""
    found = take_steps("llama-7b", 1, 1, "8bit", path=[OLDEST] if OLDEST.exists() else ())
    assert {name.split(".")[0] for name in found["compiled"][0]} >= {"rms_norm", "swiglu", "grad_norm"}
    assert not found["missing"]
