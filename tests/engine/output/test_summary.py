"""What a run comes to in a few lines."""

import pytest

from engine.output.summary import summarize_run


def events(train=(), held_out=(), scores=()):
    found = {"train": train, "eval": held_out}
    return {name: [{"loss": loss} for loss in losses] for name, losses in found.items()} | {
        "score": [{"equal": equal, "answers": 24} for equal in scores]
    }


@pytest.mark.parametrize(
    "train, held_out, line",
    [
        ((), (), "no loss yet"),
        ((None, float("nan")), (), "no loss yet"),
        ((3,), (), "train loss 3.0000"),
        ((3, 2), (), "train loss 3.0000 -> 2.0000"),
        ((3, None, 2), (), "train loss 3.0000 -> 2.0000"),
        ((4, 9, 9, 9, 9, 9, 1), (), "train loss 4.0000 -> 1.0000"),
        ((4, 2, 9, 9, 9, 9, 1, 0), (), "train loss 3.0000 -> 0.5000 (means of 2 steps)"),
        ([*range(80)], (), "train loss 4.5000 -> 74.5000 (means of 10 steps)"),
        ((9, 9), (2.5,), "held-out loss 2.5000"),
        ((9, 9), (2.5, 7, 1.25), "held-out loss 2.5000 -> 1.2500"),
    ],
)
def test_losses(train, held_out, line):
    assert summarize_run(events(train, held_out)) == [line]


@pytest.mark.parametrize("scores, counts", [((3,), "3"), ((0, 20), "0 -> 20"), ((0, 5, 20), "0 -> 20")])
def test_scores(scores, counts):
    assert summarize_run(events(scores=scores)) == ["no loss yet", f"held-out answers as wanted: {counts} of 24"]
