"""Flags of other trainers, translated: when a run evaluates and saves."""

import pytest

from engine.training.stanford_flags import translate_stanford_flags

CASES = [  # strategy, steps, what --eval-every and --save-every then are; None: as they are without these flags
    (None, None, None), ("epoch", None, "epoch"), ("steps", "50", "50"), ("steps", None, "500"), (None, "50", "50"),
]  # fmt: skip


def translate(**flags):
    """Return our flags for those of another trainer, each of one word, and the problems."""
    raw, problems = {name: [word] for name, word in flags.items() if word is not None}, []
    translate_stanford_flags(raw, problems)
    return {name: word for name, (word,) in raw.items()}, problems


@pytest.mark.parametrize(
    ("strategy", "steps", "ours", "never"),
    [
        ("evaluation_strategy", "eval_steps", "eval_every", "off"),
        ("eval_strategy", "eval_steps", "eval_every", "off"),
        ("save_strategy", "save_steps", "save_every", "end"),
    ],
)
def test_every_spelling_of_when_a_run_evaluates_and_saves(strategy, steps, ours, never):
    for word, n, wanted in [*CASES, ("no", None, never)]:
        assert translate(**{strategy: word, steps: n}) == ({ours: wanted} if wanted else {}, [])
    assert translate(**{strategy: "often"})[1] and translate(**{steps: "0"})[1]


def test_two_strategies_that_contradict_each_other_are_refused():
    both = {"evaluation_strategy": "no", "eval_strategy": "epoch"}
    _, problems = translate(**both)
    assert problems == ["--evaluation-strategy no contradicts --eval-strategy epoch; give one"]
    assert translate(**both | {"evaluation_strategy": "epoch"}) == ({"eval_every": "epoch"}, [])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"warmup_steps": "0"}, {"warmup_ratio": "0"}), ({"optim": "adamw_bnb_8bit"}, {"optimizer_states": "8bit"}),
        ({"optim": "adamw_torch"}, {}), ({"report_to": "wandb"}, {"tracker": "wandb"}), ({"report_to": "none"}, {}),
        ({"bf16": "True"}, {"dtype": "bf16"}), ({"bf16": "False"}, {"dtype": "fp32"}),
        ({"bf16": "False", "dtype": "auto"}, {"dtype": "auto"}), ({"gradient_checkpointing": "False"}, {}),
        ({"gradient_checkpointing": "True"}, {"recompute": "block"}), ({"lr_scheduler_kwargs": "{ }"}, {}),
        ({"per_device_train_batch_size": "4"}, {"micro_batch_size": "4", "global_batch_size": "4"}),
        ({"gradient_accumulation_steps": "4"}, {"micro_batch_size": "8", "global_batch_size": "32"}),
        ({"per_device_train_batch_size": "2", "gradient_accumulation_steps": "3"},
         {"micro_batch_size": "2", "global_batch_size": "6"}),
    ],
    ids=str,
)  # fmt: skip
def test_every_word_of_the_trainer_becomes_ours(theirs, ours, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert translate(**theirs) == (ours, [])
    monkeypatch.setenv("WORLD_SIZE", "8")
    size = {"global_batch_size": str(8 * int(ours["global_batch_size"]))} if "global_batch_size" in ours else {}
    assert translate(**theirs) == (ours | size, [])
