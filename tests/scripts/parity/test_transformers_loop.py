"""The loop that ours is compared with: its rows, its padding, and what a step of it does."""

import re
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.calls import Calls

ROWS = [{"instruction": "ab", "input": "", "output": "cde"}, {"instruction": "a", "input": "b", "output": "c"}]


def tokenize(text):
    return {"input_ids": [ord(character) % 50 for character in text]}


tokenize.eos_token_id = 99


class Tiny(torch.nn.Module):
    """A model of two matrices, of which the first may be frozen, that answers as transformers' do."""

    def __init__(self, is_frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(12, 4)
        self.head = torch.nn.Linear(4, 12)
        self.embedding.requires_grad_(not is_frozen)

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


class Descent:
    """An optimizer of torch's kind, without the seconds that an import of torch's own takes."""

    def __init__(self, parameters, lr, weight_decay, fused):
        self.parameters, self.param_groups = parameters, [{"lr": lr}]

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            p -= self.param_groups[0]["lr"] * p.grad

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


@pytest.fixture
def loop(load_beside_stand_in, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", Descent)
    return load_beside_stand_in("scripts.parity.transformers_loop")


def test_the_prompt_carries_no_loss_and_eos_does(loop):
    for max_length in (10_000, 300):
        examples = loop.encode_rows([{**ROWS[0], "output": "cde" * 50}, ROWS[1]], tokenize, max_length)
        for (ids, labels), row in zip(examples, ROWS, strict=True):
            template = loop.ALPACA_INPUT if row["input"] else loop.ALPACA_NO_INPUT
            n = len(template.format(**row))
            assert len(ids) == len(labels) <= max_length and labels[:n] == [-100] * min(n, max_length)
            assert labels[n:] == ids[n:] and (len(ids) == max_length or ids[-1] == 99)


def test_padding_is_on_the_right_without_loss_and_masked(loop):
    ids, mask, labels = loop.pad_examples([([1, 2, 3], [-100, 2, 3]), ([4], [4])])
    assert ids[1, 0] == 4 and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [[-100, 2, 3], [4, -100, -100]]


EXAMPLES = [([1, 2, 3, 4], [-100, 2, 3, 4]), ([5, 6], [-100, 6]), ([7, 8, 9], [-100, -100, 9])]


@pytest.mark.parametrize("exact_norm", [True, False])
def test_a_step_is_the_mean_over_targets_clipped_whatever_the_micro_batch(loop, exact_norm):
    found = []
    for micro in (1, 2, 3):
        made = loop.TransformersLoop("", lr=0.1, total_steps=10, exact_norm=exact_norm, load=lambda *_, **__: Tiny())
        before = [p.detach().clone() for p in made.model.parameters()]
        found.append(made.step(EXAMPLES, micro))
        assert any((a != b).any() for a, b in zip(before, made.model.parameters(), strict=True))
        assert made.optimizer.param_groups[0]["lr"] == pytest.approx(0.09)  # the schedule has gone on
        assert all(p.grad is None or not p.grad.any() for p in made.model.parameters())
    model = Tiny()
    losses = [
        torch.nn.functional.cross_entropy(model(torch.tensor([ids[:-1]]), None, False).logits[0],
                                          torch.tensor(labels[1:]), reduction="sum")
        for ids, labels in EXAMPLES
    ]  # fmt: skip
    loss = sum(losses) / 5
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for got in found:
        assert got == pytest.approx((loss.item(), norm.item()), rel=1e-5)


@pytest.mark.parametrize("exact_norm", [True, False])
def test_gradients_are_clipped_at_a_norm_of_one_and_frozen_weights_stay(loop, exact_norm):
    load = lambda *_, **__: Tiny(is_frozen=True)  # noqa: E731
    made = loop.TransformersLoop("", lr=0.1, total_steps=10, exact_norm=exact_norm, load=load)
    assert len(made.trained) == 2
    for p in made.trained:
        p.grad = torch.full_like(p, 3.0)
    norm = made.clip()
    assert norm == pytest.approx((60 * 9.0) ** 0.5)
    assert torch.stack([p.grad.norm() for p in made.trained]).norm() == pytest.approx(1.0, rel=1e-4)
    before = made.model.embedding.weight.detach().clone()
    made.optimizer.zero_grad()
    made.step(EXAMPLES, 3)
    assert torch.equal(before, made.model.embedding.weight)


def test_a_micro_batch_may_count_as_much_as_another_whatever_its_targets(loop):
    made = loop.TransformersLoop("", lr=0.1, total_steps=10, load=lambda *_, **__: Tiny())
    model, of = Tiny(), []
    for ids, labels in EXAMPLES:
        logits = model(torch.tensor([ids[:-1]]), None, False).logits[0]
        of.append(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:])))
    loss, norm = made.step(EXAMPLES, 1, loss_norm="micro-batch")
    (sum(of) / 3).backward()
    assert loss == pytest.approx((sum(of) / 3).item(), rel=1e-5)
    assert norm == pytest.approx(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item(), rel=1e-4)


@pytest.mark.parametrize(("total", "warmup"), [(10, 1), (34, 2), (100, 3), (1, 1)])
def test_the_schedule_warms_up_over_its_share_of_the_steps(total, warmup, loop, monkeypatch):
    calls = Calls()
    monkeypatch.setattr(torch.optim, "AdamW", calls.stand_in("AdamW", calls.thing("optimizer")))
    monkeypatch.setattr(loop.transformers, "get_cosine_schedule_with_warmup", calls.stand_in("schedule"))
    load = calls.stand_in("load", lambda folder, dtype: Tiny().eval())
    made = loop.TransformersLoop("folder", lr=0.5, total_steps=total, dtype=torch.bfloat16, fused=True, load=load)
    assert made.model.training
    sizes = "[float32[12, 4], float32[12, 4], float32[12]]"
    assert re.sub("Parameter containing.*?True", "P", calls.text(), flags=re.DOTALL).split("\n") == [
        "load('folder', dtype=torch.bfloat16)", f"AdamW({sizes}, lr=0.5, weight_decay=0.0, fused=True)",
        f"schedule(optimizer, {warmup}, {total})",
    ]  # fmt: skip
