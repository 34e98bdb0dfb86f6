"""Pictures of the pages at / and /compare in Chromium, with answers that the models write greedily at that moment.

python -m scripts.pages.screens --model out/demo    after make demo: docs/img/page.png and docs/img/compare.png
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernels.base.commands import run_command
from scripts.base.browser import Browser, Page, find_chromium

FOLDER = Path(__file__).parents[2] / "docs" / "img"
WIDTH, TALK_HEIGHT, COMPARISON_HEIGHT = 1100, 870, 620
ASKED = (  # instruction and input
    ("Rewrite the sentence in the past tense.", "She walks to school and meets her friends."),
    ("Give three tips for staying healthy.", ""),
)
COMPARED = "Explain to a child why the sky is blue."
SETTINGS = {"temperature": 0, "top_p": 1, "max_tokens": 120, "seed": 0}


@contextmanager
def serve(model: str, other: str, votes: Path) -> Iterator[str]:
    """Serve two models and yield the address."""
    command = [sys.executable, "-m", "engine.serve", "--model", model, "--compare-with", other, "--votes", str(votes)]
    process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r" at (http://\S+)$", process.stdout.readline())
        if not found:
            sys.exit("error: engine.serve ended before it served; its error is above")
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def open_page(browser: Browser, url: str, height: int, is_ready: str) -> Page:
    """Return a page under our settings."""
    page = browser.open(url, WIDTH, height)
    page.run(f"localStorage.setItem('cria.settings', {json.dumps(json.dumps(SETTINGS))}); 0")
    page.go(url)
    page.wait(is_ready)
    return page


def ask(page: Page, text: str, given: str, is_done: str) -> None:
    """Write a text and its input, send them, and wait for what is to come."""
    page.click("#ask")
    page.write(text)
    if given:
        page.click("#input")
        page.write(given)
    page.click("#send")
    page.wait(is_done)
    page.run("document.activeElement.blur(); 0")  # no cursor that blinks


def picture_talk(browser: Browser, url: str) -> bytes:
    """Return the picture of questions and their answers, with how many tokens each has and not how fast they came."""
    page = open_page(browser, url, TALK_HEIGHT, "Boolean(model?.prompt_style)")
    page.click("input[value=instruction]")
    for n, (text, given) in enumerate(ASKED, 1):
        ask(page, text, given, f"!answering && chat.turns.length === {n}")
    page.run("for (const one of document.querySelectorAll('.stats')) one.textContent = one.textContent.split(' · ')[0]")
    return page.picture()


def picture_comparison(browser: Browser, url: str) -> bytes:
    """Return the picture of a vote that is due, drawn until the first model is A, so that the picture is one."""
    while True:
        page = open_page(browser, f"{url}/compare", COMPARISON_HEIGHT, "isReady")
        ask(page, COMPARED, "", "round?.state === 'voting' || round?.state === 'void'")
        picture = page.picture()
        page.click("#buttons [value=tie]")
        page.wait("round?.state === 'told'")
        first = page.run("fetch('/v1/models').then(found => found.json()).then(found => found.data[0].id)")
        if page.run("round.models[0]") == first:
            return picture


def main() -> None:
    """Write both pictures."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="out/demo", help="the model that is talked to (default: out/demo)")
    flags.add_argument("--compare-with", default="smollm2-135m", help="the other one (default: smollm2-135m)")
    flags.add_argument("--out", type=Path, default=FOLDER, help=f"folder (default: {FOLDER})")
    args = flags.parse_args()
    binary = find_chromium()
    if binary is None:
        sys.exit("error: no Chromium on PATH; install one")
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(args.model, args.compare_with, Path(folder) / "votes") as url,
        Browser(binary, Path(folder) / "profile") as browser,
    ):
        for name, picture in (("page", picture_talk), ("compare", picture_comparison)):
            path = args.out / f"{name}.png"
            path.write_bytes(picture(browser, url))
            print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_command(main)
