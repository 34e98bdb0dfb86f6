"""--profile: which steps are traced, what is written, and that nothing else changes."""

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file

from engine.training.step_profile import TABLE, TRACE, StepProfile
from tests.helpers.run import events, finetune
from tests.helpers.small_model import small_model


def traced(folder):
    with gzip.open(folder / TRACE) as file:
        names = [event["name"] for event in json.load(file)["traceEvents"]]
    return sorted({name for name in names if name.startswith("step ")}), names


@pytest.mark.parametrize(
    ("first", "last", "steps"),
    [(1, 9, [3, 4, 5]), (1, 4, [2, 3, 4]), (1, 2, [1, 2]), (7, 20, [9, 10, 11]), (5, 5, [5])],
)
def test_the_steps_after_the_first_two(tmp_path, first, last, steps):
    said = []
    profile = StepProfile(tmp_path, first, last, torch.device("cpu"), said.append)
    for step in range(first, last + 1):
        with profile.watch(step):
            torch.ones(3, 3) @ torch.ones(3, 3)
        assert bool(said) == (step >= steps[-1]), "it is written as soon as it is whole"
    for step in range(first, last + 1):  # again, as after a spike
        with profile.watch(step):
            torch.ones(3, 3) @ torch.ones(3, 3)
    profile.close()
    found, names = traced(tmp_path)
    assert found == sorted(f"step {step}" for step in steps) and names.count("aten::matmul") == len(steps)
    assert len(said) == 1 and "Self CPU" in (tmp_path / TABLE).read_text() and "aten::" in said[0]


def test_a_run_that_ends_within_the_trace_and_a_full_disk(tmp_path, monkeypatch):
    said = []
    profile = StepProfile(tmp_path, 1, 9, torch.device("cpu"), said.append)
    for step in range(1, 4):
        with profile.watch(step):
            torch.ones(3) + 1
    profile.close()
    assert traced(tmp_path)[0] == ["step 3"] and len(said) == 1
    profile = StepProfile(tmp_path / "missing", 1, 1, torch.device("cpu"), said.append)
    with profile.watch(1):
        torch.ones(3) + 1
    assert "warning: the profile could not be written" in said[1]


def test_a_run_with_a_profile_is_the_run_without(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"Count to {i}.", "output": "1 2 3"} for i in range(10)]))
    args = ["--model", small_model(), "--data", rows, "--device", "cpu", "--dtype", "fp32", "--global-batch-size", 2,
            "--epochs", 1]  # fmt: skip
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    finetune(*args, "--out", plain)
    done = finetune(*args, "--out", profiled, "--profile")
    assert "for ui.perfetto.dev" in done.stdout and "Self CPU" in done.stdout
    assert traced(profiled)[0] == ["step 3", "step 4", "step 5"] and not list(profiled.glob(".tmp-*"))
    assert [line["loss"] for line in events(plain)] == [line["loss"] for line in events(profiled)]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (plain, profiled))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
