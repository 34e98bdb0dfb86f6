"""How a batch flows through the files of the engine, from its rows to the update of the weights: watched, not read."""

import json
import sys
import threading

import pytest

from engine import finetune
from tests.helpers.run import ROOT

STEPS = 6
# The calls by which a batch, its gradients or their update reach another file, in the order of a step.
HAND_OVERS = [
    ("training/loop.py", "training/step.py", "take_step"),
    ("training/step.py", "training/run_ahead.py", "take"),
    ("training/run_ahead.py", "data/batches.py", "make_step"),
    ("data/batches.py", "data/dataset.py", "get_examples"),
    ("data/batches.py", "data/packing.py", "make_micro_batches"),
    ("training/run_ahead.py", "model/llama.py", "prepare_batch"),
    ("training/step.py", "model/llama.py", "loss"),
    ("training/step.py", "training/optimizer.py", "grad_norm"),
    ("training/step.py", "training/optimizer.py", "step"),
]
# Calls between these files that hand no batch on: the schedule, FSDP2 switched and asked, the optimizer told of a
# micro-batch, figures read later, and once what is trained.
OTHERS = {
    "lr_factor", "micro_batch", "set_last_micro_batch", "take_reports", "read", "seconds_since", "local_shards",
    "trained_parameters",
}  # fmt: skip
FLOORS = ["model", "distributed", "data", "training"]  # lower ones first; training's own files call each other
ON_THE_WAY = {file for call in HAND_OVERS for file in call[:2]} | {
    "distributed/fsdp.py",
    "training/micro_batch_size.py",
}


@pytest.fixture
def calls(tmp_path, rows_file):
    """Every call from one file on the way of a batch to another, by (caller, callee, function): how often in a run."""
    engine, found = f"{ROOT / 'engine'}/", {}

    def watch(frame, event, _):
        if event != "call" or not frame.f_code.co_filename.startswith(engine):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(engine):
            caller = caller.f_back
        if caller is not None:
            files = (code.co_filename.removeprefix(engine) for code in (caller.f_code, frame.f_code))
            call = *files, frame.f_code.co_name
            found[call] = found.get(call, 0) + 1

    out = tmp_path / "out"
    args = ["--model", "tiny", "--random-init", "--data", str(rows_file), "--out", str(out), "--device", "cpu"]
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        finetune.main([*args, "--max-steps", str(STEPS), "--global-batch-size", "2"])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    return {
        call: n for call, n in found.items()
        if call[0] != call[1] and {*call[:2]} <= ON_THE_WAY and not call[2].startswith("_")
    }  # fmt: skip


def test_a_batch_crosses_files_nine_times_a_step_and_never_upward(calls):
    of_steps = {call: n for call, n in calls.items() if call[2] not in OTHERS}
    assert of_steps == dict.fromkeys(HAND_OVERS, STEPS)
    floor = {name: i for i, name in enumerate(FLOORS)}
    upward = [call for call in calls if floor[call[0].split("/")[0]] < floor[call[1].split("/")[0]]]
    assert not upward
