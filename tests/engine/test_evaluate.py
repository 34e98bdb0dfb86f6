"""python -m engine.evaluate: the loss that transformers computes, and answers that are those of generate."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from engine import evaluate
from engine.base.errors import run_main
from engine.evaluate import EvaluateConfig, main
from engine.inference.generation import generate
from engine.serving.models import load_model
from engine.text.templates import ALPACA_NO_INPUT, Row, encode_prompt, find_stop_ids
from tests.helpers.small_model import small_model

ROWS = [{"instruction": f"Name {n} things.", "input": "", "output": f"One, two and {n} more."} for n in range(3, 12)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "prompts.txt").write_text("Name a fruit.\n\nSay hello.\n")
    words = [
        "--model",
        str(small_model()),
        "--data",
        str(folder / "rows.json"),
        "--prompts",
        str(folder / "prompts.txt"),
    ]
    assert run_main(main, [*words, "--out", str(folder / "out"), "--max-new-tokens", "9"]) == 0
    return folder


def test_the_loss_is_that_of_transformers(measured):
    (result,) = json.loads((measured / "out" / "results.json").read_text())["results"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_model())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float64)
    total = n = n_bytes = 0
    for row in ROWS:
        prompt = tokenizer(ALPACA_NO_INPUT.format(instruction=row["instruction"])).input_ids
        answer = [*tokenizer(row["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        logprobs = theirs(ids).logits[0].log_softmax(-1)
        total -= sum(logprobs[at - 1, ids[0, at]].item() for at in range(len(prompt), ids.shape[1]))
        n, n_bytes = n + len(answer), n_bytes + len(row["output"])
    assert result["loss_tokens"] == n and result["loss"] == pytest.approx(total / n, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-5)


def test_answers_are_written_as_alpaca_eval_reads_them(measured):
    outputs = json.loads((measured / "out" / f"{small_model().name}.json").read_text())
    model, tokenizer, _ = load_model(str(small_model()), torch.device("cpu"), torch.float32)
    prompts = [encode_prompt(Row("", None, text), tokenizer) for text in ("Name a fruit.", "Say hello.")]
    want = generate(model, prompts, find_stop_ids(tokenizer, "alpaca"), 9)
    assert [output["output"] for output in outputs] == [tokenizer.decode(ids).strip() for ids in want]
    (result,) = json.loads((measured / "out" / "results.json").read_text())["results"]
    cut = sum(len(ids) == 9 for ids in want)
    assert (result["answers"], result["cut_answers"]) == (2, cut) and cut
    assert result["mean_characters"] == sum(len(output["output"]) for output in outputs) / 2
    assert [output["instruction"] for output in outputs] == ["Name a fruit.", "Say hello."]
    assert {(output["generator"], output["dataset"]) for output in outputs} == {(small_model().name, "prompts")}


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 2, "give --data, --prompts or both"),
        (["--prompts", "/no/such"], 3, "--prompts /no/such: cannot be read"),
        (["--data", "/no/such"], 3, "/no/such"),
        (["--data", "x", "--model", "a/m", "b/m"], 2, "two are called m"),
        (["--data", "x", "--max-length", "9000"], 2, "--micro-batch-tokens wants at least --max-length"),
    ],
)
def test_what_cannot_be_measured_is_told(capsys, words, code, told):
    try:
        found = run_main(main, words)
    except SystemExit as stop:
        found = stop.code
    assert found == code and told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"model": ("a/m",), "adapter_dir": "b/m"}, "two are called m"),
        ({"model": ("a/m.gguf", "b/m")}, "two are called m"),
        ({"model": ("a", "b"), "adapter_dir": "c"}, "--adapter-dir goes with one --model"),
        ({"micro_batch_tokens": 511}, "--micro-batch-tokens wants at least --max-length"),
        ({"adapter_dir": ""}, "--adapter-dir is empty, wanted a folder"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, told):
    with pytest.raises(ValueError, match=told):
        EvaluateConfig(data=("x",), **flags)
    assert EvaluateConfig(data=("x",), model=("a/m", "b/n"), micro_batch_tokens=512).max_length == 512


def test_rows_are_measured_in_pieces_and_as_what_they_are(measured, monkeypatch, capsys):
    words = ["--model", str(small_model()), "--data", str(measured / "rows.json"), "--out", str(measured / "again")]
    monkeypatch.setattr(evaluate, "CHUNK_EXAMPLES", 2)
    assert run_main(main, words) == 0
    found, before = (json.loads((measured / o / "results.json").read_text())["results"][0] for o in ("again", "out"))
    assert found["loss"] == pytest.approx(before["loss"], rel=1e-6) and found["loss_tokens"] == before["loss_tokens"]
    assert run_main(main, [*words, "--max-length", "40"]) == 0
    cut = json.loads((measured / "again" / "results.json").read_text())["results"][0]
    assert (found["truncated_rows"], cut["truncated_rows"]) == (0, len(ROWS))
    for value in (math.inf, math.nan):
        monkeypatch.setattr(evaluate.Transformer, "loss", lambda *_, value=value: torch.tensor(value))
        assert run_main(main, words) == 4 and "the loss of the rows is" in capsys.readouterr().err


def test_answers_that_the_model_has_no_positions_for_are_refused(measured, capsys):
    words = ["--model", str(small_model()), "--prompts", str(measured / "prompts.txt"), "--out", str(measured / "no")]
    assert run_main(main, [*words, "--max-new-tokens", "500"]) == 2
    assert "the model has 512; lower --max-new-tokens" in capsys.readouterr().err
    assert not (measured / "no" / "results.json").exists()


def test_the_rate_of_answers_is_their_tokens_over_the_seconds_they_took(tmp_path, monkeypatch):
    clock = iter([1000.0, 1004.0])
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    told = [SimpleNamespace(ids=[1, 2, 3], reason="stop"), SimpleNamespace(ids=[1] * 7, reason="length")]
    monkeypatch.setattr(evaluate, "answer_prompts", lambda *_: told)
    tokenizer = SimpleNamespace(decode=lambda ids: f" {len(ids)} ")
    monkeypatch.setattr(evaluate, "encode_prompt", lambda *_: [1])
    monkeypatch.setattr(evaluate, "find_stop_ids", lambda *_: {2})
    config = EvaluateConfig(model=("m",), prompts=str(tmp_path / "p.json"), out=str(tmp_path))
    model = SimpleNamespace(config=SimpleNamespace(max_positions=10**6))
    rows = [Row("x", None, "one"), Row("x", None, "two")]
    found = evaluate.write_answers(model, tokenizer, "alpaca", rows, config, "m")
    assert found == {"answers": 2, "cut_answers": 1, "mean_characters": 1.0, "tokens_per_second": 2.5}


def test_the_remedy_for_bad_rows_is_no_flag_of_another_command(tmp_path, capsys):
    for flag in ("--data", "--prompts"):
        (tmp_path / "rows.json").write_text(json.dumps([*ROWS, {"instruction": 1, "output": "One."}]))
        assert run_main(main, ["--model", str(small_model()), flag, str(tmp_path / "rows.json")]) == 3
        told = capsys.readouterr().err
        assert "repair them, or leave them out" in told and "--skip-bad-rows" not in told
