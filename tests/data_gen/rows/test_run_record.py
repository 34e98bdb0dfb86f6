"""What run.json and the end of a run say."""

from argparse import Namespace
from collections import Counter
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen.api.ledger import Totals
from data_gen.api.prices import PICO, Price
from data_gen.rows.run_record import describe_run, format_ranges


@pytest.mark.parametrize(
    ("numbers", "most", "text"),
    [
        ([], None, ""), ([3], None, "3"), ([3, 7, 8, 9, 11], None, "3, 7-9, 11"), ([0, 1, 3, 4], 2, "0-1, 3-4"),
        ([0, 2, 4], 2, "0, 2 ..."),
    ],
)  # fmt: skip
def test_numbers_are_told_as_ranges(numbers, most, text):
    assert format_ranges(numbers, most) == text


def test_all_of_a_run_is_recorded():
    options = Namespace(
        model="m", out=Path("out"), files=[Path("a"), Path("b")], max_usd=Decimal("1.5"), extra={"a": 1}, batch=True,
        base_url="https://me:secret@host/v1", rows=9,
    )  # fmt: skip
    curator = SimpleNamespace(summarize=lambda: {"kept": 3}, models=Counter({"x": 1, "y": 2}))
    totals = Totals(attempts=7, answers=4, spent=5 * PICO, uncertain=PICO // 2, input_tokens=11, output_tokens=13)
    before = datetime.now(timezone.utc)
    found = describe_run(options, curator, totals, "done", 8 * PICO, Price(2_000_000, 3_000_000), 3600.12345)
    started = datetime.fromisoformat(found.pop("started")) + timedelta(seconds=3600.12345)
    assert timedelta(seconds=-2) < started - before < timedelta(minutes=10)
    assert found.pop("versions").keys() == {"python", "openai", "rapidfuzz"}
    assert list(found["models"]) == ["y", "x"]
    assert found == {
        "status": "done", "seconds": 3600.123, "counts": {"kept": 3, "attempts": 7}, "models": {"y": 2, "x": 1},
        "settings": {
            "model": "m", "out": "out", "files": ["a", "b"], "max_usd": "1.5", "extra": {"a": 1}, "batch": True,
            "base_url": "https://host/v1", "rows": 9,
        },
        "cost": {
            "spent_usd": 5.0, "uncertain_usd": 0.5, "cap_usd": 8.0, "input_tokens": 11, "output_tokens": 13,
            "usd_per_million_in": 2.0, "usd_per_million_out": 3.0, "batch": True,
        },
    }  # fmt: skip
    assert describe_run(options, curator, totals, "done", None, Price(1, 1), 1)["cost"]["cap_usd"] is None
