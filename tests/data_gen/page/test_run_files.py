"""What is counted of rejected rows, and which of them are kept as examples."""

import pytest

from data_gen.page.run_files import EXAMPLES, Rejected, RunRecord, parse_rows, read_rejected, read_run


def test_examples_are_drawn_from_all_lines_of_their_reason():
    """Each as likely as any other: examples of the last lines alone would show the end of a run, not the run."""
    rejected = Rejected()
    for place in range(100):
        for reason in range(40):
            rejected.add({"reason": f"r{reason}", "request": place})
    assert {len(found) for found in rejected.examples.values()} == {EXAMPLES}
    places = [line["request"] for found in rejected.examples.values() for line in found]
    assert sum(places) / len(places) == pytest.approx(49.5, abs=10)  # of 120 draws: 4 standard deviations
    assert min(places) < 10 and max(places) >= 90


def test_duplicates_of_an_instruction_are_all_counted_and_the_first_are_kept():
    rejected = Rejected()
    for place in range(EXAMPLES + 2):
        rejected.add({"reason": "duplicate", "request": 7, "duplicate_of": "Name a colour.", "instruction": f"{place}"})
    rejected.add({"reason": "url", "request": 7})
    group = rejected.duplicate_groups["Name a colour."]
    assert group.n == EXAMPLES + 2 and group.examples == [("", f"{place}") for place in range(EXAMPLES)]
    assert rejected.duplicates == {7: EXAMPLES + 2} and rejected.requests == {7: EXAMPLES + 3}


@pytest.mark.parametrize(
    ("text", "record"),
    [
        (
            '{"cost": {"spent_usd": 1}, "status": "done", "seconds": 3}',
            RunRecord("done", None, 3, cost={"spent_usd": 1}),
        ),
        ('{"counts": {}, "models": [1], "settings": {"a": 1}}', RunRecord(settings={"a": 1})),
        ('{"settings": {"a": 1}, "status": "done"}', RunRecord()),  # of a run of another kind
        ("[]", RunRecord(fault="run.json is damaged and left out: it holds no JSON object")),
    ],
)
def test_a_record_is_read_as_far_as_it_is_one(text, record, tmp_path):
    (tmp_path / "run.json").write_text(text)
    assert read_run(tmp_path / "run.json") == record
    assert read_run(tmp_path / "none.json") == RunRecord()


def test_lines_that_are_no_rejections_are_counted_and_blank_ones_are_not(tmp_path):
    (tmp_path / "rejected.jsonl").write_text('{"reason": "url", "request": 3}\n\n  \n[1]\nno\n{"reason": null}\n')
    rejected = read_rejected(tmp_path / "rejected.jsonl")
    assert (rejected.unreadable, dict(rejected.counts)) == (2, {"url": 1, "no reason given": 1})
    assert dict(rejected.requests) == {3: 1} and not rejected.duplicates and read_rejected(tmp_path / "none") is None


def test_rows_are_read_with_their_provenance_where_it_is_one():
    source = {"request": 0, "usd": 0.5, "model": "m"}
    rows = [{"instruction": "a", "input": "b", "output": "c", "provenance": source}, {"output": 1, "provenance": "x"}]
    assert [tuple(row) for row in parse_rows(rows)] == [("a", "b", "c", 0, 0.5, "m"), ("", "", "1", None, None, "")]
