"""docs/ranks.md against the estimate."""

import sys

import pytest

from scripts.pages import ranks


def test_the_page_of_ranks_is_what_the_estimate_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ranks", "--check"])
    ranks.main()
    page = ranks.DOC.read_text()
    assert page.count("### 8 x ") == 12 and "Everything here is projected" in page
    monkeypatch.setattr(ranks, "page", lambda: page + "more")
    with pytest.raises(SystemExit, match=r"docs/ranks.md is not what the estimate says; run python -m scripts"):
        ranks.main()
