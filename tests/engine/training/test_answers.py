"""Answers between steps take no more memory than the steps, however many prompts there are."""

import pytest
import torch

from engine.inference.generation import generate
from engine.model.config import MODELS, ModelConfig
from engine.model.llama import new_model
from engine.planning.memory import BatchShape, activation_bytes
from engine.planning.setting import Setting
from engine.training import answers

SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=32, vocab_size=64, max_seq_len=64)


@pytest.mark.parametrize(
    ("model", "positions", "wanted"),
    [
        ("llama-7b", 512, 2),  # a position of the caches takes two of a layer's residuals: 1,024 positions of 2,048
        ("llama3-8b", 512, 8),  # 8 of 32 heads have keys: half of a residual
        ("llama3-8b", 513, 7),
        ("llama-7b", 1024, 1),
        ("llama-7b", 2048, 1),  # one is always answered
    ],
)
def test_as_many_answer_at_once_as_a_micro_batch_keeps_bytes(model, positions, wanted):
    c = MODELS[model]
    assert answers.most_at_once(c, 2048, positions) == wanted
    caches = wanted * positions * c.n_layers * 2 * c.n_kv_heads * c.head_dim * 2  # bf16
    assert wanted == 1 or caches <= activation_bytes(c, Setting(recompute="block"), BatchShape(2048, 1024))


def test_answers_are_those_of_all_at_once_in_order(monkeypatch):
    model = new_model(SHAPE, "cpu", torch.float32, "ref")
    model.init_weights(0)
    prompts = [[1 + i, 7, 9 + i][: 2 + i % 2] for i in range(7)]
    wanted, groups = generate(model, prompts, {5}, 6), []

    def counted(model, prompts, stop_ids, n):
        groups.append(len(prompts))
        return generate(model, prompts, stop_ids, n)

    monkeypatch.setattr(answers, "generate", counted)
    for at_once, sizes in ((7, [7]), (6, [4, 3]), (3, [3, 3, 1]), (2, [2, 2, 2, 1]), (1, [1] * 7)):
        groups.clear()
        n = at_once * 9  # 3 + 6 positions each; 2 K Dh is D here
        assert answers.answer(model, n, prompts, {5}, 6) == wanted and groups == sizes
    assert answers.answer(model, 9, [], {5}, 6) == []
