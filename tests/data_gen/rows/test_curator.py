"""From answers to a dataset: every loss has a reason, rows have their provenance, files are whole."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen.api.ledger import Entry
from data_gen.rows import defects, parse
from data_gen.rows.curator import REASONS, Curator, row_to_messages

SEEDS = [{"instruction": "Name three uses for an old glass jar.", "input": "", "output": "A vase."}]
GOOD = {"instruction": "Explain why the tide comes in twice a day.", "input": "", "output": "The moon pulls the sea."}
OTHER = {"instruction": "Sort these towns by height.", "input": "Davos 1560 m, Basel 244 m", "output": "Basel, Davos"}


def entry(number, tasks, kind="answer", cost=10**9, finish="stop", **message):
    """Return the outcome of a request. tasks is a list, or the text of the answer."""
    text = tasks if isinstance(tasks, str) else json.dumps({"tasks": tasks})
    choice = {"message": {"content": text} | message, "finish_reason": finish}
    body = {"id": f"chatcmpl-{number}", "model": "m-2025", "choices": [choice]}
    return Entry(number, number + 1, kind, json.dumps(body), f"hash-{number}", "m", cost)


def curated(*entries, wanted=100, **options):
    curator = Curator(wanted, SEEDS, **options)
    for each in entries:
        curator.add_outcome(each)
    return curator


def reasons(curator):
    assert sum(curator.rejected.values()) == len(curator.lost)
    return [line["reason"] for line in curator.lost]


def test_what_is_kept_says_where_it_comes_from_and_what_it_cost():
    curator = curated(entry(0, [GOOD, OTHER], cost=3 * 10**9))
    assert [row["provenance"] for row in curator.rows] == [
        {
            "request": 0, "item": item, "model": "m-2025", "prompt_sha256": "hash-0",
            "response_id": "chatcmpl-0", "usd": 0.0015,
        }
        for item in (0, 1)
    ]  # fmt: skip
    assert curator.models == {"m-2025": 1} and not curator.lost


def test_the_dollars_of_an_answers_rows_add_up_to_its_bill_whatever_was_kept_before():
    more = [GOOD | {"instruction": f"Write a {thing} about {theme}."} for thing, theme in zip(
        ("poem", "letter", "recipe"), ("moss and stones", "a lost key", "old apples"), strict=True)]  # fmt: skip
    answers = [[GOOD], [OTHER, more[0], more[1]], [GOOD], [more[2], GOOD]]
    curator = curated(*(entry(n, tasks, cost=(n + 1) * 10**9) for n, tasks in enumerate(answers)))
    paid = dict.fromkeys(range(4), 0.0)
    for row in curator.rows:
        paid[row["provenance"]["request"]] += row["provenance"]["usd"]
    assert curator.kept_by_request == [1, 3, 0, 1] and paid == pytest.approx({0: 0.001, 1: 0.002, 2: 0, 3: 0.004})


def test_rows_are_of_the_language_that_was_asked_for():
    foreign = {"instruction": "Erkläre, warum die Flut zweimal am Tag kommt und was der Mond damit zu tun hat.",
               "input": "", "output": "Der Mond zieht das Wasser an."}  # fmt: skip
    for language, kept, lost in (("en", GOOD, foreign), ("de", foreign, GOOD)):
        curator = curated(entry(0, [GOOD, foreign]), language=language)
        assert [row["instruction"] for row in curator.rows] == [kept["instruction"]]
        assert [(line["reason"], line["instruction"]) for line in curator.lost] == [
            ("wrong language", lost["instruction"])
        ]


def test_a_duplicate_names_its_twin_and_how_alike_they_are():
    like = GOOD | {"instruction": "Explain why the tide comes in twice each day."}
    curator = curated(entry(0, [GOOD]), entry(1, [like, OTHER]))
    assert [row["instruction"] for row in curator.rows] == [GOOD["instruction"], OTHER["instruction"]]
    (line,) = curator.lost
    assert line["reason"] == "duplicate" and line["duplicate_of"] == GOOD["instruction"]
    assert line["similarity"] == round(2 * 8 / 18, 4) and (line["request"], line["item"]) == (1, 0)


def test_a_copy_of_a_seed_task_is_told_from_others():
    curator = curated(entry(0, [GOOD | {"instruction": "Name three uses for an old jar."}, GOOD, GOOD]))
    assert reasons(curator) == ["duplicate of a seed task", "duplicate"]
    assert curator.lost[0]["duplicate_of"] == SEEDS[0]["instruction"]


def test_every_seed_task_counts_as_one_also_where_seeds_are_alike():
    alike = SEEDS[0] | {"instruction": "Name three uses for an old jar."}
    curator = Curator(100, [*SEEDS, alike])
    curator.add_outcome(entry(0, [GOOD, GOOD, OTHER, OTHER, *SEEDS]))
    assert reasons(curator) == ["duplicate", "duplicate", "duplicate of a seed task"]


@pytest.mark.parametrize(
    "outcome, items",
    [
        (entry(0, [GOOD, GOOD | {"output": ""}, OTHER]), 3),
        (entry(0, json.dumps({"tasks": [GOOD, OTHER]})[:-60], finish="length"), 2),
        (entry(0, "I am sorry, but I can not do that."), 0),
        (entry(0, "", refusal="I will not."), 0),
        (entry(0, "policy", kind="refused"), 0),
    ],
)
def test_tasks_are_counted_whole_or_broken_and_an_answer_without_any_is_none(outcome, items):
    assert curated(outcome).summarize()["items"] == items


@pytest.mark.parametrize(
    "outcome, expected",
    [
        (entry(0, [GOOD | {"output": ""}]), ["empty output"]),
        (entry(0, "I am sorry, but I can not do that."), ["no items"]),
        (entry(0, "", refusal="I will not."), ["refusal"]),
        (entry(0, "", finish="content_filter"), ["content filter"]),
        (entry(0, json.dumps({"tasks": [GOOD, OTHER]})[:-60], finish="length"), ["truncated"]),
        (entry(0, json.dumps({"tasks": [GOOD, OTHER]}).replace('", "input"', '" "input', 1)), ["malformed"]),
        (entry(0, [{"instruction": "Say something nice about rain."}, OTHER]), ["missing field"]),
        (entry(0, "policy", kind="refused"), ["refused by the server"]),
    ],
)
def test_every_way_of_losing_a_task_is_told(outcome, expected):
    curator = curated(outcome)
    assert reasons(curator) == expected
    known = REASONS | defects.REASONS | parse.KINDS
    assert set(expected) <= set(known), "a reason that nothing explains"
    assert curator.kept_by_request == [len(curator.rows)]
    counts = curator.summarize()
    assert counts["requests"] == 1 and counts["kept"] + sum(counts["rejected"].values()) >= counts["items"]


def test_an_answer_cut_off_keeps_its_whole_tasks():
    text = json.dumps({"tasks": [GOOD, OTHER, GOOD | {"instruction": "Write a poem about moss."}]})
    curator = curated(entry(0, text[: text.index("moss")], finish="length"))
    assert len(curator.rows) == 2 and reasons(curator) == ["truncated"]


def test_repairs_are_counted_and_kept():
    curator = curated(entry(0, [GOOD | {"input": "<noinput>"}]))
    assert curator.rows[0]["input"] == "" and sum(curator.repaired.values()) == 1
    rejected = curated(entry(0, [GOOD | {"input": "<noinput>", "output": " "}, GOOD | {"input": " a\r\nb "}]))
    assert reasons(rejected) == ["empty output"]
    assert rejected.summarize()["repaired"] == {"blanks": 2, "no-input marker": 1, "line ends": 1}


def test_evaluation_prompts_are_dropped_with_the_prompt_that_they_match():
    decontaminator = SimpleNamespace(find_match=lambda item: "the prompt" if "tide" in item["instruction"] else None)
    curator = curated(entry(0, [GOOD, OTHER]), decontaminator=decontaminator)
    assert [row["instruction"] for row in curator.rows] == [OTHER["instruction"]]
    assert curator.lost[0]["reason"] == "evaluation prompt" and curator.lost[0]["detail"] == "the prompt"


def test_what_is_lost_hides_no_later_twin():
    """A row that a filter drops is not in the index, so that its good twin is kept."""
    curator = curated(entry(0, [GOOD | {"output": "N/A"}, GOOD]))
    assert [row["output"] for row in curator.rows] == [GOOD["output"]]


def test_what_decontamination_drops_hides_no_later_twin():
    """Nor is a row that gives an evaluation prompt away in the index of duplicates."""
    leaked = GOOD | {"output": "the prompt"}
    decontaminator = SimpleNamespace(find_match=lambda item: "the prompt" if item["output"] == "the prompt" else None)
    curator = curated(entry(0, [leaked]), entry(1, [GOOD, leaked, GOOD]), decontaminator=decontaminator)
    assert [row["output"] for row in curator.rows] == [GOOD["output"]]
    assert reasons(curator) == ["evaluation prompt", "evaluation prompt", "duplicate"]


def test_an_answer_of_reasoning_alone_has_a_reason_of_its_own():
    curator = curated(entry(0, "", finish="length", reasoning_content="Let me think."), entry(1, [GOOD]))
    assert reasons(curator) == ["reasoning alone"] and len(curator.rows) == 1 and curator.items == 1
    assert curator.kept_by_request == [0, 1] and curator.summarize()["answers"] == 2


def test_requests_without_an_outcome_are_left_out():
    curator = curated(entry(0, [GOOD]), entry(7, [OTHER]))
    assert [row["provenance"]["request"] for row in curator.rows] == [0, 7] and curator.last_request == 7


def test_it_stops_at_as_many_rows_as_wanted():
    curator = curated(entry(0, [GOOD, OTHER]), entry(1, [OTHER]), wanted=1)
    assert len(curator.rows) == 1 and curator.is_full and not curator.lost
    assert curator.rows[0]["provenance"]["usd"] == 0.001, "the price of an answer is that of its kept rows"


def test_what_comes_after_the_last_row_is_not_told(tmp_path):
    """The number of requests in flight at the end depends on the time. The files must not."""
    more = [entry(1, "no"), entry(2, [OTHER, GOOD]), entry(3, "policy", kind="refused")]
    one, other = curated(entry(0, [GOOD]), wanted=1), curated(entry(0, [GOOD]), *more, wanted=1)
    assert one.summarize() == other.summarize() and one.lost == other.lost and one.models == other.models


def test_files_say_the_same_in_every_format(tmp_path):
    hostile = {"instruction": "Translate \u2028 this \ud800 line.", "input": 'a "b"\nc', "output": "</script> 日本語"}
    curator = curated(entry(0, [GOOD, OTHER]))
    curator.rows.append(hostile | {"provenance": {"request": 0}})
    curator.write_files(tmp_path)
    rows = json.loads((tmp_path / "dataset.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "dataset.jsonl").read_text().split("\n")[:-1]]
    chats = [json.loads(line)["messages"] for line in (tmp_path / "chat.jsonl").read_text().split("\n")[:-1]]
    assert len(rows) == len(lines) == len(chats) == 3
    assert [{k: v for k, v in line.items() if k != "provenance"} for line in lines] == rows
    assert chats == [row_to_messages(row) for row in rows]
    assert chats[1][0]["content"] == "Sort these towns by height.\n\nDavos 1560 m, Basel 244 m"
    assert [turn["role"] for turn in chats[0]] == ["user", "assistant"]
    assert not list(tmp_path.glob(".*")), "a temporary file is left"


def test_an_empty_dataset_is_an_empty_list(tmp_path):
    Curator(5).write_files(tmp_path)
    assert json.loads((tmp_path / "dataset.json").read_text()) == [] and (tmp_path / "dataset.jsonl").read_text() == ""
