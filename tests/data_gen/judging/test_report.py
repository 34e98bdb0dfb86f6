"""The page of a judged run: its figures are those of run.json, no text is ever markup, it fits a phone."""

import json
import os
import re

import pytest

pytest.importorskip("openai")

from data_gen import judge
from data_gen.base.cli import run_for_exit_code
from tests.helpers.judging import QUESTIONS, judge_mostly_fairly, say, write_answers
from tests.helpers.openai_server import Server
from tests.helpers.report_page import EVIL, bars, body_lines, check_page, plain

PROBE = """<script>
const wide = [...document.querySelectorAll("body *:not(.wide *)")].filter(e =>
  e.getBoundingClientRect().right > innerWidth + 1 ||
  (e.matches(".text, td, th, .name, h1") && e.scrollWidth > e.clientWidth + 1));
const scroll = document.documentElement.scrollWidth;
console.error(`width ${innerWidth} scroll ${scroll} out ${wide.map(e => e.outerHTML)[0]}`);
const lane = document.querySelectorAll(".lanes svg")[1];
const say = () => document.querySelector("figure output").textContent;
lane.querySelector("circle").dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
console.error("says " + (say() === lane.querySelector("title").textContent));
</script></body>"""


def judge_files(folder, files, answer, *more):
    """Return the page and the record of a run."""
    os.environ.setdefault("OPENAI_API_KEY", "none")
    with Server(answer=answer) as server:
        words = [*files, "--base-url", server.base_url, "--judge", "m", "--price-in", "1", "--price-out", "1", *more]
        assert run_for_exit_code(judge.main, [*map(str, words), "--out", str(folder / "out"), "--quiet"]) == 0
    page = check_page((folder / "out" / "report.html").read_text())
    return page, json.loads((folder / "out" / "run.json").read_text())


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    files = write_answers(folder, length=lambda name, question: 10 + 3 * ((question % 3 > 0) == (name == "model")))
    lines = [{"prompt": "Say it in 1 words.", "models": ["base", "model"], "vote": vote} for vote in ("A", "B", "tie")]
    (folder / "votes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return judge_files(folder, files, judge_mostly_fairly, "--votes", folder / "votes.jsonl")


def test_the_page_is_kept_whole(plainly, snapshot):
    page, told = plainly
    source = body_lines(page.source).replace(told["settings"]["out"].removesuffix("/out"), "FOLDER")
    changing = r"20\d\d-\d\d-\d\d \d\d:\d\d UTC|took \S+|127.0.0.1:\d+"
    assert re.sub(changing, "#", source) == snapshot


def test_figures_are_those_of_the_record(plainly):
    page, told = plainly
    (pair,), canary = told["results"]["pairs"], told["results"]["canary"]
    rate, (low, high) = pair["win_rate"]["value"], pair["win_rate"]["interval"]
    assert page.figure("Win rate") == f"{rate:.1f}%|95%: {low:.1f} to {high:.1f}"
    assert page.figure("Decisive").startswith(f"{pair['decisive_share']:.1f}%|")
    assert page.figure("Flips") == f"{pair['flip_rate']:.1f}%|of {pair['two_winners']} pairs with two winners"
    assert page.figure("First shown wins") == f"{pair['first_share']:.1f}%|of {pair['winners']} winners"
    assert page.figure("Canary").startswith(f"{canary['win_rate']['value']:.1f}%|")
    cells = [plain(cell) for cell in re.findall(r'<td class="n">(.*?)</td>', page.section("result"))]
    ours = pair["length_controlled"]
    assert cells[:9] == [
        f"{rate:.1f}%", f"{low:.1f} to {high:.1f}", str(pair["wins"]), str(pair["draws"]), str(pair["losses"]),
        f"{pair['decisive_share']:.1f}%", f"{pair['flip_rate']:.1f}%", f"{pair['first_share']:.1f}%",
        f"{ours['value']:.1f}% ({ours['interval'][0]:.1f} to {ours['interval'][1]:.1f})",
    ]  # fmt: skip
    counts, _ = bars(page.section("order"))
    assert sum(counts.values()) == QUESTIONS and counts["one winner in both orders"] == pair["wins"] + pair["losses"]
    assert "not AlpacaEval's length-controlled win rate" in page.section("lengths").replace("&#x27;", "'")
    assert "50.0% (95%: 0.0 to 100.0) of 3 votes; won 1, tied 1, both bad 0, lost 1" in page.section("people")


def test_bars_and_marks_are_to_scale(plainly):
    page, told = plainly
    pair = told["results"]["pairs"][0]
    lane = re.search(r'<ul class="bars lanes">(.*?)</li>', page.section("result"), re.S)[1]
    widths = {
        kind: float(width) for kind, width in re.findall(r'<rect class="(\w+)" x="[^"]*" width="([\d.]+)%"', lane)
    }
    n = pair["win_rate"]["n"]
    assert widths == pytest.approx(
        {"won": 100 * pair["wins"] / n, "drawn": 100 * pair["draws"] / n, "lost": 100 * pair["losses"] / n}, abs=0.01
    )
    assert float(re.search(r'<circle class="estimate" cx="([\d.]+)%', lane)[1]) == pytest.approx(
        pair["win_rate"]["value"], abs=0.01
    )
    ends = re.search(r'class="whisker" x1="([\d.]+)%" x2="([\d.]+)%"', lane).groups()
    assert [float(end) for end in ends] == pytest.approx(pair["win_rate"]["interval"], abs=0.01)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Return the page of three models whose names, answers and judge are all markup, and words without an end."""
    folder = tmp_path_factory.mktemp("hostile")
    outputs = ["\ud83d half", "", "x" * 3000, EVIL, "\x00", "{fence} {first}"]
    files = []
    for name in ("../" + EVIL, "b" * 300, "c"):
        rows = [
            {"instruction": f"{EVIL} {n}", "output": f"{text}{name[:5]}", "generator": name}
            for n, text in enumerate(outputs)
        ]
        files.append(folder / f"{len(files)}.json")
        files[-1].write_text(json.dumps(rows))
    return judge_files(folder, files, lambda key, body: say("1" if int(key, 16) % 3 else "2", EVIL))


def test_no_text_is_ever_markup(hostile):
    page, told = hostile
    assert "<img" not in page.source and page.text.count("document.title='owned'") > 10
    assert [one["name"][:3] for one in sorted(told["results"]["ranking"], key=lambda one: one["name"])] == [
        "../",
        "bbb",
        "c",
    ]


def test_in_a_browser(chromium, hostile):
    dom, console = chromium(hostile[0].source, 1280)
    assert console == [] and "<title>owned" not in dom
    dom, console = chromium(hostile[0].source.replace("<h1>", "<script>document.title='owned'</script><h1>"), 1280)
    assert "<title>owned" not in dom and any("Content Security Policy" in line for line in console)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_and_charts_answer(chromium, hostile, width):
    source = re.sub(r"<meta http-equiv[^>]*>", "", hostile[0].source).replace("</body>", PROBE)
    _, console = chromium(source.replace("<details", "<details open"), width)
    assert len(console) == 2 and f"width {width} scroll {width} out undefined" in console[0], console
    assert "says true" in console[1]
