"""The blind comparison over a real socket: what is hidden and what is kept, who may use it, the figures of votes."""

import json
import re
import threading
import time
import urllib.request
from contextlib import nullcontext

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")

from data_gen.base.files import read_rows
from data_gen.judging.answers import match_answers, read_answers
from data_gen.judging.humans import read_votes, summarize_votes
from engine.base.errors import DataError, UsageError
from engine.comparing import endpoints
from engine.comparing.questions import Question, read_contestants
from engine.serving.guard import Access
from engine.serving.openai_api import ApiError
from tests.helpers.comparisons import FULL, Compared, Scripted, Told, read_events, read_round
from tests.helpers.judging import read_annotations

QUESTIONS = [Question(f"Question {n}", f"input {n}" if n % 3 == 0 else "") for n in range(12)]


@pytest.fixture
def votes(tmp_path):
    return tmp_path / "votes.jsonl"


@pytest.fixture
def compared(votes):
    with Compared(votes) as compared:
        yield compared


# ---- what is hidden -------------------------------------------------------------------------------------------------


def test_nothing_names_a_model_before_the_vote(votes):
    contestants = Scripted("guanaco", *[Told("one")] * 9), Scripted("vicuna", *[Told("two")] * 9)
    with Compared(votes, contestants, QUESTIONS) as compared:
        said = [compared.send("/compare")[1], json.dumps(compared.send("/compare/questions", {"voter": "v"})[1])]
        for _ in range(9):
            request = urllib.request.Request(
                f"{compared.url}/compare/ask", json.dumps({"voter": "v", "instruction": "Name a fruit."}).encode()
            )
            with urllib.request.urlopen(request) as response:
                said += [str(response.headers), response.read().decode()]
        assert not [text for text in said if "guanaco" in text.lower() or "vicuna" in text.lower()]


def test_the_order_is_drawn_anew_and_told_after_the_vote(compared):
    orders = set()
    for _ in range(40):
        id, a, b = compared.ask()
        status, told = compared.vote(id)
        assert status == 200
        assert [name[::-1] for name in told["models"]] == [a.split(" says")[0], b.split(" says")[0]]
        orders.add(tuple(told["models"]))
    assert orders == {("alpaca", "davinci"), ("davinci", "alpaca")}  # missed once in 2^39


def test_both_are_asked_the_same_with_the_same_settings(compared):
    compared.ask("Sort.", input="b a", temperature=0.25, top_p=0.5, max_tokens=9)
    (first,), (second,) = (one.heard for one in compared.contestants)
    assert first == second
    question, wanted = first
    assert question == Question("Sort.", "b a")
    assert (wanted.sampling.temperature, wanted.sampling.top_p, wanted.max_tokens) == (0.25, 0.5, 9)


def test_both_grow_by_as_many_characters(votes):
    long = [f"{n} " for n in range(200)]
    contestants = Scripted("alpaca", Told(*long)), Scripted("davinci", Told("".join(long[:100]), *long[100:]))
    with Compared(votes, contestants) as compared:
        _, text = compared.send("/compare/ask", {"voter": "v", "instruction": "Count."})
    steps = [event["texts"] for event in read_events(text) if "texts" in event]
    assert all(len(a) == len(b) for a, b in steps)
    assert read_round(text)[1:] == ("".join(long), "".join(long))
    assert read_events(text)[-1] == {"ended": ["stop", "stop"]} and text.endswith("data: [DONE]\n\n")


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_a_vote_is_kept_with_what_was_voted_on(compared, votes):
    id, a, b = compared.ask("Sort.", input="b a", temperature=0.25, top_p=0.5, max_tokens=9, seed=5)
    _, told = compared.vote(id, "B")
    (row,) = read_rows(votes)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row.pop("time"))
    assert row == {
        "prompt": "Sort.", "input": "b a", "models": told["models"], "vote": "B", "answers": [a, b], "stopped": False,
        "settings": {"temperature": 0.25, "top_p": 0.5, "max_tokens": 9, "seed": 5}, "voter": "v1", "round": id,
    }  # fmt: skip


