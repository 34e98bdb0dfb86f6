"""A run that can change no weight, or hardly any, says so before it starts, at its end and in its report."""

import json

import pytest

from engine.output.report import FEW_UPDATES
from engine.training.optimizer import count_updates, lr_factor
from engine.training.plan import FEW
from tests.helpers.run import finetune
from tests.helpers.small_model import small_model


@pytest.fixture
def thirty(tmp_path):
    path = tmp_path / "thirty.json"
    path.write_text(json.dumps([{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(30)]))
    return path


def flags(rows, out, *more):
    return ("--model", small_model(), "--data", rows, "--out", out, "--device", "cpu", "--max-length", 64, *more)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "ratio"), [(1, 0.03), (3, 0.03), (40, 0.1), (5, 0.0), (4, 1.0)])
def test_updates_are_the_steps_with_a_rate(schedule, steps, ratio):
    rates = [lr_factor(schedule, step, steps, ratio) for step in range(1, steps + 1)]
    assert count_updates(schedule, steps, ratio) == sum(rate > 0 for rate in rates)
    assert count_updates(schedule, 1, 0.03) == 0 and count_updates(schedule, 1, 0.0) == 1


def test_a_run_that_would_train_nothing_is_refused(thirty, tmp_path):
    done = finetune(*flags(thirty, tmp_path / "out", "--epochs", 1), check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "30 examples make 1 step" in done.stderr and "no weight would change" in done.stderr
    assert "--global-batch-size 1, or --epochs 20" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_refused_run_leaves_no_folder_and_takes_none_away(thirty, tmp_path):
    (tmp_path / "mine").mkdir()
    for out in ("mine/new/out", "mine"):
        assert finetune(*flags(thirty, tmp_path / out, "--epochs", 1), check=False).returncode == 2
        assert list((tmp_path / "mine").iterdir()) == []


def test_few_updates_are_told_three_times(thirty, tmp_path):
    out = tmp_path / "out"
    said = finetune(*flags(thirty, out, "--epochs", 4)).stdout
    assert "plan: 4 steps of all 30 examples" in said
    assert said.count("warning: of 4 steps 3 can change the weights") == 2
    assert "--global-batch-size 4, or --epochs 20" in said
    assert "<dt>Updates</dt><dd>3" in (out / "report.html").read_text()


@pytest.mark.parametrize(("flag", "value", "n_told"), [("--global-batch-size", 15, 2), ("--epochs", 11, 0)])
def test_nine_updates_are_told_and_ten_are_not(flag, value, n_told, thirty, tmp_path):
    """10 steps and 11: the first has the rate 0."""
    said = finetune(*flags(thirty, tmp_path / "out", "--epochs", 5, flag, value)).stdout
    assert said.count("warning: of 10 steps 9 can change the weights") == said.count("can change the w") == n_told
    assert ("<dt>Updates</dt><dd>9" in (tmp_path / "out" / "report.html").read_text()) == bool(n_told)
    assert FEW == FEW_UPDATES


def test_enough_updates_are_not_told(thirty, tmp_path):
    said = finetune(*flags(thirty, tmp_path / "out", "--epochs", 4, "--global-batch-size", 8)).stdout
    assert "plan: 16 steps of 8 examples" in said and "can change the weights" not in said
    assert "<dt>Updates</dt>" not in (tmp_path / "out" / "report.html").read_text()


def test_what_the_suggestion_says_is_enough(thirty, tmp_path):
    said = finetune(*flags(thirty, tmp_path / "out", "--epochs", 4, "--global-batch-size", 4)).stdout
    assert "can change the weights" not in said


@pytest.mark.parametrize("asked", [("--max-steps", 1), ("--lr", 0)])
def test_who_asks_for_it_gets_it_with_a_word(thirty, tmp_path, asked):
    said = finetune(*flags(thirty, tmp_path / "out", "--epochs", 1, *asked)).stdout
    assert said.count("none can change the weights") == 2
