"""Faults planted into the PTX of this project's kernels are found, and the kernels as they are have none."""

import json

import pytest

from tests.helpers.compiler import run_compiler

FAULTS = {  # name -> kinds of findings of which one must be there, and whether the result shows the fault
    "no wait for cp.async": ({"race"}, "late"),
    "no wait for wgmma": ({"registers"}, "late"),
    "no proxy fence": ({"proxy"}, None),  # nothing that is executed in order can show it
    "no barrier": ({"race"}, "always"),
    "no wait for a tile": ({"race", "mbarrier"}, "late"),
    "a register written after the fence": ({"registers"}, None),
    "a load beyond the end": ({"global"}, "always"),
    "a store beyond the end": ({"global"}, "always"),
    "a store off by two bytes": ({"misaligned"}, "always"),
    "no mask": ({"global"}, None),
    "shared memory over the block's": ({"shared"}, "always"),
}
BARRIERS = ["attention sm_80", "attention sm_90", "rms_norm sm_80", "rms_norm sm_90"]


@pytest.fixture(scope="module")
def planted():
    """Run them all in a process in which Triton compiles, and return what was found by name."""
    done = run_compiler("tests.helpers.planted_faults")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.get("fault") or line["barriers of"]: line for line in lines}


def test_every_fault_is_expected(planted):
    assert set(planted) == {*FAULTS, *BARRIERS}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(planted, fault):
    kinds, shown = FAULTS[fault]
    line = planted[fault]
    assert line["unedited"] == []
    assert kinds & set(line["kinds"]), line
    if shown == "late":
        assert line["early is right"] and not line["late is right"]
    if shown == "always":
        assert not line["early is right"]


@pytest.mark.parametrize("run", BARRIERS)
def test_most_barriers_are_missed_when_they_are_removed(planted, run):
    # Those that are not are the compiler's caution: in this run they order nothing, and without them it is the same.
    line = planted[run]
    assert line["found"] >= 0.6 * line["of"] > 5 and line["missed"] == 0
