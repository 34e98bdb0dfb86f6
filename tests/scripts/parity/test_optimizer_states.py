"""Curves with 8-bit states and with fp32 states: what is run, and every figure."""

import pytest

from scripts.parity import optimizer_states
from tests.helpers.calls import Calls


@pytest.mark.parametrize("n", [20, 9])
def test_the_whole_comparison(n, monkeypatch, tell, snapshot, tmp_path):
    """The final loss is of the last tenth of the steps, and of one at least."""
    calls = Calls()
    losses = {"fp32": [8.0] + [2.0] * (n - 3) + [1.0, 4.0], "8bit": [10.0] + [2.0] * (n - 3) + [1.5, 4.5]}
    curve = lambda args, out, *flags: [(loss, 1.0) for loss in losses[out.name]]  # noqa: E731
    monkeypatch.setattr(optimizer_states, "finetune_curve", calls.stand_in("finetune_curve", curve))
    monkeypatch.setattr(optimizer_states.tempfile, "TemporaryDirectory", calls.folder)
    flags = ("--steps", n, "--batch", 4, "--max-length", 64, "--lr", 0.25, "--data", "dir/mine.json")
    text = tell(optimizer_states, *flags, *(("--runs", tmp_path / "kept") if n == 20 else ()))
    assert text + "\n" + calls.text().replace(str(tmp_path), "FOLDER") == snapshot


def test_by_default_two_hundred_steps_are_taken_on_the_seed_tasks(monkeypatch, call_main):
    monkeypatch.setattr(optimizer_states, "finetune_curve", lambda args, *_, **__: pytest.fail(str(vars(args))))
    expected = {"json": "x", "steps": 200, "batch": 2, "max_length": 192, "lr": 2e-5,
                "data": optimizer_states.SEED_TASKS, "runs": None}  # fmt: skip
    with pytest.raises(pytest.fail.Exception) as told:
        call_main(optimizer_states, "--json", "x")
    assert told.value.msg == str(expected)