def test_a_vote_counts_once_though_it_is_sent_again(votes):
    with Compared(votes) as compared:
        id, *_ = compared.ask()
        first = compared.vote(id, "A")
        assert compared.vote(id, "A") == first == (200, {"vote": "A", "models": first[1]["models"]})
        status, told = compared.vote(id, "B")
        assert status == 409 and "has a vote already, A; it stays" in told["error"]["message"]
        assert compared.vote(id, "A", voter="someone-else")[0] == 409
    with Compared(votes) as compared:  # after a restart too
        assert compared.vote(id, "A") == first
        assert compared.vote(id, "tie")[0] == 409
    assert len(read_rows(votes)) == 1


def test_votes_sent_at_once_count_once(compared, votes, monkeypatch):
    id, *_ = compared.ask()
    found, add = [], compared.votes.add
    # The others come while the first is being written.
    monkeypatch.setattr(compared.votes, "add", lambda row: time.sleep(0.3) or add(row))
    threads = [threading.Thread(target=lambda: found.append(compared.vote(id))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in found] == [200] * 8 and len(read_rows(votes)) == 1


def test_the_oldest_rounds_are_forgotten_first(compared, monkeypatch):
    monkeypatch.setattr(endpoints, "MOST_ROUNDS", 2)
    ids = [compared.ask()[0] for _ in range(4)]
    assert [compared.vote(id)[0] for id in ids] == [404, 404, 200, 200]


def test_a_vote_that_cannot_be_written_is_not_acknowledged(compared, votes, monkeypatch):
    id, *_ = compared.ask()

    def refuse(row):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compared.votes, "add", refuse)
        status, told = compared.vote(id)
    assert status == 500 and "could not be kept: No space left" in told["error"]["message"]
    assert compared.vote(id)[0] == 200 and len(read_rows(votes)) == 1


def test_a_stopped_round_keeps_what_was_seen(votes):
    answers = Told("half", hangs=True), Told("ha", "lf of it", hangs=True)
    with Compared(votes, (Scripted("alpaca", answers[0]), Scripted("davinci", answers[1]))) as compared:
        body = json.dumps({"voter": "v1", "instruction": "Go."}).encode()
        response = urllib.request.urlopen(urllib.request.Request(f"{compared.url}/compare/ask", body))
        seen = b""
        while b"lf" not in seen:
            seen += response.readline()
        response.close()
        assert answers[0].closed.wait(60) and answers[1].closed.wait(60)
        status, _ = compared.vote(read_events(seen.decode())[0]["round"], "tie")
    (row,) = read_rows(votes)
    assert status == 200 and row["stopped"] is True and row["answers"] == ["half", "half"]


