"""A headless Chromium, driven as a user drives it: keys, clicks, what is seen. It speaks the DevTools protocol.

with Browser(find_chromium(), folder) as browser:
    page = browser.open("http://127.0.0.1:8000")
    page.click("#send")
"""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = """
    --headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage --remote-debugging-pipe
""".split()  # noqa: SIM905
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9} | {digit: ord(digit) for digit in "0123456789"}
PATIENCE = 120.0  # seconds until something is taken for hanging


def find_chromium() -> str | None:
    """Return the path of a Chromium, None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """A Chromium with a profile in a folder. Commands go in and answers come out as JSON, each ended by a zero byte."""

    def __init__(self, binary: str, folder: Path):
        to_browser, self.out = os.pipe()
        self.into, from_browser = os.pipe()

        def place() -> None:  # Chromium reads from 3 and writes to 4; first out of the way of those very numbers
            a, b = os.dup(to_browser), os.dup(from_browser)
            high = max(a, b, 4) + 1
            os.dup2(a, high), os.dup2(b, high + 1)
            os.dup2(high, 3), os.dup2(high + 1, 4)

        self.process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=place, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser), os.close(from_browser)
        self.number, self.buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out), os.close(self.into)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Return the answer to a command. Raises RuntimeError for one that fails."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.into, 1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, width: int = 1100, height: int = 800, dark: bool = False, touch: bool = False) -> "Page":
        """Return a page that nothing kept before is seen in. touch: as on a phone."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if touch else 1,
            mobile=touch,
        )  # fmt: skip
        page.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.go(url)
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the answer to a command to this tab."""
        return self.browser.call(method, self.session, **parameters)

    def go(self, url: str) -> None:
        """Load an address and wait until it is there."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """Return the value of a script's expression, or of its promise. Raises RuntimeError for what it throws."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )  # fmt: skip
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails']['exception'].get('description')}")
        return done["result"].get("value")

    def wait(self, script: str) -> Any:
        """Return the value of an expression once it is true. Raises TimeoutError where it never is."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.02)
        raise TimeoutError(f"never: {script}; the page says {self.run('document.body.innerText')!r}")

    def text(self, selector: str) -> str:
        """Return the text of an element as a user sees it."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """Click in the middle of an element. Raises RuntimeError where another one lies over it."""
        x, y, is_on_top = self.run(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "nearest", behavior: "instant"}});
            const box = element.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
            const top = document.elementFromPoint(x, y);
            return [x, y, element === top || element.contains(top) || Boolean(top?.contains(element))];
        }})()""")
        if not is_on_top:
            raise RuntimeError(f"{selector} cannot be clicked: something lies over it")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, text: str) -> None:
        """Put text where the focus is, as a keyboard or a paste does."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key. modifiers: 1 Alt, 2 Ctrl, 4 Meta, 8 Shift."""
        what: dict[str, Any] = {
            "key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers,
        }  # fmt: skip
        text = "\r" if key == "Enter" else key if key.isdigit() else ""
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **what)
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in a field for files, as its dialog does."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["result"]["objectId"])

    def picture(self) -> bytes:
        """Return what is seen as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def complaints(self) -> list[str]:
        """Return what the page's console, its exceptions and its policy have said since the browser began."""
        self.run("0")
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                details = event["params"]["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            if event["method"] == "Log.entryAdded":
                found.append(event["params"]["entry"]["text"])
            if event["method"] == "Runtime.consoleAPICalled":
                found.append(str(event["params"]["args"]))
        return found
