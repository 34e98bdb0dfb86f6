"""The pages that the server sends have every shared part in its place."""

import io

import pytest

from engine.serving.pages import COMMON, read_page


@pytest.mark.parametrize("link", ["", '<a href="/compare">x</a>'])
def test_shared_parts_stand_where_a_page_names_them(link, tmp_path):
    assert [part.name for part in COMMON] == ["common.css", "common.html", "common.js"]
    path = tmp_path / "page.html"
    path.write_text("a {{link}} b" + "".join(f"<{{{{{part.name}}}}}>" for part in COMMON))
    parts = "".join(f"<{part.read_text().rstrip()}>" for part in COMMON)
    assert read_page(path, link) == f"a {link} b{parts}" and len(parts) > 1000


def test_pages_are_utf_8_whatever_the_locale_is(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("\u2026{{common.js}}", encoding="utf-8")
    (tmp_path / "common.js").write_text("\u00fc", encoding="utf-8")
    monkeypatch.setattr("engine.serving.pages.COMMON", (tmp_path / "common.js",))
    monkeypatch.setattr(io, "text_encoding", lambda encoding, level=2: encoding or "latin-1")
    assert read_page(tmp_path / "page.html") == "\u2026\u00fc"
