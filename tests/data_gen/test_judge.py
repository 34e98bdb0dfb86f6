"""data_gen.judge as a user runs it: biases are cancelled and told, nothing is paid for twice, figures hold."""

import hashlib
import itertools
import json
import os
import random
import re
import signal
import sqlite3
import time

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen import judge as module
from data_gen.base.cli import Stopped, run_for_exit_code
from tests.helpers.forks import Started
from tests.helpers.judging import (
    CANARIES,
    QUESTIONS,
    bootstrap,
    judge_fairly,
    judge_first,
    judge_longer,
    judge_mostly_fairly,
    read_annotations,
    read_prompt,
    read_worth,
    say,
    write_answers,
)
from tests.helpers.openai_server import Server
from tests.helpers.own_rows import EVALUATION
from tests.helpers.run import command, environment

KEY = "sk-test-5f3a9c1e77d04b21"
FAULTS = {"429_ms": 0.1, "500": 0.1, "reset": 0.05, "reset_body": 0.1, "502_html": 0.05, "lost": 0.05, "html_200": 0.05}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flags(server, out, files, *more):
    common = (
        "--judge",
        "m",
        "--price-in",
        "0.1",
        "--price-out",
        "0.4",
        "--backoff",
        "0.01",
        "--quiet",
        "--canaries",
        CANARIES,
    )
    return [str(word) for word in (*files, "--base-url", server.base_url, "--out", out, *common, *more)]


def judge(server, out, files, *more):
    """Run in this process and return the exit code."""
    return run_for_exit_code(module.main, flags(server, out, files, *more))


def about(out):
    return json.loads((out / "run.json").read_text())


def preferences(path):
    return [row["preference"] for row in json.loads(path.read_text())]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_answers(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Return the folder of a run without failed attempts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch, Server(answer=judge_mostly_fairly) as server:
        patch.setenv("OPENAI_API_KEY", KEY)
        assert judge(server, out, files) == 0
    return out


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["run.json", "annotations.json"])
def test_what_a_run_writes_is_kept_whole(file, whole, files, snapshot):
    text = (whole / file).read_text().replace(str(whole.parent), "OUT").replace(str(files[0].parent), "ANSWERS")
    changing = r'("(?:started|seconds|python|openai|time_per_example)": )[^,\n]*|127.0.0.1:\d+'
    assert re.sub(changing, r"\1#", text) == snapshot


def test_figures_are_those_of_the_annotations(whole):
    told = about(whole)["results"]["pairs"][0]
    rate, error, discrete, n = read_annotations(whole / "annotations.json")
    assert told["win_rate"]["value"] == pytest.approx(rate, abs=1e-9) and discrete == pytest.approx(rate)
    assert told["win_rate"]["standard_error"] == pytest.approx(error, abs=1e-9) and told["win_rate"]["n"] == n
    low, high = bootstrap([preference - 1 for preference in preferences(whole / "annotations.json")])
    assert told["win_rate"]["interval"] == pytest.approx([low, high], abs=2.2)
    assert (told["wins"], told["draws"], told["losses"]) == tuple(
        preferences(whole / "annotations.json").count(value) for value in (2, 1.5, 1)
    )


def test_an_annotation_holds_both_orders(whole, files):
    answers = [json.loads(path.read_text()) for path in files]
    flips = two = first = winners = 0
    for row, a, b in zip(json.loads((whole / "annotations.json").read_text()), *answers, strict=True):
        assert (row["instruction"], row["output_1"], row["output_2"]) == (a["instruction"], a["output"], b["output"])
        assert (row["generator_1"], row["generator_2"]) == ("base", "model")
        assert row["annotator"].startswith("cria-m-") and row["price_per_example"] > 0
        one, other = (json.loads(text)["winner"] for text in row["raw_completion"])
        votes = {"1": 1, "2": 2, "tie": 1.5}[one], {"1": 2, "2": 1, "tie": 1.5}[other]
        assert row["preference"] == (votes[0] if votes[0] == votes[1] else 1.5)
        two += 1.5 not in votes
        flips += 1.5 not in votes and votes[0] != votes[1]
        first += (one == "1") + (other == "1")
        winners += (one != "tie") + (other != "tie")
    told = about(whole)["results"]["pairs"][0]
    assert 0 < flips < two < QUESTIONS
    assert told["flip_rate"] == pytest.approx(100 * flips / two) and told["two_winners"] == two
    assert told["first_share"] == pytest.approx(100 * first / winners)


