"""What flags are where they are not given, and the least and the most that each may be."""

from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen import estimate, generate, judge
from data_gen.api import flags
from data_gen.api.ledger import Ledger
from data_gen.judging import run as judge_run

NOTHING = ("None", "False", "[]", "{}")  # the defaults of the flags that are not listed here
ROWS = {
    "rows": 52_000, "language": "en", "seed": 0, "tasks_per_request": 20, "examples": 3, "temperature": 1.0,
    "max_output_tokens": 4096,
}  # fmt: skip
SERVER = {"base_url": "https://api.openai.com/v1", "api_key_env": "OPENAI_API_KEY", "concurrency": 32}
RUN = {"timeout": 600, "patience": 900, "max_attempts": 8, "backoff": 1}
DEFAULTS = {
    generate: ROWS | SERVER | RUN | {"out": Path("out/data"), "poll": 30},
    judge: SERVER | RUN
    | {"out": Path("out/judge"), "canaries": 20, "seed": 0, "temperature": 0.0, "max_output_tokens": 2048},
    estimate: ROWS | SERVER,
}  # fmt: skip


@pytest.mark.parametrize("command", DEFAULTS, ids=lambda command: command.__name__)
def test_defaults(command, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    found = {
        action.dest: action.default
        for action in command.build_parser()._actions
        if action.dest not in ("help", "debug")
    }
    assert {name: found[name] for name in DEFAULTS[command]} == DEFAULTS[command]
    for name in found.keys() - DEFAULTS[command]:
        assert repr(found[name]) in NOTHING, name


@pytest.mark.parametrize(
    "parse, taken, refused",
    [
        (flags.parse_count, ("1", "52000"), ("0", "-1", "1.5", "x", "")),
        (flags.parse_limit, ("1", "1000000"), ("0", "1000001", "1e3")),
        (flags.parse_seconds, ("5e-324", "999999999"), ("0", "-1", "1e9", "inf", "nan")),
        (flags.parse_dollars, ("0", "1000000"), ("-0.01", "1000000.01", "nan")),
        (flags.parse_temperature, ("0", "2"), ("-5e-324", "2.0000000000000004", "nan")),
        (flags.parse_fields, ("{}", '{"top_p": 1}'), ("[]", "1", '{"n": 1}', '{"top_p": 1, "stream": false}', "{")),
        (judge.parse_canaries, ("0", "1"), ("-1", "0.5")),
    ],
)
def test_the_ends_of_what_a_flag_may_be(parse, taken, refused):
    for text in taken:
        parse(text)
    for text in refused:
        with pytest.raises(ArgumentTypeError, match="wanted"):
            parse(text)


@pytest.mark.parametrize("field", ["model", "messages", "n", "stream", "max_tokens", "max_completion_tokens"])
def test_our_own_fields_are_no_extra_ones(field):
    """Each decides what an answer costs, or which of several is read: the cap counts one."""
    with pytest.raises(ArgumentTypeError, match=f"a JSON object without .*{field}"):
        flags.parse_fields(f'{{"top_p": 0.5, "{field}": 2}}')


def test_types_of_the_flags():
    """Each number is read by a parser that knows its ends, but a seed."""
    for command in DEFAULTS:
        for action in command.build_parser()._actions:
            assert action.type is not float and (action.type is not int or action.dest == "seed"), action.dest


class Reached(Exception):
    """What a run was about to be made of."""


@pytest.mark.parametrize(
    "module, begin, argv",
    [
        (generate, lambda *given: generate.generate_rows(*given, None, "a-key"),
         ["--model", "m", "--rows", "9", "--batch-tokens", "7", "--poll", "6"]),
        (judge_run, lambda *given: judge_run.ask_judge(*given, "a-key"), ["a", "b", "--judge", "m"]),
    ],
    ids=["generate", "judge"],
)  # fmt: skip
def test_a_flag_reaches_what_obeys_it(module, begin, argv, tmp_path, monkeypatch):
    def reach(*parts):
        raise Reached(*parts)

    monkeypatch.setattr(module, "Collector", reach)
    monkeypatch.setattr(module, "check_settings", lambda *given: None, raising=False)
    command = generate if module is generate else judge
    options = command.build_parser().parse_args([
        *argv, "--base-url", "http://localhost:9/v1", "--quiet", "--max-usd", "0.000003", "--concurrency", "3",
        "--timeout", "11", "--patience", "12", "--max-attempts", "5", "--backoff", "0.5",
    ])  # fmt: skip
    ledger, keeper, builder = Ledger(tmp_path), SimpleNamespace(), SimpleNamespace()
    (billed, first), (_, lost) = (ledger.prepare_intent(number, "", "m", most) for number, most in ((0, 6), (1, 7)))
    ledger.commit([first, lost, ledger.prepare_outcome(billed, "refused", 400, "", cost=5)])
    with pytest.raises(Reached) as reached:
        begin(options, ledger, keeper, builder)
    ledger.close()
    *same, client, rate, budget, _, limits, progress = reached.value.args
    assert same == [ledger, keeper] and progress.quiet and reached.value.args[5] is builder
    assert client.timeout_s == 11 and client.api.api_key == "a-key" and client.api.base_url.port == 9
    assert (rate.max_in_flight, rate.backoff_s) == (3, 0.5)
    assert (budget.cap, budget.spent, budget.uncertain) == (3 * 10**6, 5, 7)
    batch = (6, 7) if module is generate else (30, None)
    assert (limits.patience_s, limits.max_attempts, limits.poll_s, limits.batch_tokens) == (12, 5, *batch)


@pytest.mark.parametrize("more, common", [((), False), (("--common",), True)])
def test_the_flags_of_a_judge_say_what_is_compared(more, common, monkeypatch):
    def reach(*parts):
        raise Reached(*parts)

    monkeypatch.setattr(judge, "interrupt_at_stop_signals", lambda: None)
    monkeypatch.setattr(judge, "read_answers", str)
    monkeypatch.setattr(judge, "match_answers", lambda files, is_common: (files, is_common))
    monkeypatch.setattr(judge, "plan_comparisons", reach)
    with pytest.raises(Reached) as reached:
        judge.main(["a", "b", "--judge", "m", "--canaries", "3", "--seed", "9", *more])
    assert reached.value.args == ((["a", "b"], common), 3, 9)


def test_the_seed_of_a_judge_draws_every_interval(monkeypatch):
    drawn = []
    monkeypatch.setattr(judge_run, "compute_figures", lambda *given: drawn.append(given[-1]))
    monkeypatch.setattr(judge_run, "summarize_votes", lambda *given: drawn.append(given[-1]) or [])
    keeper, questions = SimpleNamespace(verdicts={}, models={}), SimpleNamespace(names=("a", "b"))
    monkeypatch.setattr(judge_run, "describe_run", lambda *given: {}[drawn[-1]])  # ends it here
    with pytest.raises(KeyError):
        judge_run.write_results(
            SimpleNamespace(seed=9), None, keeper, questions, SimpleNamespace(pairs=()), [], None, None
        )
    assert drawn == [9, 9]
