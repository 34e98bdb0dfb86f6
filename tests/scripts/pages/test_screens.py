"""The pictures of the pages: what the script does in a browser works, and the pictures of docs/ are small."""

import json
import re
import struct
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")

from scripts.base.browser import Browser, find_chromium
from scripts.pages import screens
from tests.helpers.run import ROOT
from tests.helpers.small_model import small_model


def size_of(png):
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])


def test_both_pages_are_pictured_at_their_size(tmp_path, monkeypatch):
    binary = find_chromium()
    if binary is None:
        pytest.skip("no chromium on PATH")
    monkeypatch.setitem(screens.SETTINGS, "max_tokens", 8)
    (tmp_path / "other").symlink_to(small_model())
    with (
        screens.serve(str(small_model()), str(tmp_path / "other"), tmp_path / "votes") as url,
        Browser(binary, tmp_path / "profile") as browser,
    ):
        talk, comparison = screens.picture_talk(browser, url), screens.picture_comparison(browser, url)
    assert size_of(talk) == (screens.WIDTH, screens.TALK_HEIGHT)
    assert size_of(comparison) == (screens.WIDTH, screens.COMPARISON_HEIGHT)


def test_a_page_is_loaded_again_under_our_settings():
    """They are read when a page is loaded, so it is gone to once more before it is waited for."""
    done = []

    class Page:
        def __getattr__(self, name):
            return lambda text: done.append((name, text))

    browser = SimpleNamespace(open=lambda *how: done.append(("open", how)) or Page())
    screens.open_page(browser, "http://it", 700, "ready")
    assert [name for name, _ in done] == ["open", "run", "go", "wait"]
    assert done[0][1] == ("http://it", screens.WIDTH, 700) and done[2:] == [("go", "http://it"), ("wait", "ready")]
    kept = re.search(r"setItem\('cria.settings', (\".*\")\); 0$", done[1][1])
    assert json.loads(json.loads(kept[1])) == screens.SETTINGS


def test_the_pictures_of_the_docs_are_small_and_of_the_size_that_the_script_makes():
    text = (ROOT / "docs" / "serving.md").read_text()
    assert re.findall(r"\(img/(\w+)\.png\)", text) == ["page", "compare"]
    for name, height in (("page", screens.TALK_HEIGHT), ("compare", screens.COMPARISON_HEIGHT)):
        png = (screens.FOLDER / f"{name}.png").read_bytes()
        assert size_of(png) == (screens.WIDTH, height) and len(png) < 150_000
