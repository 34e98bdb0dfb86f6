"""Figures of single sections, each where another one would be told by a slip."""

from data_gen.page import sections
from data_gen.page.run_files import Rejected, Row
from tests.helpers.report_page import bars


def test_rejections_for_further_reasons_are_added_up():
    rejected = Rejected()
    for reason in range(sections.REASONS + 5):
        for _ in range(3):
            rejected.add({"reason": f"reason {reason:02}"})
    counts, _ = bars(sections.render_rejections(rejected, {}))
    assert len(counts) == sections.REASONS + 1 and counts["5 other reasons"] == 15


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
