"""data_gen.estimate: arithmetic that can be done by hand, and a forecast that a run bears out."""

import re
from decimal import Decimal

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen import estimate, generate
from data_gen.api.attempt import RequestBuilder
from data_gen.api.dialect import Sampling
from data_gen.api.ledger import Ledger
from data_gen.api.prices import Price, read_price_table
from data_gen.api.progress import format_clock
from data_gen.api.prompt import Prompter, read_seed_tasks
from data_gen.base.cli import run_for_exit_code
from tests.helpers.openai_server import Server


def told(capsys, *words):
    assert run_for_exit_code(estimate.main, [str(word) for word in words]) == 0
    return capsys.readouterr().out


def line_of(text, model):
    """Return the figures of a model's line: $/M in, $/M out, dollars, dollars per 1,000 rows, one request at most."""
    (line,) = (line for line in text.splitlines() if line.startswith(model + " "))
    return [Decimal(word.strip("$").replace(",", "")) for word in line.split()[1:6]]


@pytest.mark.parametrize(
    "words", ["", "--model gpt-5.4-mini --rows 1000", "--batch --max-output-tokens 512", "--language de"]
)
def test_what_is_told_is_kept_whole(words, capsys, snapshot, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert told(capsys, *words.split()) == snapshot


def test_the_sum_can_be_done_by_hand(capsys):
    text = told(capsys, "--model", "gpt-5.6-luna", "--rows", 52_000)
    requests, n_in, n_out = (
        int(n.replace(",", ""))
        for n in re.search(r"([\d,]+) requests of ([\d,]+) tokens in and ([\d,]+) out", text).groups()
    )
    assert requests == 5200 and n_out == 1660 and 500 < n_in < 1500
    assert "5,201 requests" in told(capsys, "--model", "gpt-5.6-luna", "--rows", 52_001)
    assert f"{format_clock(5200 * 1660 / 60 / 32)} with 32 in flight at 60 tokens/s" in text
    for n in (1, 64):
        text_of_n = told(capsys, "--model", "gpt-5.4-mini", "--concurrency", n)
        assert f"{format_clock(5200 * 1660 / 60 / n)} with {n} in flight" in text_of_n
    price_in, price_out, dollars, thousand, most = line_of(text, "gpt-5.6-luna")
    assert (price_in, price_out) == (Decimal("0.2"), Decimal("1.2"))
    assert dollars == pytest.approx(Decimal(requests * (n_in * 0.2 + n_out * 1.2) / 1e6), rel=Decimal("0.002"))
    assert thousand == pytest.approx(dollars / 52, rel=Decimal("0.01"))
    assert most > dollars / requests
    assert "assumed" in text and read_price_table().as_of in text and "bills its reasoning as output" in text


def test_a_batch_is_half_the_price(capsys):
    plain = line_of(told(capsys, "--model", "gpt-5.4"), "gpt-5.4")
    batch = line_of(told(capsys, "--model", "gpt-5.4", "--batch"), "gpt-5.4")
    assert [2 * value for value in batch[:2]] == plain[:2] and abs(2 * batch[2] - plain[2]) <= Decimal("0.02")
    assert abs(2 * batch[4] - plain[4]) <= Decimal("0.0002"), "of one request too"


def test_without_a_model_every_price_is_compared_the_cheapest_first(capsys):
    text = told(capsys)
    models = read_price_table().models
    dollars = [line_of(text, name)[2] for name, model in models.items() if model.usd]
    shown = [line.split()[0] for line in text.splitlines() if line.split() and line.split()[0] in models]
    ends = {
        line.split()[0]: line.split()[6:] for line in text.splitlines() if line.split() and line.split()[0] in models
    }
    assert ends == {name: [str(models[name].ends)] if models[name].ends else [] for name in shown}
    assert len(shown) == len(dollars) and [line_of(text, model)[2] for model in shown] == sorted(dollars)


def test_prices_of_your_own(capsys, tmp_path):
    text = told(
        capsys, "--model", "mine", "--price-in", "1", "--price-out", "2.5", "--base-url", "http://localhost:1/v1"
    )
    assert line_of(text, "mine")[:2] == [1, Decimal("2.5")]
    assert run_for_exit_code(estimate.main, ["--model", "mine"]) == 2
    assert "--price-in" in capsys.readouterr().err


def test_a_run_that_is_there_gives_its_own_means(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Server(seed=3) as server:
        words = ["--base-url", server.base_url, "--model", "m", "--price-in", "0.1", "--price-out", "0.4", "--quiet"]
        assert run_for_exit_code(generate.main, [*words, "--rows", "200", "--out", str(tmp_path)]) == 0
        billed = server.stats()["billed"]
    capsys.readouterr()
    text = told(capsys, *words[2:-1], "--out", tmp_path, "--rows", 200)
    n_in, n_out = (int(n.replace(",", "")) for n in re.search(r"of ([\d,]+) tokens in and ([\d,]+) out", text).groups())
    assert n_in == round(billed["prompt_tokens"] / billed["requests"])
    assert n_out == round(billed["completion_tokens"] / billed["requests"])
    assert "shown by" in text and "assumed" not in text.split("\n")[0]
    assert "reasoning" not in text, "what was billed has it"
    spent = (billed["prompt_tokens"] * 0.1 + billed["completion_tokens"] * 0.4) / 1e6
    assert line_of(text, "m")[2] == pytest.approx(Decimal(spent), abs=Decimal("0.011"))
    text = told(capsys, *words[2:-1], "--out", tmp_path, "--rows", 20_000)
    assert f"20,000 rows: {100 * billed['requests']:,} requests" in text
    assert line_of(text, "m")[2] == pytest.approx(100 * Decimal(spent), rel=Decimal("0.01"))


def test_a_folder_without_a_run_is_told(capsys, tmp_path):
    assert run_for_exit_code(estimate.main, ["--model", "gpt-5.4-mini", "--out", str(tmp_path)]) == 2
    assert "wanted the folder of a run" in capsys.readouterr().err
    for content in ("", '{"counts": {"kept": "9"}}', '{"counts": {"kept": 1.5}}', "[" * 100_000):
        (tmp_path / "run.json").write_text(content)
        assert run_for_exit_code(estimate.main, ["--model", "gpt-5.4-mini", "--out", str(tmp_path)]) == 2
        assert "run.json tells no rows" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"counts": {"kept": 0}}')
    assert run_for_exit_code(estimate.main, ["--model", "gpt-5.4-mini", "--out", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"], "no ledger is made"
    Ledger(tmp_path).close()
    assert run_for_exit_code(estimate.main, ["--model", "gpt-5.4-mini", "--out", str(tmp_path)]) == 2
    assert "has no answer with a row yet" in capsys.readouterr().err


def test_a_language_that_is_unknown_is_told(capsys):
    assert run_for_exit_code(estimate.main, ["--language", "xx"]) == 2
    assert "--language is 'xx'" in capsys.readouterr().err


def test_the_prompts_that_are_measured_are_those_that_are_sent():
    prompter, sampling = Prompter(read_seed_tasks()), Sampling("m", 4096, 1.0)
    means = estimate.assume_means(RequestBuilder(prompter, sampling, Price(0, 0)))
    plain = sum(len(message["content"]) for n in range(200) for message in prompter.build_messages(n)) / 200
    assert plain / 4.3 < means.input_tokens < plain / 4.3 * 1.5


def test_an_answer_cut_off_at_its_limit_holds_fewer_rows():
    builder = RequestBuilder(Prompter(read_seed_tasks(), n_tasks=100), Sampling("m", 4150, 1.0), Price(0, 0))
    means = estimate.assume_means(builder)
    assert (means.output_tokens, means.rows) == (4150, 25)


def test_a_table_of_another_host_is_compared_too(capsys, tmp_path):
    table = tmp_path / "prices.json"
    table.write_text('{"as_of": "today", "host": "llm.example.com", "models": {"a": [1, 2], "b": [0.5, 1]}}')
    text = told(capsys, "--prices", table)
    assert line_of(text, "b")[:2] == [Decimal("0.5"), 1] and text.index("\nb ") < text.index("\na ")


def test_help_shows_the_usage(capsys):
    with pytest.raises(SystemExit, match="0"):
        estimate.main(["--help"])
    assert "usage: python -m data_gen.estimate" in capsys.readouterr().out
