"""What is counted of rejected rows, and which of them are kept as examples."""

import pytest

from data_gen.page.run_files import EXAMPLES, Rejected


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
