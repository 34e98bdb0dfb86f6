"""data_gen.generate against a real language model: SmolLM2-135M, behind tests/helpers/model_server.py, on the CPU."""

import json
import signal
import sqlite3
import time

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

import openai
import torch

from data_gen import generate as module
from data_gen.api import collector as collect
from data_gen.api.prompt import FORMATS as ASKED
from data_gen.api.prompt import SCHEMA, Prompter, read_seed_tasks
from data_gen.base.cli import run_for_exit_code
from data_gen.rows.parse import parse_answer
from data_gen.rows.repairs import repair_item
from engine.inference.generation import generate
from engine.text.templates import Row, encode_prompt
from tests.helpers.forks import Started
from tests.helpers.model_server import Guide, Options, Server, load, parts_of
from tests.helpers.run import environment, events, finetune

FIELDS = ["instruction", "input", "output"]
PROMPT = {"n_tasks": 3, "n_examples": 1}
CAPITAL = "What is the capital of France?"
RUN = "from data_gen.base.cli import run_command\nfrom data_gen.generate import main\nrun_command(main)"


@pytest.fixture(scope="module")
def weights(smollm2):
    return load(smollm2)


def flags(server, out, *more):
    common = (
        "--model", "smollm2", "--price-in", "0.5", "--price-out", "2", "--tasks-per-request", PROMPT["n_tasks"],
        "--examples", PROMPT["n_examples"], "--concurrency", 4, "--quiet",
    )  # fmt: skip
    return [str(word) for word in ("--base-url", server.base_url, "--out", out, *common, *more)]


def received(out):
    """(request, kind, raw body, input tokens, output tokens) of the attempts that something came back for."""
    with sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        sql = "SELECT request, kind, body, input_tokens, output_tokens FROM received JOIN sent USING (attempt)"
        return db.execute(sql + " ORDER BY request").fetchall()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def until(condition):
    """Wait until the condition holds, for ten minutes at most."""
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


@pytest.fixture
def handler():
    """Restore the handler of SIGTERM, which a run in this process replaces."""
    found = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, found)


def ended(process, server):
    return process.poll() is not None or not server.decoder.is_alive()


# ---- the server itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_model_prefers_the_json_is_whole(weights, seed):
    """A model that knows nothing: any allowed id at random, with those that hold quotes, backslashes or half of a
    character preferred."""
    tokenizer, vocabulary, g = weights.tokenizer, weights.vocabulary, torch.Generator().manual_seed(seed)
    hard = torch.zeros(tokenizer.vocab_size)
    for id, piece in vocabulary.pieces.items():
        hard[id] = 1 + 400 * (b'"' in piece or b"\\" in piece or piece == b"u" or max(piece) > 0xBF)
    guide, ids = Guide(SCHEMA, vocabulary, Options(items=4, string_tokens=4)), []
    while True:
        ids += tokenizer.encode(guide.fixed().decode())
        if not guide.parts:
            break
        allowed = guide.allowed()
        ids.append(int(allowed[torch.multinomial(hard[allowed], 1, generator=g)]))
        guide.take(ids[-1])
        assert guide.room > -9, "a string goes on past its cap for more than an escape or a character"
    text = b"".join(vocabulary.pieces[id] for id in ids).decode()  # strict: whole characters
    tasks = json.loads(text)["tasks"]
    assert 1 <= len(tasks) <= 4 and all(list(task) == FIELDS for task in tasks)
    assert all(isinstance(value, str) for task in tasks for value in task.values())
    assert text == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["a"]},
        {"type": "string", "pattern": "a+"},
        {"type": "array"},
    ],
)
def test_a_schema_that_it_cannot_hold_to_is_refused(schema):
    with pytest.raises(ValueError, match=r"Invalid schema"):
        parts_of(schema, 1, 3)


def test_the_endpoint_is_the_model(weights):
    """Greedy text is engine.generate's, also beside others in a batch; a cut-off answer is cut off and counted."""
    asked = [{"role": "user", "content": CAPITAL}]
    prompt = encode_prompt(Row("test", (("user", CAPITAL),)), weights.tokenizer, "chatml")
    with Server(weights, string_tokens=4) as server:
        expected = generate(weights.model, [prompt], server.decoder.stops, 12)[0]
        client = openai.OpenAI(base_url=server.base_url, api_key="x", max_retries=0)
        assert [model.id for model in client.models.list()] == [weights.name]
        done = client.chat.completions.create(model="m", messages=asked, temperature=0, max_tokens=12)
        assert "Paris" in done.choices[0].message.content
        assert done.choices[0].message.content == weights.tokenizer.decode(expected)
        assert done.choices[0].finish_reason == "stop"
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt), len(expected))
        formats = {"response_format": ASKED["json_schema"]}
        cut = client.chat.completions.create(model="m", messages=asked, max_tokens=9, **formats)
        assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 9
        with pytest.raises(json.JSONDecodeError):
            json.loads(cut.choices[0].message.content)
        assert cut.choices[0].message.content.startswith('{"tasks": [{"instruction": "')
        with pytest.raises(openai.BadRequestError, match="json_object"):
            client.chat.completions.create(model="m", messages=asked, response_format={"type": "json_object"})
        assert [entry["status"] for entry in server.log] == [200, 200, 400]


