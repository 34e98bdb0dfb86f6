"""What is sent to a browser, byte for byte, by a stand-in for its pipes: it need not be installed."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.base import browser
from scripts.base.browser import Browser
from tests.helpers.calls import Calls


class Pipes:
    """A browser's two pipes. sent: the commands it was given; answers: what it gives to each, in the order of sending.

    An answer that is a function is called with the command. Events may stand before an answer, in a list with it.
    """

    def __init__(self, monkeypatch):
        self.calls, self.sent, self.answers, self.waiting, self.fds = Calls(), [], [], b"", iter(range(10, 99))
        self.process = self.calls.thing("process", kill=None, wait=None)
        pipe = lambda: (next(self.fds), next(self.fds))  # noqa: E731
        named = {name: self.calls.stand_in(name) for name in ("close", "dup2")}
        dup = self.calls.stand_in("dup", lambda fd: fd + 100)
        monkeypatch.setattr(
            browser, "os", SimpleNamespace(pipe=pipe, dup=dup, write=self.write, read=self.read, **named)
        )
        monkeypatch.setattr(browser.subprocess, "Popen", self.calls.stand_in("Popen", self.start))

    def start(self, command, preexec_fn, **_):
        preexec_fn()
        return self.process

    def write(self, fd, message):
        assert fd == 11 and message.endswith(b"\0")
        command = json.loads(message[:-1])
        self.sent.append(command)
        *events, answer = self.answers.pop(0) if self.answers else [{}]
        answer = answer(command) if callable(answer) else answer
        answer = answer if "error" in answer else {"result": answer}
        for one in (*events, {"id": command["id"], **answer}):
            self.waiting += json.dumps(one).encode() + b"\0"

    def read(self, fd, n):
        assert fd == 12 and n == 1 << 16
        part, self.waiting = self.waiting[:7], self.waiting[7:]  # a message comes in parts
        return part

    def methods(self):
        """Return (method, parameters) of what was sent, in short."""
        return [(command["method"], command["params"]) for command in self.sent]


@pytest.fixture
def pipes(monkeypatch):
    return Pipes(monkeypatch)


@pytest.fixture
def page(pipes):
    """A page that has been opened."""
    return browser.Page(Browser("chromium", Path("folder")), "s")


def test_a_browser_reads_from_3_and_writes_to_4_and_ends_with_its_context(pipes):
    with Browser("chromium", Path("folder")) as made:
        assert made.process is pipes.process
    dups = ["dup(10)", "dup(13)", "dup2(110, 114)", "dup2(113, 115)", "dup2(114, 3)", "dup2(115, 4)"]
    lines = pipes.calls.lines
    assert lines[1:] == [*dups, "close(10)", "close(13)", "process.kill()", "process.wait()", "close(11)", "close(12)"]
    assert lines[0].startswith("Popen(['chromium', '--headless=new', ") and lines[0].endswith(
        "'--remote-debugging-pipe', '--user-data-dir=folder', 'about:blank'], preexec_fn=function, close_fds=False, "
        "stdin=-3, stdout=-3, stderr=-3)"
    )


def test_an_answer_is_that_of_its_command_and_events_are_kept(pipes):
    made = Browser("chromium", Path("folder"))
    event, other = {"method": "Log.entryAdded"}, {"id": 99, "result": 1}
    pipes.answers = [[event, other, {"a": 1}], [{"b": 2}]]
    assert made.call("A.b", c=3) == {"a": 1} and made.call("D.e", "session") == {"b": 2}
    assert pipes.sent == [
        {"id": 1, "method": "A.b", "params": {"c": 3}}, {"id": 2, "method": "D.e", "params": {}, "sessionId": "session"}
    ]  # fmt: skip
    assert made.events == [event, other]
    pipes.answers = [[{"error": {"message": "no such thing"}}]]
    with pytest.raises(RuntimeError, match=r"A\.b: no such thing"):
        made.call("A.b")
    browser.os.write = lambda *_: None
    with pytest.raises(RuntimeError, match="the browser has ended"):
        made.call("A.b")


@pytest.mark.parametrize(("dark", "touch"), [(False, False), (True, False), (False, True)])
def test_a_page_is_opened_apart_from_all_others_at_its_size(dark, touch, pipes):
    pipes.answers = [[{"browserContextId": "context"}], [{"targetId": "target"}], [{"sessionId": "s"}]]
    pipes.answers += [[{}]] * 7 + [[{}], [{"result": {"value": True}}]]
    made = Browser("chromium", Path("folder")).open("http://it", 300, 200, dark, touch)
    assert made.session == "s" and [command.get("sessionId") for command in pipes.sent] == [None] * 3 + ["s"] * 9
    scale = 2 if touch else 1
    size = {"width": 300, "height": 200, "deviceScaleFactor": scale, "mobile": touch}
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    assert pipes.methods()[:10] == [
        ("Target.createBrowserContext", {}),
        ("Target.createTarget", {"url": "about:blank", "browserContextId": "context"}),
        ("Target.attachToTarget", {"targetId": "target", "flatten": True}),
        ("Page.enable", {}), ("Runtime.enable", {}), ("Log.enable", {}),
        ("Emulation.setFocusEmulationEnabled", {"enabled": True}), ("Emulation.setDeviceMetricsOverride", size),
        ("Emulation.setTouchEmulationEnabled", {"enabled": touch}),
        ("Emulation.setEmulatedMedia", {"features": scheme}),
    ]  # fmt: skip
    assert pipes.methods()[10] == ("Page.navigate", {"url": "http://it"})


def test_going_waits_until_the_page_is_there(page, pipes, monkeypatch):
    slept = []
    times = SimpleNamespace(monotonic=lambda: 0.0, sleep=slept.append)
    monkeypatch.setattr(browser, "time", times)
    pipes.answers = [[{}], [{"result": {"value": False}}], [{"result": {}}], [{"result": {"value": "yes"}}]]
    page.go("http://it")
    ready = "document.readyState === 'complete' && location.href !== 'about:blank'"
    how = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
    asked = ("Runtime.evaluate", {"expression": ready, **how})
    assert pipes.methods() == [("Page.navigate", {"url": "http://it"}), *[asked] * 3] and slept == [0.02] * 2


def test_what_is_never_true_is_told_with_the_pages_text(page, pipes, monkeypatch):
    moments = iter([0.0, 1.0, browser.PATIENCE - 1, browser.PATIENCE])
    monkeypatch.setattr(browser, "time", SimpleNamespace(monotonic=lambda: next(moments), sleep=lambda _: None))
    pipes.answers = [[{"result": {"value": 0}}], [{"result": {"value": 0}}], [{"result": {"value": "Hello"}}]]
    with pytest.raises(TimeoutError, match="never: 1 > 2; the page says 'Hello'"):
        page.wait("1 > 2")
    assert pipes.methods()[-1][1]["expression"] == "document.body.innerText"
    moments = iter([0.0, 1.0])
    pipes.answers = [[{"result": {"value": 7}}]]
    assert page.wait("7") == 7


def test_what_a_script_throws_is_told(page, pipes):
    pipes.answers = [[{"exceptionDetails": {"exception": {"description": "TypeError: x"}}, "result": {}}]]
    with pytest.raises(RuntimeError, match="f\\(\\): TypeError: x"):
        page.run("f()")


def test_a_click_is_in_the_middle_and_on_what_is_seen(page, pipes):
    pipes.answers = [[{"result": {"value": [12.5, 7.0, True]}}]]
    page.click("#a 'b'")
    at = {"x": 12.5, "y": 7.0, "button": "left", "clickCount": 1}
    assert pipes.methods()[1:] == [
        ("Input.dispatchMouseEvent", {"type": kind, **at}) for kind in ("mousePressed", "mouseReleased")
    ]  # fmt: skip
    script = pipes.methods()[0][1]["expression"]
    assert "document.querySelector(\"#a 'b'\")" in script
    assert "x = box.x + box.width / 2, y = box.y + box.height / 2" in script
    assert "element === top || element.contains(top) || Boolean(top?.contains(element))" in script
    pipes.answers = [[{"result": {"value": [1, 2, False]}}]]
    with pytest.raises(RuntimeError, match="#x cannot be clicked: something lies over it"):
        page.click("#x")
    assert len(pipes.sent) == 4


@pytest.mark.parametrize(
    ("key", "code", "text"), [("Enter", 13, "\r"), ("Escape", 27, ""), ("Tab", 9, ""), ("0", 48, "0"), ("7", 55, "7")]
)
def test_a_key_goes_down_and_up(key, code, text, page, pipes):
    page.press(key, 8)
    what = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8}
    down = {"type": "keyDown" if text else "rawKeyDown", "text": text, **what}
    assert pipes.methods() == [
        ("Input.dispatchKeyEvent", down), ("Input.dispatchKeyEvent", {"type": "keyUp", **what})
    ]  # fmt: skip


def test_texts_files_and_pictures(page, pipes):
    png = {"data": base64.b64encode(b"png").decode()}
    pipes.answers = [[{"result": {"value": "seen"}}], [{}], [{"result": {"objectId": "7"}}], [{}], [png]]
    assert page.text("#a") == "seen"
    page.write("ü x")
    page.choose_file("#f", Path("dir/a.txt"))
    assert page.picture() == b"png"
    sent = pipes.methods()
    assert sent[0][1]["expression"] == 'document.querySelector("#a").innerText'
    assert sent[1:] == [
        ("Input.insertText", {"text": "ü x"}),
        ("Runtime.evaluate", {"expression": 'document.querySelector("#f")'}),
        ("DOM.setFileInputFiles", {"files": ["dir/a.txt"], "objectId": "7"}), ("Page.captureScreenshot", {}),
    ]  # fmt: skip


def test_complaints_are_those_of_the_page_itself(page, pipes):
    """What arrives before the last answer counts too."""
    thrown = {"method": "Runtime.exceptionThrown", "sessionId": "s",
              "params": {"exceptionDetails": {"text": "Thrown", "exception": {"description": "Error: a"}}}}  # fmt: skip
    plain = {"method": "Runtime.exceptionThrown", "sessionId": "s", "params": {"exceptionDetails": {"text": "b"}}}
    logged = {"method": "Log.entryAdded", "sessionId": "s", "params": {"entry": {"text": "c"}}}
    console = {"method": "Runtime.consoleAPICalled", "sessionId": "s", "params": {"args": [{"value": "d"}]}}
    other = {"method": "Network.x", "sessionId": "s"}
    pipes.answers = [[thrown, plain, {**logged, "sessionId": "t"}, logged, other, console, {"result": {"value": 0}}]]
    assert page.complaints() == ["Error: a", "b", "c", "[{'value': 'd'}]"]


@pytest.mark.parametrize(
    "there", [(), ("google-chrome",), ("chromium-browser", "google-chrome"), ("chromium", "google-chrome")]
)
def test_the_first_chromium_on_the_path_is_taken(there, monkeypatch):
    monkeypatch.setattr(browser.shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    assert browser.find_chromium() == (f"/bin/{there[0]}" if there else None)