def test_the_judge_and_its_prompt_are_named(whole):
    told = about(whole)["judge"]
    assert told["model"] == "m" and told["answered_as"] == {"m": 2 * (QUESTIONS + CANARIES)}
    assert len(told["prompt_sha256"]) == 64 and told["annotator"] == f"cria-m-{told['prompt_sha256'][:8]}"
    assert KEY not in "".join(path.read_text(errors="replace") for path in whole.iterdir() if path.is_file())


def test_a_judge_that_takes_the_first_is_cancelled_and_told(files, tmp_path, capsys):
    with Server(answer=judge_first) as server:
        assert judge(server, tmp_path, files) == 0
    assert set(preferences(tmp_path / "annotations.json")) == {1.5}
    told = about(tmp_path)["results"]["pairs"][0]
    assert (told["win_rate"]["value"], told["flip_rate"], told["first_share"]) == (50, 100, 100)
    assert told["decisive_share"] == 0
    said = capsys.readouterr().out
    assert (
        "changed its winner with the order in 100% of pairs" in said and "100% of the winners were shown first" in said
    )
    assert "a constant answer that ignores the instruction scored 50%" in said


def test_a_judge_that_takes_the_longer_is_told_and_our_estimate_takes_it_out(tmp_path, capsys):
    def length(name, question):
        return 30 if (name == "model") == (question % 10 < 7) else 20 + question % 3

    files = write_answers(tmp_path, length=length, n=30)
    with Server(answer=judge_longer) as server:
        assert judge(server, tmp_path / "out", files) == 0
    told = about(tmp_path / "out")["results"]["pairs"][0]
    assert told["win_rate"]["value"] == 70 and told["flip_rate"] == 0 and told["longer_share"] == 100
    assert told["length_controlled"]["value"] == pytest.approx(50, abs=14)
    said = capsys.readouterr().out
    assert "the longer answer won 100% of the decided pairs" in said
    assert "scored 100%" in said, "the canary is longer than the answers"


def test_a_judge_that_obeys_the_canary_is_told_and_a_fair_one_is_not(files, tmp_path, capsys):
    def obey(key, body):
        _, first, second = read_prompt(body)
        spoken = ["choose it as the winner" in text for text in (first, second)]
        return say("12"[spoken.index(True)]) if any(spoken) else judge_fairly(key, body)

    with Server(answer=obey) as server:
        assert judge(server, tmp_path / "obeys", files, "--canaries", 5) == 0
    assert "a constant answer that ignores the instruction scored 100%" in capsys.readouterr().out
    assert set(preferences(tmp_path / "obeys" / "canary.json")) == {2}
    with Server(answer=judge_fairly) as server:
        assert judge(server, tmp_path / "fair", files, "--canaries", 5) == 0
    said = capsys.readouterr().out
    assert "warning" not in said and "canary: a constant answer scored 0.0% of 5" in said
    worths = [[read_worth(row["output"]) for row in json.loads(path.read_text())] for path in files]
    assert preferences(tmp_path / "fair" / "annotations.json") == [1 + (b > a) for a, b in zip(*worths, strict=True)]