def test_a_vote_ends_a_round_that_is_still_being_written(votes):
    answers = Told("half", hangs=True), Told("half", hangs=True)
    with Compared(votes, (Scripted("alpaca", answers[0]), Scripted("davinci", answers[1]))) as compared:
        body = json.dumps({"voter": "v1", "instruction": "Go."}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{compared.url}/compare/ask", body)) as response:
            seen = b""
            while b"half" not in seen:
                seen += response.readline()
            assert compared.vote(read_events(seen.decode())[0]["round"])[0] == 200
            assert answers[0].closed.wait(60) and answers[1].closed.wait(60)
    assert read_rows(votes)[0]["stopped"] is True


@pytest.mark.parametrize("order", [0, 1])
def test_a_failing_or_full_model_ends_the_round(order, votes, monkeypatch):
    monkeypatch.setattr(endpoints.secrets, "randbelow", lambda n: order)
    other = Told("fine", hangs=True), Told("fine", hangs=True)
    contestants = (
        Scripted("alpaca", *other),
        Scripted("davinci", Told("x", error=KeyError("alpaca")), Told(refusal=FULL)),
    )
    with Compared(votes, contestants) as compared:
        _, text = compared.send("/compare/ask", {"voter": "v1", "instruction": "Go."})
        events = read_events(text)
        assert events[-1]["error"]["message"] == "the model failed: KeyError" and "[DONE]" not in text
        assert other[0].closed.wait(60)
        assert compared.vote(events[0]["round"])[0] == 404
        status, told = compared.send("/compare/ask", {"voter": "v1", "instruction": "Go."})
        assert status == 503 and told["error"]["code"] == "queue_full"
        assert other[1].closed.is_set() or not contestants[0].heard[1:]  # whoever was first to begin


# ---- questions ------------------------------------------------------------------------------------------------------


def listed(compared, voter="v1", **more):
    status, found = compared.send("/compare/questions", {"voter": voter, **more})
    assert status == 200, found
    return found["questions"]


def test_each_voter_has_an_order_of_their_own_that_stays(votes):
    with Compared(votes, questions=QUESTIONS) as compared:
        orders = [[one["instruction"] for one in listed(compared, voter)] for voter in ("v1", "v2", "v1")]
        assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])
        assert sorted(orders[0]) == sorted(q.instruction for q in QUESTIONS)
        for one in listed(compared)[:5]:
            id, *_ = compared.ask(one["instruction"], input=one["input"])
            compared.vote(id)
    with Compared(votes, questions=QUESTIONS) as compared:  # a restart forgets nothing
        assert [one["is_done"] for one in listed(compared)] == [True] * 5 + [False] * 7
        assert not any(one["is_done"] for one in listed(compared, "v2"))
    with Compared(votes, (Scripted("alpaca"), Scripted("another")), QUESTIONS) as compared:
        assert not any(one["is_done"] for one in listed(compared))  # the votes are on another pair


def test_a_question_that_comes_twice_wants_two_votes(votes):
    with Compared(votes, questions=[Question("Same"), Question("Same")]) as compared:
        compared.vote(compared.ask("Same")[0])
        assert sorted(one["is_done"] for one in listed(compared)) == [False, True]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("p.txt", "One?\n\n Two?\n", {("One?", ""), (" Two?", "")}),
        ("p.json", '[{"instruction": "One", "output": "x", "generator": "davinci", "dataset": "d"}]', {("One", "")}),
        ("p.jsonl", '{"instruction": "One", "input": "in"}\n{"instruction": "Two"}\n', {("One", "in"), ("Two", "")}),
        (
            "u.jsonl",
            '{"id": "u0", "instruction": "One", "instances": [{"input": "in", "output": "o"}]}',
            {("One", "in")},
        ),
        ("c.csv", "instruction,input\nOne,in\n", {("One", "in")}),
        ("i.csv", "instruction,input\n,in\n", {("in", "")}),
        ("m.jsonl", '{"messages": [{"role": "user", "content": "One"}]}', {("One", "")}),
        ("../..\x00/" + "x" * 300, "One?", {("One?", "")}),
    ],
)
def test_a_list_can_be_a_file_of_the_voters(compared, name, text, found):
    assert {(one["instruction"], one["input"]) for one in listed(compared, name=name, text=text)} == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("  \n", "mine.txt: holds no prompt"),
        ("", "mine.txt"),
        ('[{"output": "x"}]', "mine.txt:1"),
        (
            '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}',
            "a chat of 2 messages",
        ),
    ],
)
def test_a_file_without_questions_is_told_by_its_name(compared, text, told):
    status, found = compared.send("/compare/questions", {"voter": "v", "name": "mine.txt", "text": text})
    assert status == 400 and told in found["error"]["message"] and "/tmp" not in found["error"]["message"]


# ---- requests that are refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("ask", {"instruction": "Go."}, "voter: wanted"),
        ("ask", {"voter": "../x", "instruction": "Go."}, "voter: wanted"),
        ("ask", {"voter": "v", "instruction": " "}, "instruction: wanted"),
        ("ask", {"voter": "v", "instruction": "Go.", "input": 3}, "instruction: wanted"),
        ("ask", {"voter": "v", "instruction": "Go.", "temperature": 9}, "temperature is 9, wanted a number"),
        ("ask", {"voter": "v", "instruction": "Go.", "model": "alpaca"}, "unknown parameter 'model'"),
        ("vote", {"voter": "v", "round": "x", "vote": "A"}, "there is no such round"),
        ("vote", {"voter": "v", "round": ["x"], "vote": "A"}, "there is no such round"),
        ("vote", {"voter": "v", "round": "x", "vote": "C"}, "vote: wanted one of A, B, tie, both-bad"),
        ("questions", {"voter": "v", "text": 3}, "wanted a file's name and what it holds"),
        ("questions", [], "the body is a list"),
        ("vote", b"{", "the body is not JSON"),
    ],
)
def test_bad_requests_are_told(compared, path, body, told):
    status, found = compared.send(f"/compare/{path}", body)
    assert status in (400, 404) and told in found["error"]["message"]


