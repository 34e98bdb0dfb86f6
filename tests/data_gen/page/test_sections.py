"""Figures of single sections, each where another one would be told by a slip."""

import pytest

from data_gen.page import sections
from data_gen.page.run_files import Rejected, Row, RunRecord
from tests.helpers.report_page import bars


def test_rejections_for_further_reasons_are_added_up():
    rejected = Rejected()
    for reason in range(sections.REASONS + 5):
        for _ in range(3):
            rejected.add({"reason": f"reason {reason:02}"})
    counts, _ = bars(sections.render_rejections(rejected, {}))
    assert len(counts) == sections.REASONS + 1 and counts["5 other reasons"] == 15


@pytest.mark.parametrize("recorded", [{}, {"rejected": {}}, {"rejected": {"url": 2}}, {"rejected": {"url": 3}}])
def test_a_record_that_counts_otherwise_is_told_and_one_without_counts_is_not(recorded):
    rejected = Rejected()
    for _ in range(2):
        rejected.add({"reason": "url"})
    html = sections.render_rejections(rejected, recorded)
    assert ("run.json counts 3." in html) == ("run.json counts" in html) == (recorded == {"rejected": {"url": 3}})


def test_repairs_stand_in_the_order_of_their_counts():
    counts, _ = bars(sections.render_rejections(None, {"repaired": {"a": 2, "c": 7, "b": 4, "never": 0}}))
    assert list(counts.items()) == [("c", 7), ("b", 4), ("a", 2)]


def test_a_run_that_kept_nothing_has_no_chart_of_its_yield():
    rejected = Rejected()
    for request in range(9):
        rejected.add({"reason": "url", "request": request})
    assert sections.render_yield([], rejected) == ""
    rows = [Row("Do.", "", "x", request, None, "") for request in range(4)]
    assert sections.render_yield(rows[:3], None) == "" and "Rows per request" in sections.render_yield(rows, None)


def test_costs_are_of_what_the_run_kept_and_what_cost_nothing_is_known_to():
    """A file of rows may hold fewer of them than its run kept."""
    rows = [Row("Do.", "", "x", 1, usd, "m") for usd in (0.0, 0.0, None)]
    run = RunRecord(counts={"kept": 50, "requests": 4}, cost={"spent_usd": 2.0})
    html = sections.render_costs(rows, run)
    assert "$40.00" in html and "$0.50" in html and "sum over" not in html
    assert sections.find_spending(rows, RunRecord()) == (0.0, "sum over the rows kept")
    assert sections.find_spending(rows[2:], RunRecord()) == (None, "")
    answers = RunRecord(models={"m": 3})
    assert sections.render_costs(rows[2:], answers) == "", "answers alone are no costs"


def test_samples_end_at_their_bytes_but_one_is_always_shown(monkeypatch):
    rows = [Row(f"Do {n}.", "", "x", None, None, "") for n in range(3)]
    shown = {}
    for most in (1, 10**6):
        monkeypatch.setattr(sections, "SAMPLE_BYTES", most)
        shown[most] = sections.render_samples(rows)
    assert [html.count("<article>") for html in shown.values()] == [1, 3]
    assert "1 of 3 rows" in shown[1] and "All rows." in shown[10**6] and sections.render_samples([]) == ""


def test_the_line_of_duplicates_leaves_other_rejections_out(monkeypatch):
    rejected = Rejected()
    for request in range(4):
        for reason in ("duplicate", "duplicate", "url"):
            more = {"duplicate_of": "Do.", "similarity": 0.9} if reason == "duplicate" else {}
            rejected.add({"reason": reason, "request": request} | more)
    rows = [Row("Do.", "", "x", request, None, "") for request in range(4) for _ in range(5)]
    monkeypatch.setattr(
        sections,
        "draw_curves",
        lambda title, points, names, *more: list(zip(names, *(v for _, v in points), strict=True)),
    )
    assert sections.render_yield(rows, rejected) == [("kept", 5, 5, 5, 5), ("rejected as duplicates", 2, 2, 2, 2)]


@pytest.mark.parametrize("n_languages", [12, 13, 20])
def test_languages_beyond_eleven_are_added_up(n_languages):
    codes = [code for code in sections.LANGUAGES if code][:n_languages]
    languages = [code for n, code in enumerate(codes, 1) for _ in range(n)]
    rows = [Row("Do.", "", "x", None, None, "") for _ in languages]
    counts, _ = bars(sections.render_content(rows, languages).partition("<h3>Languages</h3>")[2])
    names = [sections.LANGUAGES[code] for code in reversed(codes)]
    if n_languages == 12:
        assert list(counts) == names and counts[names[0]] == 12
    else:
        assert list(counts) == [*names[:11], f"{n_languages - 11} others"]
        assert counts[f"{n_languages - 11} others"] == sum(range(1, n_languages - 10))