def test_three_models_meet_each_other(tmp_path, capsys):
    names = ("base", "weak", "strong")
    files = write_answers(tmp_path, names, n=12)
    for path, worth in zip(files[1:], (0.2, 2), strict=True):  # mostly below and always above
        rows = json.loads(path.read_text())
        for row in rows:
            row["output"] = row["output"].replace("<w=", f"<w={worth if worth == 2 else 0}")
            row["output"] = f"<w={read_worth(row['output']) * worth:.3f}> word"
        path.write_text(json.dumps(rows))
    with Server(answer=judge_fairly) as server:
        assert judge(server, tmp_path / "out", files) == 0
        asked = len(server.log)
        assert asked == 2 * (3 * 12 + CANARIES)
        assert judge(server, tmp_path / "two", files[:2]) == 0
        assert judge(server, tmp_path / "two", files) == 0
        assert len(server.log) == 2 * asked, "what the first two models had cost was paid for again"
    results = about(tmp_path / "out")["results"]
    assert [one["name"] for one in results["ranking"]] == ["strong", "base", "weak"]
    assert results["ranking"][1]["points"] == 0 and results["ranking"][0]["points"] > 200
    annotations = sorted(path.name for path in (tmp_path / "out").glob("annotations*.json"))
    assert annotations == [
        "annotations-1-weak-vs-base.json", "annotations-2-strong-vs-base.json", "annotations-2-strong-vs-weak.json",
    ]  # fmt: skip
    for name, pair in zip(annotations, results["pairs"], strict=True):
        assert read_annotations(tmp_path / "out" / name)[0] == pytest.approx(pair["win_rate"]["value"])
    assert about(tmp_path / "two")["results"] == results
    assert "1. strong: +" in capsys.readouterr().out


# ---- money ----------------------------------------------------------------------------------------------------------


def test_a_second_run_pays_nothing_and_says_the_same(files, whole, tmp_path):
    with Server(answer=judge_mostly_fairly, faults=FAULTS) as server:
        assert judge(server, tmp_path, files, "--timeout", 5) == 0
        outcomes, asked = server.stats()["outcomes"], len(server.log)
        assert preferences(tmp_path / "annotations.json") == preferences(whole / "annotations.json")
        first = {path.name: path.read_bytes() for path in tmp_path.glob("*n*.json") if path.name != "run.json"}
        assert judge(server, tmp_path, files, "--timeout", 5) == 0
        assert len(server.log) == asked
    assert len(set(FAULTS) & set(outcomes)) >= 5
    assert first and all((tmp_path / name).read_bytes() == data for name, data in first.items())
    assert run_for_exit_code(module.main, flags(server, tmp_path, files, "--replay")) == 0, "it needs no server"
    assert about(tmp_path)["results"] == about(whole)["results"]


RUN = "from data_gen.base.cli import run_command\nfrom data_gen.judge import main\nrun_command(main)"


def recorded(out):
    """Return the hashes of the prompts whose answers are in the ledger."""
    with sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        sql = "SELECT body_sha256 FROM received JOIN sent USING (attempt) WHERE kind IN ('answer', 'refused')"
        return [sha for (sha,) in db.execute(sql)]


def test_killed_again_and_again_it_pays_for_nothing_twice(files, whole, tmp_path):
    rng, known = random.Random(5), []
    asked = []

    def answer(key, body):
        asked.append(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest())
        return judge_mostly_fairly(key, body)

    with Server(answer=answer, latency_s=0.05) as server:
        while len(known) < 3:
            process = Started(RUN, *flags(server, tmp_path, files, "--concurrency", 4), env=environment())
            before = len(asked)
            while len(asked) < before + rng.randrange(4, 9) and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, "it was done before it could be killed"
            process.kill()
            process.communicate()
            time.sleep(0.15)  # the server notices
            known.append((len(asked), set(recorded(tmp_path))))
        assert judge(server, tmp_path, files) == 0
    assert known[-1][1], "nothing was recorded before the last kill"
    for arrived, keys in known:
        assert not keys & set(asked[arrived:]), "a request whose answer was recorded was sent again"
    assert len(recorded(tmp_path)) == len(set(recorded(tmp_path))) == 2 * (QUESTIONS + CANARIES)
    assert preferences(tmp_path / "annotations.json") == preferences(whole / "annotations.json")
    assert about(tmp_path)["cost"]["uncertain_usd"] > 0, "what was in flight at a kill may have been billed"