def test_one_voter_cannot_vote_on_anothers_round(compared):
    id, *_ = compared.ask(voter="v1")
    assert compared.vote(id, voter="v2")[0] == 404


def test_the_endpoints_are_guarded_as_all_others(votes):
    with Compared(votes, access=Access(api_key="k3y", max_body_bytes=2000)) as compared:
        assert compared.send("/compare")[0] == 200  # the page asks for the key
        for path in ("questions", "ask", "vote"):
            assert compared.send(f"/compare/{path}", {"voter": "v"})[0] == 401
        assert compared.send("/compare/results")[0] == compared.send("/compare/annotations")[0] == 401
        key = {"Authorization": "Bearer k3y"}
        assert compared.send("/compare/results", headers=key)[0] == 200
        large = {"voter": "v", "text": "x" * 3000}
        assert compared.send("/compare/questions", large, key)[0] == 413
        for foreign in ({"Origin": "http://elsewhere.example"}, {"Host": "elsewhere.example"}):
            assert compared.send("/compare/results", headers=key | foreign)[0] == 403
    assert read_rows(votes) == []


def test_a_server_without_a_model_leads_to_the_comparison(compared):
    status, page = compared.send("/")
    assert status == 200 and "Which answer is better?" in page
    status, told = compared.send("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
    assert status == 404 and "has answers to compare and no model" in told["error"]["message"]
    assert compared.send("/v1/models") == (200, {"object": "list", "data": []})
    assert compared.send("/health")[0] == 200 and "cria_answers_running 0" in compared.send("/metrics")[1]


# ---- results --------------------------------------------------------------------------------------------------------


def cast(compared, n=30):
    """Vote n times as one who likes davinci."""
    for i in range(n):
        id, a, _ = compared.ask(f"Question {i}", voter=f"v{i % 3}")
        better = "A" if a.startswith("icnivad") else "B"
        vote = (
            "tie"
            if i % 7 == 0
            else "both-bad"
            if i % 11 == 0
            else {"A": "B", "B": "A"}[better]
            if i % 4 == 0
            else better
        )
        assert compared.vote(id, vote, voter=f"v{i % 3}")[0] == 200


def test_the_figures_are_those_of_the_judge(compared, votes, tmp_path):
    assert compared.send("/compare/results")[1]["figures"] is None
    cast(compared)
    found = compared.send("/compare/results")[1]
    assert found["models"] == ["alpaca", "davinci"] and (found["votes"], found["voters"]) == (30, 3)
    for name in ("alpaca", "davinci"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"instruction": "x", "output": "y", "generator": name}]))
    questions = match_answers([read_answers(tmp_path / f"{name}.json") for name in ("alpaca", "davinci")])
    (judged,) = summarize_votes(read_votes(votes), questions, [])
    figures = found["figures"]
    assert figures["win_rate"]["value"] == judged.win_rate.value and figures["win_rate"]["value"] > 60
    assert tuple(figures["win_rate"]["interval"]) == judged.win_rate.interval
    assert [figures[key] for key in ("wins", "ties", "both_bad", "losses", "a_share")] == [
        judged.wins, judged.ties, judged.both_bad, judged.losses, judged.a_share,
    ]  # fmt: skip


