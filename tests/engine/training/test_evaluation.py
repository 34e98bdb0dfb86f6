"""What is evaluated and answered between steps, once each, and what a held-out loss is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.base.errors import Stopped
from engine.data.packing import Packing
from engine.distributed.world import World
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.training import evaluation
from engine.training.plan import Plan
from tests.helpers.datasets import dataset


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


def test_the_held_out_loss_is_the_mean_over_all_loss_tokens_however_they_are_cut(monkeypatch):
    """Of rows of unlike lengths, of which some share a prefix and some are learned in part."""
    shape = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=32, vocab_size=64, max_seq_len=64)
    model = new_model(shape, "cpu", torch.float32, "ref")
    model.init_weights(0)
    rows = [[*range(10, 20), *range(30, 32 + 3 * i)] for i in range(5)]
    targets = [[False] * (8 - i) + [True] * (len(row) - 8 + i) for i, row in enumerate(rows)]
    held_out = dataset(rows, targets)
    held_out.counts["loss_tokens"] = sum(map(sum, targets))
    losses = []
    for row, learned in zip(rows, targets, strict=True):
        logits = model.logits(model(torch.tensor(row)))[:-1][torch.tensor(learned[1:])].detach()
        wanted = torch.tensor(row)[1:][torch.tensor(learned[1:])]
        losses += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
    written = {}
    run = SimpleNamespace(
        world=World(), signals=SimpleNamespace(pending=lambda: False),
        progress=SimpleNamespace(track=lambda what, chunks: chunks, print_message=print),
        metrics=SimpleNamespace(write=lambda event, **fields: written.update(fields | {"event": event})),
    )  # fmt: skip
    plan = SimpleNamespace(held_out=held_out, device=torch.device("cpu"))
    for n, budget in ((2, 40), (256, 10**6)):
        monkeypatch.setattr(evaluation, "CHUNK_EXAMPLES", n)
        checkpoints = SimpleNamespace(batches=SimpleNamespace(packing=Packing(budget, best_fit=False)))
        evaluation.evaluate(plan, run, checkpoints, model, 3)
        assert (written["event"], written["step"], written["loss_tokens"]) == ("eval", 3, len(losses))
        assert written["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert written["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


class TwoRanks:
    """One of two ranks, as far as an evaluation asks it. The other is asked to stop where stops says so.

    others: the other's share of the loss.
    """

    size = 2

    def __init__(self, rank, stops=False, others=0.0):
        self.rank, self.stops, self.others, self.seen = rank, stops, others, []

    def note_place(self, place):
        self.seen.append(place)

    def any_rank(self, holds):
        return holds or self.stops

    def sum_over_ranks(self, total):
        self.seen.append(float(total))
        return total + self.others


def evaluate_on(world):
    """Evaluate a small model on rows that two ranks share, and return the loss that this rank writes."""
    shape = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=32, vocab_size=64, max_seq_len=64)
    model = new_model(shape, "cpu", torch.float32, "ref")
    model.init_weights(0)
    held_out = dataset([[*range(10, 20), *range(30, 32 + i)] for i in range(6)])
    held_out.counts["loss_tokens"] = 1
    losses = []
    run = SimpleNamespace(
        world=world, signals=SimpleNamespace(pending=lambda: False),
        progress=SimpleNamespace(track=lambda what, chunks: chunks, print_message=print),
        metrics=SimpleNamespace(write=lambda event, **fields: losses.append(fields["loss"])),
    )  # fmt: skip

    def stop(step):
        raise Stopped(f"at step {step}")

    checkpoints = SimpleNamespace(batches=SimpleNamespace(packing=Packing(20)), stop_run=stop)
    plan = SimpleNamespace(held_out=held_out, device=torch.device("cpu"))
    evaluation.evaluate(plan, run, checkpoints, model, 3)
    return losses[0]


def test_the_shares_of_all_ranks_are_the_whole():
    alone = evaluate_on(World())
    shares = [evaluate_on(TwoRanks(rank)) for rank in (0, 1)]
    assert sum(shares) == pytest.approx(alone, rel=1e-5) and min(shares) > 0.1 * alone and shares[0] != shares[1]
    assert evaluate_on(TwoRanks(0, others=shares[1])) == pytest.approx(alone, rel=1e-5)


def test_a_signal_to_one_rank_stops_all():
    """A rank that stopped alone would leave the others waiting for its share."""
    with pytest.raises(Stopped, match="at step 3"):
        evaluate_on(TwoRanks(1, stops=True))


@pytest.mark.parametrize(("step", "title"), [(0, "before"), (2, "after 2 steps"), (4, "after")])
def test_samples_end_where_their_style_does_and_are_told_under_their_step(step, title, monkeypatch):
    said, written, asked = [], [], []
    tokenizer = SimpleNamespace(stop_ids={2}, decode=lambda ids: f" {ids}\nb ")
    monkeypatch.setattr(evaluation, "encode_prompt", lambda row, tokenizer, style: f"{row.instruction} in {style}")
    monkeypatch.setattr(evaluation, "find_stop_ids", lambda tokenizer, style: {2, 7})
    monkeypatch.setattr(evaluation, "answer", lambda *given: asked.append(given) or ["x"])
    config = SimpleNamespace(prompt_style="chatml", sample_tokens=5)
    plan = SimpleNamespace(tokenizer=tokenizer, config=config, sample_prompts=["p"], total_steps=4)
    run = SimpleNamespace(
        progress=SimpleNamespace(print_message=said.append),
        metrics=SimpleNamespace(write=lambda event, **fields: written.append((event, fields))),
    )  # fmt: skip
    halved = SimpleNamespace(batches=SimpleNamespace(packing=Packing(77)))  # smaller than the plan's
    evaluation.show_samples(plan, run, halved, "model", step)
    assert asked == [("model", 77, ["p in chatml"], {2, 7}, 5)]
    assert written == [("sample", {"step": step, "prompt": "p", "text": "x\nb"})]
    assert said[1:] == [f"[{title}] p\n    x\n    b"]