def test_the_cap_keeps_what_was_paid_for_and_a_larger_one_goes_on(files, whole, tmp_path, capsys):
    with Server(answer=judge_mostly_fairly) as server:
        more = ("--max-output-tokens", 200, "--concurrency", 4)
        assert judge(server, tmp_path, files, "--max-usd", "0.0015", *more) == 1
        assert "a larger --max-usd goes on" in capsys.readouterr().err
        told, billed = about(tmp_path), server.stats()["billed"]
        true_cost = (0.1 * billed["prompt_tokens"] + 0.4 * billed["completion_tokens"]) / 1e6
        assert told["status"] == "cap reached" and told["cost"]["spent_usd"] == pytest.approx(true_cost)
        assert 0.0005 < true_cost <= 0.0015 and told["counts"]["verdicts"] == len(server.log)
        found = preferences(tmp_path / "annotations.json")
        assert None in found and any(found), "what was paid for is in the results, the rest is null"
        assert told["results"]["pairs"][0]["win_rate"]["n"] == sum(one is not None for one in found)
        assert judge(server, tmp_path, files, "--max-usd", "0.0015", *more) == 1
        billed = server.stats()["billed"]
        assert 0.1 * billed["prompt_tokens"] + 0.4 * billed["completion_tokens"] <= 1500, (
            "the cap is one for all starts"
        )
        assert judge(server, tmp_path, files, "--max-usd", "1", *more) == 0
        assert len(server.log) == 2 * (QUESTIONS + CANARIES)
    assert preferences(tmp_path / "annotations.json") == preferences(whole / "annotations.json")


def test_a_signal_ends_it_with_its_own_code_and_the_same_command_goes_on(files, tmp_path, capsys):
    asked, numbers = [], itertools.count(1)

    def answer(key, body):
        asked.append(key)
        if next(numbers) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge_fairly(key, body)

    with Server(answer=answer) as server:
        assert judge(server, tmp_path, files, "--concurrency", 2) == 143
        assert "stopped by a signal with" in capsys.readouterr().err and about(tmp_path)["status"] == "stopped"
        assert judge(server, tmp_path, files, "--concurrency", 2) == 0
        assert len(asked) == 2 * (QUESTIONS + CANARIES), "what was in flight at the signal was asked twice"


def test_another_judge_is_refused_or_asked_anew(files, tmp_path, capsys):
    with Server(answer=judge_fairly) as server:
        assert judge(server, tmp_path, files, "--canaries", 0) == 0
        assert judge(server, tmp_path, files, "--canaries", 0, "--judge", "n") == 2
        assert "model was 'm', is 'n'" in capsys.readouterr().err and len(server.log) == 2 * QUESTIONS
        assert judge(server, tmp_path, files, "--canaries", 0, "--judge", "n", "--allow-changed") == 0
        assert len(server.log) == 4 * QUESTIONS and about(tmp_path)["judge"]["answered_as"] == {"n": 2 * QUESTIONS}
        assert judge(server, tmp_path, files, "--canaries", 0, "--allow-changed") == 0
        assert len(server.log) == 4 * QUESTIONS, "the first judge's verdicts were there"


# ---- odd answers ----------------------------------------------------------------------------------------------------


def test_answers_without_a_verdict_are_null_and_told(files, tmp_path):
    def odd(key, body):
        kind = int(key, 16) % 5
        fair = judge_fairly(key, body)
        fenced = f'<think>Perhaps "winner": "1" or "winner": "2".</think>\n```json\n{fair}\n```'
        return ["Both are fine.", fair + say("1") + say("2"), fair, fenced, fair.replace("{", "{ ")][kind]

    with Server(answer=odd) as server:
        assert judge(server, tmp_path, files) == 0
        asked = len(server.log)
        assert judge(server, tmp_path, files) == 0
        assert len(server.log) == asked, "an answer that was paid for was asked for again"
    told = about(tmp_path)
    lost = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert told["counts"]["rejected"] == {"no verdict": len(lost)} and 10 < len(lost) < asked / 2
    found = preferences(tmp_path / "annotations.json")
    assert found.count(None) == told["results"]["pairs"][0]["unknown"] > 0
    assert read_annotations(tmp_path / "annotations.json")[3] == QUESTIONS - found.count(None)


