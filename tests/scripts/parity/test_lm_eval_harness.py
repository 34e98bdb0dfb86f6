"""lm-eval beside the engine: which answers are scored, how, and what ends with 1."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from engine.model.config import ModelConfig
from engine.model.llama import new_model
from scripts.parity import lm_eval_harness
from scripts.parity.lm_eval_harness import CLOSE, make_rows, run_harness, score_answers

SHAPE = ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=16, vocab_size=128, max_seq_len=64)


def test_as_many_answers_as_asked_each_behind_its_own_question():
    rows = make_rows(3)
    assert len(rows) == 3 and all(row["answer"].startswith("\n") for row in rows)
    assert all(row["prompt"].endswith("### Response:") for row in rows) and len({row["answer"] for row in rows}) == 3


def test_the_log_likelihood_is_of_the_answers_tokens_behind_the_prompt(monkeypatch):
    model = new_model(SHAPE, "cpu", torch.float32, "ref")
    model.init_weights(0)
    tokenizer = SimpleNamespace(encode=lambda text: [ord(character) for character in text])
    monkeypatch.setattr(lm_eval_harness, "load_model", lambda *_: (model, tokenizer, None))
    rows = [{"prompt": "Say", "answer": "\nyes"}, {"prompt": "Name one:", "answer": "a"}]
    for row, found in zip(rows, score_answers("", rows), strict=True):
        ids = torch.tensor(tokenizer.encode(row["prompt"] + row["answer"]))
        with torch.no_grad():
            chances = model.logits(model(ids)).log_softmax(-1)
        n = len(row["prompt"])
        assert found == pytest.approx(sum(chances[i - 1, ids[i]].item() for i in range(n, len(ids))), rel=1e-5)


def test_lm_evals_answers_come_in_the_order_of_the_rows(monkeypatch, tmp_path):
    def run(command, check, env):
        assert check and env["HF_HUB_OFFLINE"] == "1" and "pretrained=folder,dtype=float32" in command
        (tmp_path / "out" / "m").mkdir(parents=True)
        lines = [{"doc_id": i, "filtered_resps": [[str(-i), "False"]]} for i in (2, 0, 1)]
        (tmp_path / "out" / "m" / "samples_answers_1.jsonl").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(subprocess, "run", run)
    assert run_harness("python", "folder", [{"prompt": "a", "answer": "b"}] * 3, tmp_path) == [0.0, -1.0, -2.0]


@pytest.mark.parametrize(("off", "code"), [(0.5, 0), (2.0, 1), (-2.0, 1)])
def test_one_answer_that_differs_makes_the_exit_code(off, code, monkeypatch, tmp_path, call_main):
    monkeypatch.setattr(
        lm_eval_harness, "make_environment", lambda *_: (tmp_path, {"lm_eval": "1", "transformers": "2"})
    )
    monkeypatch.setattr(lm_eval_harness, "run_harness", lambda python, model, rows, folder: [-5.0] * len(rows))
    ours = lambda model, rows: [-5.0] * (len(rows) - 1) + [-5.0 * (1 + off * CLOSE)]  # noqa: E731
    monkeypatch.setattr(lm_eval_harness, "score_answers", ours)
    assert call_main(lm_eval_harness, "--model", "m", "--rows", 4, "--json", tmp_path / "x.json") == code
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["answers"] == 4 and found["largest_relative_difference"] == pytest.approx(abs(off) * CLOSE)
    assert found["log_likelihood"]["lm_eval"] == -20.0 != found["log_likelihood"]["ours"]
