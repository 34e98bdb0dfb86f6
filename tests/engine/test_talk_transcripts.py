"""All that engine.chat, engine.generate and engine.evaluate print and write."""

import io
import json
import re
import sys

import pytest
import torch

from engine import chat, evaluate, generate
from engine.base.errors import run_main
from engine.formats.save import save_hf
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from tests.helpers.chat_tokenizers import SPECIALS, write_byte_level


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of random weights, "one" with ChatML's tokens and "two" without."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, style) in enumerate((("one", "chatml"), ("two", "alpaca"))):
        write_byte_level(folder / name, SPECIALS[style])
        shape = ModelConfig(
            dim=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=264, max_seq_len=900
        )
        model = new_model(shape, "cpu", torch.float32)
        model.init_weights(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.ndim > 1 else 1)
        save_hf(folder / name, model, max_shard_bytes=10**9, bos_id=257, eos_ids=[258])
    return folder


@pytest.fixture
def told(models, tmp_path, capsys, monkeypatch):
    """Return a function that runs a command and returns all it says, without places and speeds."""

    def run(main, words, stdin="", code=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        ended = run_main(main, [*words.format(models=models, tmp=tmp_path).split(), "--device", "cpu"])
        if code is not None:
            assert ended == code
        captured = capsys.readouterr()
        text = f"$ {words}{f' => {ended}' if ended else ''}\n{captured.out}{captured.err}".replace(
            str(models), "MODELS"
        ).replace(str(tmp_path), "FOLDER")
        return re.sub(r"[\d.]+ tokens/s", "# tokens/s", text)

    return run


TALK = '''Hi
/set
/set temperature 0.5
/set max_tokens 2
/set seed 7
/set top_k 40
/set top_p 0.5
/set min_p 0.01
/set repetition_penalty 1.5
/set
/system Be brief.
Two\\
lines
/retry
//slash
"""several
  lines"""
/save {tmp}/chat.json
/system
/reset
/help
/retry'''


def test_what_a_chat_says(told, tmp_path, snapshot):
    said = told(chat.main, "--model {models}/one --max-new-tokens 3 --temperature 0 --seed 3 --system S", "a\n/set\nb")
    said += told(chat.main, "--model {models}/one --prompt-style chatml --max-new-tokens 3 --temperature 0",
                 TALK.replace("{tmp}", str(tmp_path)), 3)  # fmt: skip
    assert f"{said}{(tmp_path / 'chat.json').read_text()}" == snapshot


WRONG = ("/set temperature 101", "/set top_p 0", "/set top_k -1", "/set top_k 1.5", "/set min_p 1.1", "/set seed -1",
         "/set repetition_penalty 0", "/set max_tokens 0", "/set nothing 1", "/set seed", "/nothing", "/save",
         "/save {tmp}/x.json", "/retry", "x" * 250)  # fmt: skip


def test_what_a_chat_refuses(told, tmp_path, snapshot):
    said = [told(chat.main, "--model {models}/two --max-length 250", line.replace("{tmp}", str(tmp_path)), None)
            for line in WRONG]  # fmt: skip
    assert "\n".join(said) == snapshot


def test_what_generate_prints(told, tmp_path, snapshot):
    (tmp_path / "lines").write_text("First\n\nSecond\nThird\n")
    rows = [{"instruction": "Say", "input": "it", "output": ""}, {"instruction": "Now", "input": ""}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    ask = "--model {models}/one --max-new-tokens 5 --temperature 0 "
    said = [told(generate.main, ask + more) for more in (
        "--prompt Hi", "--prompt Hi --input x", "--prompt Hi --raw", "--prompt Hi --prompt-style chatml",
        "--prompts {tmp}/lines --batch-size 2", "--prompts {tmp}/rows.json", "--prompt Hi --temperature 1.5 --seed 4",
    )]  # fmt: skip
    said += [told(generate.main, f"{ask}{more}", code=None) for code, more in (
        (2, "--prompt Hi --max-new-tokens 900"), (2, ""), (2, "--prompt Hi --prompts {tmp}/lines"), (3, "--prompts no"),
        (2, "--prompt Hi --temperature -1"), (2, "--prompt Hi --top-p 0"), (2, "--prompt Hi --max-new-tokens 0"),
        (2, "--input x --prompts {tmp}/lines"), (2, "--prompts {tmp}/lines --raw"), (2, "--prompt Hi --batch-size 0"),
        (2, "--prompt Hi --input x --raw"), (2, "--prompt Hi --seed -1"),
    )]  # fmt: skip
    assert "\n".join(said) == snapshot


def test_what_evaluate_prints_and_writes(told, models, tmp_path, close_snapshot):
    rows = [{"instruction": f"Say {i}", "input": "x" * i, "output": "é" * (1 + i)} for i in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "asked.txt").write_text("First\nSecond\n")
    said = told(evaluate.main, "--model {models}/one {models}/two --data {tmp}/rows.json --prompts {tmp}/asked.txt "
                "--out {tmp}/out --max-new-tokens 4 --max-length 400 --batch-size 1")  # fmt: skip
    said = re.sub(r"│ +[\d.e+]+ │\n", "│ # │\n", said)
    said += told(evaluate.main, "--model {models}/one --data {tmp}/rows.json --out {tmp}/loss --prompt-style chatml")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for result in results["results"]:
        assert result.pop("tokens_per_second") > 0
    results = json.dumps(results, indent=1).replace(str(models), "MODELS").replace(str(tmp_path), "FOLDER")
    answers = [(tmp_path / "out" / f"{name}.json").read_text() for name in ("one", "two")]
    assert "\n".join([said, results, *answers]) == close_snapshot