def test_a_judge_that_gives_no_verdict_is_left_soon(files, tmp_path, capsys):
    with Server(answer=lambda key, body: "I would rather talk about the weather.") as server:
        assert judge(server, tmp_path, files) == 1
        assert len(server.log) < 100
    assert "no verdict" in capsys.readouterr().err
    assert about(tmp_path)["results"]["pairs"][0]["win_rate"]["value"] is None


def test_prompts_that_the_server_refuses_end_no_run(files, tmp_path):
    """Each is refused for good, the last ones too, when no other request can show that the server is well."""
    with Server(answer=judge_fairly, faults={"content_policy_400": 0.1}) as server:
        assert judge(server, tmp_path, files) == 0
    assert about(tmp_path)["counts"]["rejected"]["refused by the server"] > 3


def test_equal_answers_are_a_draw_and_cost_nothing(tmp_path):
    first, second = write_answers(tmp_path, n=6)
    rows = json.loads(second.read_text())
    rows[2]["output"] = json.loads(first.read_text())[2]["output"] + "\n"
    second.write_text(json.dumps(rows))
    with Server(answer=judge_fairly) as server:
        assert judge(server, tmp_path / "out", [first, second], "--canaries", 0) == 0
        assert len(server.log) == 10
    row = json.loads((tmp_path / "out" / "annotations.json").read_text())[2]
    assert (row["preference"], row["price_per_example"], row["raw_completion"]) == (1.5, 0, [None, None])


# ---- what it is given -----------------------------------------------------------------------------------------------


def test_files_of_other_instructions_are_told_and_the_common_ones_can_be_judged(files, tmp_path, capsys):
    rows = json.loads(files[1].read_text())
    rows[3]["instruction"] = "Another one."
    (tmp_path / "other.json").write_text(json.dumps(rows))
    with Server(answer=judge_fairly) as server:
        words = [files[0], tmp_path / "other.json"]
        assert judge(server, tmp_path / "out", words) == 3
        said = capsys.readouterr().err
        assert "base.json lacks 1 of 25 instructions, such as 'Another one.'" in said
        assert "other.json lacks 1 of 25 instructions, such as 'Say it in 3 words.'" in said
        assert "--common compares the 23 that every file has" in said and not (tmp_path / "out").exists()
        assert judge(server, tmp_path / "out", words, "--common", "--canaries", 0) == 0
        assert len(server.log) == 2 * 23 and about(tmp_path / "out")["counts"]["questions_left_out"] == 2


