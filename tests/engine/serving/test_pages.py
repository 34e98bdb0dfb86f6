"""The pages that the server sends have every shared part in its place."""

import pytest

from engine.serving.pages import COMMON, read_page


@pytest.mark.parametrize("link", ["", '<a href="/compare">x</a>'])
def test_shared_parts_stand_where_a_page_names_them(link, tmp_path):
    assert [part.name for part in COMMON] == ["common.css", "common.html", "common.js"]
    path = tmp_path / "page.html"
    path.write_text("a {{link}} b" + "".join(f"<{{{{{part.name}}}}}>" for part in COMMON))
    parts = "".join(f"<{part.read_text().rstrip()}>" for part in COMMON)
    assert read_page(path, link) == f"a {link} b{parts}" and len(parts) > 1000
