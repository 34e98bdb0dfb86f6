"""lm-eval beside the engine: which answers are scored, how, and what ends with 1."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.model.config import ModelConfig
from engine.model.llama import new_model
from scripts.parity import lm_eval_harness
from scripts.parity.lm_eval_harness import CLOSE, make_rows, run_harness, score_answers
from tests.helpers.calls import Calls

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


def test_the_whole_comparison(monkeypatch, tell, snapshot, tmp_path):
    calls = Calls()
    monkeypatch.setattr(lm_eval_harness.tempfile, "TemporaryDirectory", calls.folder)
    monkeypatch.setattr(lm_eval_harness, "make_rows", calls.stand_in("make_rows", ["a", "b", "c"]))
    made = (Path("bin"), {"lm_eval": "0.4", "transformers": "5.1", "torch": "x"})
    monkeypatch.setattr(lm_eval_harness, "make_environment", calls.stand_in("make_environment", made))
    monkeypatch.setattr(lm_eval_harness, "run_harness", calls.stand_in("run_harness", [-5.0, -8.0, -16.0]))
    monkeypatch.setattr(lm_eval_harness, "score_answers", calls.stand_in("score", [-5.0, -8.0 - 2**-12, -16.0]))
    monkeypatch.chdir(tmp_path)
    text = tell(lm_eval_harness, "--model", "dir/mine", "--rows", 3)
    assert text + "\n" + calls.text().replace(str(tmp_path), "FOLDER") == snapshot


def test_lm_eval_is_started_as_its_users_start_it(monkeypatch, tmp_path, snapshot):
    told = []

    def run(command, check, env):
        changed = {name: value for name, value in env.items() if os.environ.get(name) != value}
        told.extend([json.dumps(command, indent=1), json.dumps(changed, indent=1), f"check={check}"])
        (tmp_path / "out" / "m").mkdir(parents=True)
        line = json.dumps({"doc_id": 0, "filtered_resps": [["-1.5", "False"]]})
        (tmp_path / "out" / "m" / "samples_answers_1.jsonl").write_text(line)

    monkeypatch.setattr(subprocess, "run", run)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    rows = [{"prompt": "a b", "answer": "\nc"}]
    assert run_harness("python", "folder", rows, tmp_path) == [-1.5]
    files = [(tmp_path / name).read_text() for name in ("rows.jsonl", "answers.yaml")]
    assert "\n".join([*told, *files]).replace(str(tmp_path), "FOLDER") == snapshot


def test_tasks_with_an_input_are_no_questions(monkeypatch):
    tasks = [{"instruction": f"Q{i}", "input": "x" * (i % 2), "output": f"A{i}"} for i in range(6)]
    monkeypatch.setattr(lm_eval_harness, "read_seed_tasks", lambda: tasks)
    rows = make_rows(2)
    assert rows == [
        {"prompt": f"### Instruction:\nQ{i}\n\n### Response:", "answer": f"\nA{i}"} for i in (0, 2)
    ]  # fmt: skip


def test_flags_have_defaults(defaults_of):
    flags = ("--json", "x", "--model", "m")
    assert defaults_of(lm_eval_harness, *flags) == {"json": "x", "model": "m", "rows": 40}