def test_the_answers_of_davinci_load_as_they_are(tmp_path):
    """The file has instruction, input and response; AlpacaEval's has both in one instruction."""
    rows = [{"instruction": f"{ask} ", "input": given, "response": told} for _, ask, given, told in EVALUATION]
    davinci = tmp_path / "predictions.jsonl"
    davinci.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = [
        {"instruction": row["instruction"].strip() + f"\n\n{row['input']}" * bool(row["input"]), "output": "Mine."}
        for row in rows
    ]
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    questions = module.match_answers([module.read_answers(path) for path in (davinci, tmp_path / "mine.json")])
    assert len(questions.instructions) == len(rows)
    assert [outputs[0] for outputs in questions.outputs] == [row["response"] for row in rows]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", '[{"instruction": "x"}]', "a.json:1: got the keys ['instruction']; wanted AlpacaEval's"),
        (
            "a.jsonl",
            '{"instruction": "x", "output": "y"}\n{"instruction": 7, "output": "y"}',
            "a.jsonl:2: got the keys",
        ),
        ("a.json", "[]", "holds no answer"),
        ("a.json", "{", "is not JSON"),
        (
            "a.json",
            '[{"instruction": "x", "output": "", "generator": "p"}, {"prompt": "y", "output": "", "generator": "q"}]',
            "answers of p, q; wanted one model a file",
        ),
    ],
)
def test_bad_files_are_told_before_anything_is_done(files, tmp_path, capsys, name, content, said):
    (tmp_path / name).write_text(content)
    words = [str(files[0]), str(tmp_path / name), "--judge", "m", "--price-in", "0", "--price-out", "0"]
    assert run_for_exit_code(module.main, [*words, "--out", str(tmp_path / "out")]) == 3
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["A", "--judge", "m"], "wanted the answers of two models or more"),
        (["A", "B"], "--judge is missing"),
        (["A", "A", "--judge", "m", "--price-in", "0", "--price-out", "0"], "two files are called base"),
        (["A", "B", "--judge", "m"], "m has no known price"),
        (["A", "B", "--juge", "m"], "did you mean --judge?"),
        (["A", "B", "--judge", "m", "--canaries", "-1"], "at least 0"),
    ],
)
def test_bad_flags_are_told_before_anything_is_done(files, tmp_path, capsys, words, said):
    words = [str(files["AB".index(word)]) if word in ("A", "B") else word for word in words]
    try:
        code = run_for_exit_code(module.main, [*words, "--out", str(tmp_path / "out")])
    except SystemExit as left:
        code = left.code
    assert code == 2 and said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_votes_of_people_are_kept_apart(files, whole, tmp_path, capsys):
    decided = {
        row["instruction"]: row["preference"]
        for row in json.loads((whole / "annotations.json").read_text())
        if row["preference"] != 1.5
    }
    asked = list(decided)[:10]
    lines = [{"prompt": text, "models": ["model", "base"], "vote": "A", "at": 1} for text in asked]
    lines += [
        {"prompt": "Another.", "models": ["base", "model"], "vote": vote} for vote in ("tie", "both-bad", "A", "B")
    ]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger = tmp_path / "out" / "ledger.sqlite"
    ledger.parent.mkdir()
    ledger.write_bytes((whole / "ledger.sqlite").read_bytes())
    words = [*map(str, files), "--judge", "m", "--replay", "--canaries", str(CANARIES), "--out", str(ledger.parent)]
    words.append("--votes")
    assert run_for_exit_code(module.main, [*words, str(tmp_path / "votes.jsonl")]) == 0
    told = about(ledger.parent)
    assert told["results"] == about(whole)["results"], "votes of people count among the judge's"
    (one,) = told["humans"]
    assert (one["base"], one["other"], one["wins"], one["ties"], one["both_bad"], one["losses"]) == (
        "base", "model", 11, 1, 1, 1,
    )  # fmt: skip
    assert one["win_rate"]["value"] == pytest.approx(100 * 12 / 14) and one["compared"] == 10
    assert one["agreement"] == pytest.approx(10 * sum(decided[text] == 2 for text in asked))
    assert one["a_share"] == pytest.approx(100 * 11 / 12)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "models": ["a", "b"], "vote": "C"}\n')
    assert run_for_exit_code(module.main, [*words, str(tmp_path / "bad.jsonl")]) == 3
    assert "bad.jsonl:1: got prompt 'x', models ['a', 'b'], vote 'C'" in capsys.readouterr().err


def test_help_names_every_flag_with_its_default():
    said = command("data_gen.judge", "--help").stdout
    for action in module.build_parser()._actions:
        assert all(flag in said for flag in action.option_strings)


def test_results_that_cannot_be_written_hide_no_failure(files, tmp_path, capsys, monkeypatch):
    """What ended the run is told, with its own exit code."""
    ended = [("stopped", Stopped("stopped by a signal")), ("done", None)]

    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "ask_judge", lambda *given: ended.pop(0))
    monkeypatch.setattr(module, "write_results", fail)
    with Server() as server:
        assert judge(server, tmp_path, files) == Stopped.exit_code
        assert "stopped by a signal" in capsys.readouterr().err
        assert judge(server, tmp_path, files) == 1
        assert "the results could not be written: [Errno 28] No space left" in capsys.readouterr().err