def test_the_annotations_are_alpaca_evals(compared, tmp_path):
    cast(compared)
    _, rows = compared.send("/compare/annotations")
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    win_rate, _, _, n = read_annotations(tmp_path / "annotations.json")
    figures = compared.send("/compare/results")[1]["figures"]
    assert n == 30 and win_rate == pytest.approx(figures["win_rate"]["value"])
    for row in rows:
        assert (row["generator_1"], row["generator_2"]) == ("alpaca", "davinci")
        assert row["output_1"] == f"acapla says: {row['instruction']}"
        assert row["output_2"] == f"icnivad says: {row['instruction']}"


def test_a_voter_is_named_by_letters_digits_and_dashes():
    assert [endpoints.read_voter({"voter": voter}) for voter in ("v", "A-1", "x" * 64)] == ["v", "A-1", "x" * 64]
    for voter in (None, 5, ["v"], "", "x" * 65, "a b", "v\n", "\nv", "v<b>", "\u00e9", "v\u00e9"):
        with pytest.raises(ApiError, match="voter: wanted 1 to 64 letters"):
            endpoints.read_voter({"voter": voter})


def test_votes_without_answers_and_on_others_are_left_out_and_counted(votes):
    kinds = [None, [], ["a"], ["a", "b", "c"], ["a", None], ["a", 1], "ab", {"a": "b"}]  # no two texts
    ours = {"prompt": "p", "models": ["davinci", "alpaca"], "vote": "A"}
    lines = [
        ours,
        *(ours | {"answers": answers} for answers in kinds),
        ours | {"models": ["davinci", "another"], "voter": "w"},
    ]
    votes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Compared(votes) as compared:
        found = compared.send("/compare/results")[1]
        counts = found["votes"], found["without_answers"], found["figures"]["wins"], found["voters"]
        assert counts == (9, 9, 9, 1)
        assert compared.send("/compare/annotations")[1] == []


# ---- files of answers -----------------------------------------------------------------------------------------------


def test_two_files_of_answers_are_compared_without_a_model(tmp_path, votes):
    for name in ("davinci", "alpaca"):
        rows = [
            {"instruction": f"Q{n}", "input": f"i{n}", "output": f"{name} {n}", "generator": name} for n in range(5)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    contestants, questions = read_contestants([str(tmp_path / "davinci.json"), str(tmp_path / "alpaca.json")])
    with Compared(votes, contestants, questions, has_fixed_questions=True) as compared:
        found = listed(compared)
        assert {one["instruction"] for one in found} == {f"Q{n}\n\ni{n}" for n in range(5)}
        for one in found:
            _, text = compared.send("/compare/ask", {"voter": "v1", "number": one["number"]})
            id, a, b = read_round(text)
            assert {a, b} == {f"davinci {one['number']}", f"alpaca {one['number']}"}
            assert compared.vote(id)[1]["models"] == [a.split()[0], b.split()[0]]
        assert all(one["is_done"] for one in listed(compared))
        for number in (5, -1, "0", None, True):
            assert compared.send("/compare/ask", {"voter": "v1", "number": number})[0] == 400
        assert compared.send("/compare/questions", {"voter": "v1", "text": "Mine?"})[0] == 400
        assert compared.send("/compare/results")[1]["models"] == ["davinci", "alpaca"]


@pytest.mark.parametrize(
    "names, error", [(("x/a", "y/a"), UsageError), (("a", "b"), None), (("a", "none"), DataError)], ids=str
)
def test_files_that_cannot_be_compared_end_the_command_as_its_own_errors_do(tmp_path, names, error):
    """Two of one name by exit code 2, one that cannot be read by 3, as errors of the engine."""
    for name in ("a", "b", "x/a", "y/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text('[{"instruction": "Q", "output": "A"}]')
    with pytest.raises(error) if error else nullcontext():
        read_contestants([str(tmp_path / f"{name}.json") for name in names])


def test_a_refusal_of_the_first_model_is_told_too(votes):
    bad = ApiError(400, "the prompt has 3000 tokens (context_length_exceeded)")
    with Compared(votes, (Scripted("a", Told(refusal=bad)), Scripted("b", Told(refusal=bad)))) as compared:
        assert compared.send("/compare/ask", {"voter": "v", "instruction": "Go."})[0] == 400
