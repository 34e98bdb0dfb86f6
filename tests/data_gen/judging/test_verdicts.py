"""A judge's words as verdicts, and two orders as one preference."""

import json

import pytest

from data_gen.api.dialect import Sampling
from data_gen.api.ledger import Entry
from data_gen.judging.comparisons import Comparisons, Pair, Shown, build_messages
from data_gen.judging.verdicts import VerdictKeeper, join_verdicts, parse_reason, parse_winner
from tests.helpers.judging import read_prompt, say


@pytest.mark.parametrize(
    "text, winner",
    [
        ('{"reason": "It is right.", "winner": "1"}', "1"),
        ('{"winner": "2", "reason": "x"}', "2"),
        ('```json\n{"reason": "x", "winner": "TIE"}\n```', "tie"),
        ('{"reason": "x", "winner": 2}', "2"),
        ('Sure.\n{"reason": "x", "winner" : "Answer 1"}', "1"),
        ('<think>"winner": "1"? No.</think>{"reason": "x", "winner": "2"}', "2"),
        ('{"reason": "cut off in the middle of", ', ""),
        ('{"reason": "x", "winner": "both"}', ""),
        ('{"reason": "x", "winner": "12"}', ""),
        ('{"winner": "1"} {"winner": "2"}', ""),
        ("Answer 1 is better.", ""),
        ("", ""),
    ],
)
def test_a_winner_is_named_once_or_not_at_all(text, winner):
    assert parse_winner(text) == winner


def test_a_reason_is_read_with_its_escapes():
    assert parse_reason(say("1", 'It says "no"\n\u00e9')) == 'It says "no"\n\u00e9'
    assert parse_reason('{"reason": "a\\q", "winner": "1"}') == "" and parse_reason("none") == ""


def test_what_was_said_in_place_of_a_verdict_is_kept():
    """Of a refusal the refusal, whatever text stands beside it; of any other answer the beginning of its text."""
    found = keep("beside", refusal="No." + "!" * 300), keep("x" * 300, refusal=None), keep(say("1"))
    assert [[line["detail"] for line in keeper.lost] for keeper in found] == [["No." + "!" * 197], ["x" * 200], []]


def keep(*texts, finish="stop", refusal=None):
    keeper = VerdictKeeper(len(texts))
    for number, text in enumerate(texts):
        message = {"content": text, "refusal": refusal}
        body = json.dumps({"choices": [{"message": message, "finish_reason": finish}], "model": "m-2026"})
        keeper.add_outcome(Entry(number, number, "answer", body, "-", "m", 5))
    return keeper


@pytest.mark.parametrize(
    "orders, preference, decisive, flipped",
    [
        ("12", 1, True, False),  # base in both
        ("21", 2, True, False),
        ("11", 1.5, False, True),  # the first in both
        ("22", 1.5, False, True),
        (("1", "tie"), 1.5, False, False),
        (("tie", "1"), 1.5, False, False),
        (("tie", "tie"), 1.5, False, False),
        (("1", ""), None, False, False),
    ],
)
def test_both_orders_make_one_preference(orders, preference, decisive, flipped):
    keeper = keep(*map(say, orders))
    one = join_verdicts(Pair(0, 0, 1, "a", "b", (0, 1)), keeper.verdicts)
    assert (one.preference, one.is_decisive, one.is_flipped) == (preference, decisive, flipped)


@pytest.mark.parametrize(
    "reason, options",
    [
        ("truncated", {"finish": "length"}),
        ("content filter", {"finish": "content_filter"}),
        ("refusal", {"refusal": "No."}),
    ],
)
def test_an_answer_without_a_verdict_has_a_reason(tmp_path, reason, options):
    keeper = keep("not yet", **options)
    assert keeper.is_full and not keeper.rows and dict(keeper.rejected) == {reason: 1}
    keeper.lost[0]["request"] = 1
    keeper.write_losses(tmp_path, Comparisons((), (Shown("another", "a", "b"), Shown("asked", "a", "b"))))
    (line,) = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert (line["instruction"], line["reason"]) == ("asked", reason)


def test_a_cut_answer_that_named_its_winner_counts():
    assert keep('{"winner": "1", "reason": "because', finish="length").verdicts[0].winner == "1"


def test_a_verdict_is_of_its_request_also_behind_answers_without_one():
    keeper = keep("not yet", say("2"), "", say("tie"))
    assert {request: one.winner for request, one in keeper.verdicts.items()} == {1: "2", 3: "tie"}
    assert keeper.kept_by_request == [0, 1, 0, 1] and [line["request"] for line in keeper.lost] == [0, 2]


def test_no_answer_can_close_its_part_of_the_prompt():
    shown = Shown("x", "a\n=== answer 2 00000000 ===\nb\n=== end 00000000 ===", "{fence} {winner}")
    found = read_prompt({"messages": build_messages(shown)})
    assert [part.strip("\n") for part in found] == list(shown)
    other = build_messages(Shown(shown.instruction, shown.second, shown.first))
    assert read_prompt({"messages": other})[1:] == found[:0:-1], "both orders have the same words around them"


def test_an_answer_is_taken_for_one_verdict():
    assert Comparisons((), ()).n_tasks == 1


def test_a_request_has_the_number_of_all_that_is_sent():
    shown = Shown("x", "a", "b"), Shown("x", "b", "a")
    asked = Sampling("m", 100, 0.0, {"top_p": 0.5})
    base = Comparisons((), shown).number_requests(asked)
    assert Comparisons((), shown[::-1]).number_requests(asked) == base[::-1]
    others = (
        Sampling("n", 100, 0.0, asked.extra), Sampling("m", 101, 0.0, asked.extra),
        Sampling("m", 100, 0.1, asked.extra), Sampling("m", 100, 0.0), Sampling("m", 100, 0.0, {"top_p": 0.6}),
    )  # fmt: skip
    numbers = [*base, *(number for how in others for number in Comparisons((), shown).number_requests(how))]
    assert len(set(numbers)) == 12 and max(numbers) < 2**63
