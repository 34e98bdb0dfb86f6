"""Datasets for the report, and its page as a reader sees it: texts, figures, charts and tables."""

import json
import random
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser

from data_gen.page.report import write_report

EVIL = """</div></section></script><script>document.title='owned'</script><img src=x onerror="alert(1)">"'&lt;"""
VERBS = {"Write": 9, "Describe": 5, "Explain": 4, "Create": 3, "Suggest": 2}  # and how often
NOUNS = {"story": 8, "plan": 5, "method": 3, "name": 2, "letter": 1}
TOPICS = """bread rain bicycles night trains maps winter gardens music bridges salt markets rivers owls clocks
    tides""".split()  # noqa: SIM905
REASONS = {"duplicate": 60, "empty output": 20, "given text missing": 9, "url": 4, "truncated": 6, "malformed": 3}
REASONS |= {"refusal": 1}
MODELS = {"gpt-5.4-mini": 3, "gpt-5.4": 9, "gpt-4.1": 1, "gpt-4o": 5}  # and their shares of the answers, in no order


def make(n=400, seed=0):
    """Return rows with provenance, lines of rejected.jsonl and a run.json that agree."""
    rng = random.Random(seed)

    def pick(weights):
        return rng.choices(list(weights), list(weights.values()))[0]

    def words(k):
        return " ".join(rng.choice(TOPICS) for _ in range(k))

    def item():
        instruction = f"{pick(VERBS)} a short {pick(NOUNS)} about {words(rng.randint(3, 9))}."
        given = words(int(rng.lognormvariate(2, 0.8)) + 1) if rng.random() < 0.4 else ""
        output = rng.choice(
            [words(int(rng.lognormvariate(4, 1)) + 1), "42", f"- {words(3)}\n- {words(2)}", f"```\n{words(4)}\n```"]
        )
        return {"instruction": instruction, "input": given, "output": output}

    rows, lost, request = [], [], 0
    while len(rows) < n:
        for number in range(1, 21):
            at = {"request": request, "item": number}
            if rng.random() < 0.2 + 0.4 * len(rows) / n:
                line = at | {"reason": pick(REASONS), "detail": words(3)}
                if line["reason"] not in ("truncated", "malformed"):
                    line |= item()
                if line["reason"] == "duplicate" and rows:
                    line |= {"duplicate_of": rng.choice(rows[:9])["instruction"], "similarity": rng.uniform(0.7, 1)}
                lost.append(line)
            else:
                source = {  # no two requests alike, so that a figure of another row shows
                    "model": list(MODELS)[request % len(MODELS)],
                    "prompt_sha256": f"{request:064x}",
                    "response_id": f"chatcmpl-{request}",
                    "usd": (1 + request * 7 % 11) / 10_000,
                }
                rows.append(item() | {"provenance": at | source})
        request += 1
    counts = {"requests": request + 2, "answers": request, "failed_requests": 2, "items": len(rows) + len(lost)}
    counts |= {"kept": len(rows), "repaired": {"marker removed": 17, "number removed": 4}}
    counts["rejected"] = dict(Counter(line["reason"] for line in lost))
    cost = {"spent_usd": 3.21, "uncertain_usd": 0.01, "cap_usd": 5.0, "input_tokens": 345678, "output_tokens": 2345678}
    cost |= {"usd_per_million_in": 0.4, "usd_per_million_out": 1.6, "batch": False}
    run = {"status": "done", "started": "2025-03-01T10:00:59+00:00", "seconds": 5234.5, "counts": counts, "cost": cost}
    run |= {
        "settings": {"model": "gpt-5.4", "rows": n, "batch": False, "seed-tasks": None},
        "models": {name: share * request for name, share in MODELS.items()},
    }
    return rows, lost, run | {"versions": {"openai": "3.1.0"}}


class Page(HTMLParser):
    """The parsed page: tags, visible text, and whether every tag was closed."""

    VOID = ("meta", "!doctype")

    def __init__(self, source):
        super().__init__()
        self.source, self.tags, self.open, self.texts = source, [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

    def section(self, key):
        found = re.search(rf'<section><h2 id="{key}">(.*?)</section>', self.source, re.DOTALL)
        return found[1] if found else ""

    def figure(self, label):
        """Return the value and the note of a key figure."""
        found = re.search(rf"<dt>{label}</dt><dd>(.*?)</dd>", self.source)
        return plain(found[1]) if found else None

    def table(self):
        return {
            plain(key): plain(value) for key, value in re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", self.source)
        }

    def chart(self, title):
        """Return the texts of a histogram's bars or a line's stretches: [(text, first number after its colon)]."""
        found = re.search(
            rf"<figure[^>]*><figcaption><div class=\"head\"><h3>{title}</h3>.*?</figure>", self.source, re.DOTALL
        )
        tips = re.findall(r'<g class="bin tip"><title>(.*?)</title>', found[0]) if found else []
        return [(unescape(tip), int(re.search(r": ([\d,]+)", tip)[1].replace(",", ""))) for tip in tips]


def plain(html):
    return unescape(re.sub(r"<[^>]*>", "|", html)).strip("|")


def bars(html):
    """Return {name: count} and {name: share} of the bars in a piece of the page."""
    rows = re.findall(
        r'<span class="name">(.*?)</span>.*?<span class="n">([\d,]+) (?:<small>(.*?)</small>)?', html, re.DOTALL
    )
    return {unescape(a): int(n.replace(",", "")) for a, n, _ in rows}, {
        unescape(a): unescape(share) for a, _, share in rows
    }


def arcs(page):
    """Return {(verb, object or None): rows} of the sunburst."""
    found = {}
    for verb, noun, n in re.findall(r"<title>(\w+)(?: … (\w+))?: ([\d,]+) rows?", page.source):
        found[verb, noun or None] = int(n.replace(",", ""))
    return found


def report(folder, rows, lost=None, run=None, name="dataset.jsonl"):
    path = folder / name
    path.write_text(json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows))
    for file, value in (("rejected.jsonl", lost), ("run.json", run)):
        (folder / file).unlink(missing_ok=True)
        if value is not None:
            lines = "".join(json.dumps(line) + "\n" for line in value) if isinstance(value, list) else json.dumps(value)
            (folder / file).write_text(value if isinstance(value, str) else lines)
    out = write_report(path)
    assert out == folder / "report.html" and not list(folder.glob(".*"))
    return check_page(out.read_text())


def check_page(source):
    """Return the parsed page, which holds only what a page may hold."""
    page = Page(source)
    allowed = (
        "html head meta title style body header h1 p span nav a dl div dt dd small figure figcaption h3 output svg g"
    )
    allowed += (
        " rect line text path circle section h2 ul li article details summary mark table thead tbody tr th td script"
    )
    assert {tag for tag, _ in page.tags} <= set(allowed.split())
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links == [f"#{key}" for key in re.findall(r'<h2 id="(\w+)">', page.source)]
    assert not [a for _, a in page.tags for key in a if key.startswith("on") or key in ("src", "style")]
    assert all(a.get("aria-label") for t, a in page.tags if t == "svg" and a.get("role") == "img")
    assert not re.search(
        r"nan|inf\b|None", re.sub(r"<style>.*?</style>|<div class=\"text\">.*?</div>", "", page.source, flags=re.DOTALL)
    )
    return page


def body_lines(source):
    """Return a page's body, an element a line, without style and script."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", source, flags=re.DOTALL)
    return re.sub(r">\s*<", ">\n<", body) + "\n"
