"""The pictures of the pages: what the script does in a browser works, and the pictures of docs/ are small."""

import contextlib
import io
import json
import re
import signal
import struct
import sys
from types import SimpleNamespace

import pytest

from scripts.base.browser import Browser, find_chromium
from scripts.pages import screens
from tests.helpers.calls import Calls
from tests.helpers.run import ROOT
from tests.helpers.small_model import small_model


def size_of(png):
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])


def test_both_pages_are_pictured_at_their_size(tmp_path, monkeypatch):
    pytest.importorskip("starlette")
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


class Page:
    """A page that notes what is done with it, and gives values to scripts by how they begin."""

    def __init__(self, calls, values):
        for name in ("click", "write", "wait"):
            setattr(self, name, calls.stand_in(name))
        self.run = calls.stand_in("run", lambda script: next((v for k, v in values if script.startswith(k)), None))
        self.picture = calls.stand_in("picture", b"png")


def test_questions_are_asked_with_their_inputs_and_no_speed_is_shown(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(screens, "open_page", calls.stand_in("open", lambda *_: Page(calls, ())))
    assert screens.picture_talk("browser", "http://it") == b"png"
    blurred = "run('document.activeElement.blur(); 0')"
    assert calls.lines == [
        "open('browser', 'http://it', 870, 'Boolean(model?.prompt_style)')", "click('input[value=instruction]')",
        "click('#ask')", "write('Rewrite the sentence in the past tense.')", "click('#input')",
        "write('She walks to school and meets her friends.')", "click('#send')",
        "wait('!answering && chat.turns.length === 1')", blurred,
        "click('#ask')", "write('Give three tips for staying healthy.')", "click('#send')",
        "wait('!answering && chat.turns.length === 2')", blurred,
        "run(\"for (const one of document.querySelectorAll('.stats')) one.textContent = "
        "one.textContent.split(' · ')[0]\")", "picture()",
    ]  # fmt: skip


def test_a_comparison_is_drawn_until_the_first_model_is_a(monkeypatch):
    calls, firsts = Calls(), iter(["two", "one"])

    def make(*_):
        return Page(calls, (("fetch", "one"), ("round.models[0]", next(firsts))))

    monkeypatch.setattr(screens, "open_page", calls.stand_in("open", make))
    assert screens.picture_comparison("browser", "http://it") == b"png"
    one = [
        "open('browser', 'http://it/compare', 620, 'isReady')", "click('#ask')",
        "write('Explain to a child why the sky is blue.')", "click('#send')",
        "wait(\"round?.state === 'voting' || round?.state === 'void'\")", "run('document.activeElement.blur(); 0')",
        "picture()", "click('#buttons [value=tie]')", "wait(\"round?.state === 'told'\")",
        "run(\"fetch('/v1/models').then(found => found.json()).then(found => found.data[0].id)\")",
        "run('round.models[0]')",
    ]  # fmt: skip
    assert calls.lines == one * 2


@pytest.mark.parametrize("line", ["serving at http://127.0.0.1:77\n", ""])
def test_two_models_are_served_until_the_pictures_are_taken(line, monkeypatch):
    calls = Calls()
    process = calls.thing("process", send_signal=None, wait=None)
    process.stdout = io.StringIO(line)
    monkeypatch.setattr(screens.subprocess, "Popen", calls.stand_in("Popen", process))
    if line:
        with screens.serve("mine", "other", "votes") as url:
            assert url == "http://127.0.0.1:77" and len(calls.lines) == 1
    else:
        with pytest.raises(SystemExit, match=r"engine\.serve ended before"), screens.serve("mine", "other", 1):
            pass
    assert calls.lines[1:] == [f"process.send_signal({signal.SIGTERM!r})", "process.wait()"]
    words = ["-m", "engine.serve", "--model", "mine", "--compare-with", "other", "--votes", "votes" if line else "1"]
    assert calls.lines[0] == f"Popen({[sys.executable, *words, '--port', '0']}, stdout=-1, text=True)"


def test_both_pictures_are_written(monkeypatch, tmp_path, call_main, capsys):
    calls = Calls()
    served = calls.stand_in("serve", contextlib.nullcontext("http://it"))
    made = calls.stand_in("Browser", contextlib.nullcontext("the browser"))
    monkeypatch.setattr(screens, "serve", served)
    monkeypatch.setattr(screens, "Browser", made)
    monkeypatch.setattr(screens, "find_chromium", lambda: "chromium")
    monkeypatch.setattr(screens.tempfile, "TemporaryDirectory", calls.folder)
    monkeypatch.setattr(screens, "picture_talk", calls.stand_in("talk", b"12345"))
    monkeypatch.setattr(screens, "picture_comparison", calls.stand_in("compare", b"x" * 1234))
    assert not call_main(screens, "--out", tmp_path, "--model", "mine", "--compare-with", "other")
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/page.png: 5 bytes", f"{tmp_path}/compare.png: 1,234 bytes"
    ]  # fmt: skip
    assert (tmp_path / "page.png").read_bytes() == b"12345" and calls.lines == [
        "serve('mine', 'other', PosixPath('TEMPORARY/votes'))", "Browser('chromium', PosixPath('TEMPORARY/profile'))",
        "talk('the browser', 'http://it')", "compare('the browser', 'http://it')",
    ]  # fmt: skip
    monkeypatch.setattr(screens, "find_chromium", lambda: None)
    assert call_main(screens) == "error: no Chromium on PATH; install one"


def test_flags_have_defaults(defaults_of):
    assert defaults_of(screens) == {"model": "out/demo", "compare_with": "smollm2-135m", "out": screens.FOLDER}
