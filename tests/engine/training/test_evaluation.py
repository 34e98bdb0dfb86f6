"""What is evaluated and answered between steps, once each."""

from types import SimpleNamespace

import pytest

from engine.training import evaluation
from engine.training.plan import Plan


class Small(Plan):
    """4 steps, with these settings alone."""

    def __init__(self, held_out="some", **config):
        config = {"eval_every": "2", "sample_every": "end", "score_answers": 0} | config
        self.__dict__.update(config=SimpleNamespace(**config), held_out=held_out, total_steps=4)

    order = SimpleNamespace(steps_per_epoch=2)


@pytest.mark.parametrize(
    ("settings", "reported", "wanted"),
    [
        ({}, [], ["evaluate 0", "show_samples 0", "evaluate 2", "evaluate 4", "show_samples 4"]),
        ({}, [("eval", 0), ("sample", 4)], ["show_samples 0", "evaluate 2", "evaluate 4"]),
        ({}, [("sample", 0), ("train", 2), ("eval", 2)], ["evaluate 0", "evaluate 4", "show_samples 4"]),
        ({"held_out": None}, [], ["show_samples 0", "show_samples 4"]),
        ({"score_answers": 3, "sample_every": "off", "eval_every": "end"}, [("eval", 0)],
         ["evaluate 4", "score_answers 4"]),
    ],
)  # fmt: skip
def test_what_is_due_is_done_unless_the_metrics_hold_it_from_before_a_resume(monkeypatch, settings, reported, wanted):
    done = []
    for name in ("evaluate", "show_samples", "score_answers"):
        monkeypatch.setattr(evaluation, name, lambda *args, name=name: done.append(f"{name} {args[-1]}"))
    for step in range(5):
        evaluation.evaluate_if_due(Small(**settings), SimpleNamespace(reported=frozenset(reported)), None, None, step)
    assert done == wanted