# ---- the pipeline ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1200)  # the model computes on one CPU
def test_a_dataset_from_a_model_killed_halfway_and_a_model_trained_on_it(weights, smollm2, tmp_path, capsys, handler):
    out = tmp_path / "data"
    limits = ("--rows", 4, "--max-output-tokens", 110)
    prompter = Prompter(read_seed_tasks(), **PROMPT)

    def numbers(log):
        return [next(n for n in range(200) if prompter.build_messages(n) == entry["messages"]) for entry in log]

    with Server(weights, items=3, at_least=2, string_tokens=9) as server:
        process = Started(RUN, *flags(server, out, *limits), env=environment())
        until(lambda: ended(process, server) or (len(server.log) >= 2 and received(out)))  # others are on their way
        assert server.decoder.is_alive(), "the model's thread has ended"
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        recorded, before = received(out), len(server.log)
        until(lambda: all(entry["finish_reason"] for entry in server.log))
        assert all(entry["format"] == "json_schema" for entry in server.log)
        abandoned = [entry for entry in server.log if entry["finish_reason"] == "abort"]
        assert abandoned, "nothing was in flight at the kill"
        assert run_for_exit_code(module.main, flags(server, out, *limits)) == 0
        assert not {number for number, *_ in recorded} & set(numbers(server.log[before:])), (
            "a paid answer was asked for again"
        )
        assert set(numbers(abandoned)) <= set(numbers(server.log[before:]))
        log = [entry for entry in server.log if entry["finish_reason"] != "abort"]

    # The protocol: schemas were held to, answers are recorded as they came, tokens are the server's.
    answers = received(out)
    assert len(answers) >= 2 and all(kind == "answer" for _, kind, *_ in answers)
    counted = {number: entry for number, entry in zip(numbers(log), log, strict=True)}
    for number, _, body, *usage in answers:
        entry, choice = counted.pop(number), json.loads(body)["choices"][0]
        assert usage == [entry["prompt_tokens"], entry["completion_tokens"]]
        assert choice["finish_reason"] == entry["finish_reason"]
        if choice["finish_reason"] == "stop":
            tasks = json.loads(choice["message"]["content"])["tasks"]
            assert 2 <= len(tasks) <= 3 and all(list(task) == FIELDS for task in tasks)
    assert not counted, "an answer was given and not recorded"

    # The dataset: whatever the model gave, each task of it is kept or explained.
    told = json.loads((out / "run.json").read_text())
    rows, lines = json.loads((out / "dataset.json").read_text()), lines_of(out / "dataset.jsonl")
    assert told["status"] == "done" and told["counts"]["kept"] == len(rows) == 4
    assert [{field: line[field] for field in FIELDS} for line in lines] == rows
    assert {line["provenance"]["model"] for line in lines} == {weights.name}
    assert told["counts"]["rejected"].get("malformed", 0) == 0
    cost = told["cost"]
    spent = (0.5 * sum(a[3] for a in answers) + 2 * sum(a[4] for a in answers)) / 1e6
    assert cost["spent_usd"] == pytest.approx(spent, rel=1e-9) and cost["uncertain_usd"] > 0
    assert "4 rows of" in capsys.readouterr().out
    texts = {number: json.loads(body)["choices"][0]["message"]["content"] for number, _, body, *_ in answers}
    for line in lines:
        source = line.pop("provenance")
        assert line == repair_item(parse_answer(texts[source["request"]], True)[0][source["item"]])[0]

    # And the engine trains on it.
    finetune(
        "--model", smollm2, "--data", out / "dataset.json", "--out", tmp_path / "tuned", "--max-steps", 1,
        "--device", "cpu", "--global-batch-size", 4, "--save-every", "off",
    )  # fmt: skip
    (line,) = events(tmp_path / "tuned")
    assert line["examples"] == 4 and 0 < line["loss"] < 12


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "ignored"])
def test_a_server_without_schemas_and_a_model_that_writes_none_end_it_cleanly(
    weights, tmp_path, monkeypatch, capsys, handler, refuses
):
    """In eight tokens there is no task, whatever the model says."""
    monkeypatch.setattr(collect, "FRUITLESS_AT_START", 2)
    with Server(weights, formats=(), refuses=refuses) as server:
        limits = ("--rows", 4, "--max-output-tokens", 8, "--concurrency", 1)
        code = run_for_exit_code(module.main, flags(server, tmp_path, *limits))
    said = capsys.readouterr()
    assert code == 1
    assert "the last 2 answers held nothing new that can be kept" in said.err and "rejected.jsonl" in said.err
    assert "0 rows of" in said.out and "Traceback" not in said.err
    asked = [(entry["status"], entry["format"]) for entry in server.log]
    stepped = [(400, "json_schema"), (400, "json_object"), (400, "json_object"), (200, None)]  # with a schema, without
    assert asked == ([*stepped, (200, None)] if refuses else [(200, "json_schema")] * 2)
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["status"] == "failed" and told["counts"]["kept"] == 0 and told["counts"]["answers"] == 2
    assert set(told["counts"]["rejected"]) <= {"no items", "truncated"}
    assert sum(told["counts"]["rejected"].values()) == len(lines_of(tmp_path / "rejected.jsonl"))
    assert told["cost"]["output_tokens"] == sum(entry.get("completion_tokens", 0) for entry in server.log)
    assert json.loads((tmp_path / "dataset.json").read_text()) == [] and (tmp_path / "report.html").exists()
