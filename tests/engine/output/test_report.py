"""report.html: right for whole, odd and broken runs; no text of a model or a dataset is ever markup."""

import html
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from engine.output.report import read_events, render_key_figures, render_samples, write_report

EVIL = (
    """</div></script><script>document.title='owned'</script><img src=x onerror="document.title='owned'">&lt;b&gt;"'"""
)
RUN = {
    "status": "done",
    "model": {"name": "smollm2-135m", "parameters": 134515008},
    "config": {"lr": 2e-5, "data": ["a.json"], "max_steps": None, "packing": True, "evil": EVIL},
    "data": {"rows_read": 52002, "skipped": 1, "dropped": {"empty": 28}, "truncated": 93, EVIL: EVIL},
    "environment": {"torch": "2.11.0", "device": "cpu", "git_commit": "4f1c2aa", "evil": EVIL},
    "started": "2025-03-01T10:00:00+00:00",
    "seconds": 318.0,
}


def train(step, **changes):
    random.seed(step)
    figures = dict(epoch=step / 100, loss=1.1 + 1.5 * math.exp(-step / 40) + random.gauss(0, 0.05), lr=2e-5)
    figures |= dict(grad_norm=1.5, examples=8, tokens=1000, computed_tokens=900, loss_tokens=500, step_seconds=0.5)
    return (
        dict(event="train", step=step)
        | figures
        | dict(tokens_per_second=2000, mfu=None, peak_memory_bytes=2**31 - step * 2**21)
        | changes
    )


def realistic(steps=300):
    lines = [train(step) for step in range(1, steps + 1)]
    lines += [
        dict(event="eval", step=s, loss=1.2 + 0.1 * (s == 50), perplexity=math.exp(1.2))
        for s in range(50, steps + 1, 50)
    ]
    for step in (0, steps // 2, steps):
        lines += [
            dict(event="sample", step=step, prompt=p + EVIL, text=f"{p} at {step} {EVIL}") for p in ("z", "b", "c")
        ]
    for step, equal in ((0, 1), (steps, 2)):
        for i in range(2):
            lines += [
                dict(event="answer", step=step, prompt=f"q{i}", wanted=EVIL, text=f"a{i} at {step}", equal=i < equal)
            ]
        lines += [dict(event="score", step=step, equal=equal, answers=2, overlap=0.5)]
    lines += [dict(event="skip", step=7, reason=EVIL), dict(event="save", step=9, path=EVIL, seconds=1, bytes=5e9)]
    lines.append(dict(event="end", step=None, seconds=9, loss=2.9, status="stopped"))  # by a signal; then it went on
    return [*lines, dict(event="end", step=steps, seconds=320, loss=1.1742, status="done")]


class Page(HTMLParser):
    """The parsed report: tags, visible text, text by class, and whether every tag was closed."""

    def __init__(self, source):
        super().__init__()
        self.source, self.tags, self.open, self.texts, self.blocks = source, [], [], [], {}
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "!doctype"):
            self.open.append((tag, dict(attributes).get("class")))
            self.blocks.setdefault(self.open[-1], []).append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] not in ("script", "style"):
            self.texts.append(data)
            for block in self.open:
                self.blocks[block][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def of(self, tag, kind=None):
        return self.blocks.get((tag, kind), [])

    def figure(self, label):
        """The value and the note of a key figure."""
        return next(text.removeprefix(label) for text in self.of("div") if text.startswith(label))

    def curves(self):
        return [attributes["d"] for tag, attributes in self.tags if tag == "path"]


def report(folder, lines, run=RUN):
    if run is not None:
        (folder / "run.json").write_text(run if isinstance(run, str) else json.dumps(run))
    text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    path = write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob(".*"))
    page = Page(path.read_text())
    allowed = (
        "html head meta title style body header h1 p span dl div dt dd small figure figcaption h3 output svg rect line"
    )
    allowed += " text path circle h2 article details summary section table tr th td script pre"
    assert {tag for tag, _ in page.tags} <= set(allowed.split())
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [a for _, a in page.tags for name in a if name.startswith("on") or name in ("src", "href", "style")]
    assert "NaN" not in page.source and "nan" not in "".join(page.curves()) and "inf" not in "".join(page.curves())
    return page


def test_a_whole_run(tmp_path):
    page = report(tmp_path, realistic())
    assert page.of("title") == ["smollm2-135m: held-out loss 1.3000 → 1.2000"] == page.of("h1")
    assert "done · held-out answers as wanted: 1 → 2 of 2 · 135M parameters · started 2025" in page.text
    assert page.figure("Last step's loss").startswith("1.1742from 2.")
    assert page.figure("Held-out loss") == "1.2000perplexity 3.3201"
    assert page.figure("Steps") == "300epoch 3" and page.figure("Examples") == "2,400"
    assert page.figure("Tokens") == "300,000" and page.figure("Tokens per second").startswith("2,000")
    assert page.figure("Time") == "5m 18s2m 30s in steps" and page.figure("Peak memory") == "2.00 GiB"
    assert not [text for text in page.of("div") if text.startswith("MFU")]
    cells = dict(zip(page.of("th"), page.of("td"), strict=True))
    assert cells["rows_read"] == "52,002" and cells["dropped.empty"] == "28" and cells["git_commit"] == "4f1c2aa"
    assert cells["lr"] == "2e-05" and cells["max_steps"] == "-" and cells["packing"] == "yes" and cells[EVIL] == EVIL
    assert cells["step 7"] == f"skipped: {EVIL}" and cells["step 9"] == f"saved {EVIL}, 5 GB, 1.0 s"
    assert "step 50  " in page.source and "eval 1.3000" in page.source and "eval 3.3201" not in page.source
    raw, smooth, evals, *small = page.curves()
    assert len(re.findall("[ML]", raw)) == len(re.findall("[ML]", smooth)) == 300 and raw != smooth
    assert len(re.findall("[ML]", evals)) == 6 == sum(a.get("class") == "eval" for t, a in page.tags if t == "circle")
    assert len(small) == 4  # learning rate, norm, throughput and its mean


def test_samples_stand_side_by_side(tmp_path):
    page = report(tmp_path, realistic())
    prompts = [text.removeprefix("Prompt") for text in page.of("div", "prompt")]
    answers = ["q0", f"Wanted{EVIL}", "q1", f"Wanted{EVIL}"]
    assert prompts == [*answers, *(p + EVIL for p in "zbc")]  # in the order of the run
    befores, afters = page.of("div", "before"), page.of("div", "after")
    assert befores == [
        *(f"Before traininga{i} at 0" for i in range(2)),
        *(f"Before training{p} at 0 {EVIL}" for p in "zbc"),
    ]
    assert afters[:2] == [f"After step 300a{i} at 300" for i in range(2)]
    assert afters[2:] == [f"After step 300{p} at 300 {EVIL}" for p in "zbc"]
    assert len(page.of("details")) == 3 and f"Step 150z at 150 {EVIL}" in page.of("details")[0]


def test_the_first_answer_of_a_later_step_is_not_from_before_training(tmp_path):
    page = report(tmp_path, [train(1), *(dict(event="sample", step=s, prompt="p", text=f"t{s}") for s in (50, 100))])
    assert page.of("div", "before") == ["Before trainingno sample"]
    assert page.of("div", "after") == ["After step 100t100"] and "Step 50t50" in page.of("details")[0]


def test_the_utilization_is_the_mean_of_the_steps_that_have_one(tmp_path):
    page = report(tmp_path, [train(1, mfu=0.2), train(2), train(3, mfu=0.3), train(4, mfu=0.7)])
    assert page.figure("MFU").startswith("40.0%")


def test_of_many_events_the_last_50_are_told(tmp_path):
    saves = [dict(event="save", step=step, path=f"step-{step}") for step in range(1, 61)]
    assert [name for name in report(tmp_path, saves).of("th") if name.startswith("step ")] == [
        f"step {step}" for step in range(11, 61)
    ]


def test_settings_that_differ_come_first_and_commands_can_be_copied(tmp_path):
    run = RUN | {"changed": ["data", "evil"], "command": f"python -m x '{EVIL}'", "use": {"ask it": "python -m y"}}
    page = report(tmp_path, realistic(), run)
    assert page.of("pre") == [f"python -m x '{EVIL}'", "python -m y"]
    changed, others = "differ from the defaults data a.json evil", "3 settings as they are by default lr 2e-05"
    assert 0 < page.text.index(changed) < page.text.index(others)
    stopped = report(tmp_path, [*realistic()[:-1], dict(event="end", status="stopped")], run)
    assert stopped.of("pre") == [f"python -m x '{EVIL}'"]  # there is no model to use


def test_without_held_out_rows_the_headline_is_the_train_loss_of_both_ends(tmp_path):
    lines = [train(step, loss=3.0 if step <= 10 else 1.0 if step > 30 else 9.0) for step in range(1, 41)]
    assert report(tmp_path, lines).of("h1") == ["smollm2-135m: train loss 3.0000 → 1.0000 (means of 10 steps)"]
    assert report(tmp_path, [train(1, loss=2.5)]).of("h1") == ["smollm2-135m: train loss 2.5000"]


def test_the_page_is_a_function_of_the_run(tmp_path):
    first = report(tmp_path, realistic()).source
    assert write_report(tmp_path).read_text() == first


def test_the_policy_lets_in_this_page_s_own_blocks_alone(tmp_path):
    page = report(tmp_path, realistic())
    (policy,) = (a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"https?:|url\(|@import", page.source)


def test_no_eval_no_samples(tmp_path):
    page = report(tmp_path, [train(step) for step in range(1, 31)])
    assert "Samples" not in page.text and "Held-out loss" not in page.text and "eval" not in page.of("figcaption")[0]


def test_without_an_end_it_says_so(tmp_path):
    assert report(tmp_path, realistic()[:-2]).of("span", "open") == ["in progress or interrupted"]
    assert report(tmp_path, realistic()[:-1]).of("span", "open") == ["stopped"]
    assert report(tmp_path, realistic()).of("span", "open") == []


def test_before_the_first_step(tmp_path):
    page = report(tmp_path, [dict(event="sample", step=0, prompt="p", text="t")])
    assert page.of("title") == ["smollm2-135m: no loss yet"] and page.curves() == [] and page.text.count("no data") == 4
    assert page.of("div", "before") == ["Before trainingt"] and page.of("div", "after") == ["After trainingno sample"]


def test_one_step(tmp_path):
    page = report(tmp_path, [train(1, loss=2.5)])
    circles = [a for t, a in page.tags if t == "circle"]
    assert len(circles) == 4 and all(a["cx"] == "50.00%" for a in circles)
    assert page.figure("Last step's loss").startswith("2.5000")


def test_losses_that_are_no_number(tmp_path):
    lines = [train(s, loss=None if s in (3, 4, 6) or s > 28 else 2.0 + s, grad_norm=None) for s in range(1, 31)]
    text = "".join(json.dumps(line) + "\n" for line in lines).replace('"grad_norm": null', '"grad_norm": NaN')
    page = report(tmp_path, text)
    raw = page.curves()[0]
    assert raw.count("M") == 3 and len(re.findall("[ML]", raw)) == 25  # gaps at 3-4 and at 6, none told as a number
    assert "5 of 30 steps have no finite loss." in page.text and page.text.count("no data") == 1
    assert page.figure("Last step's loss").startswith("30.0000from 3.0000")
    page = report(tmp_path, [train(1, loss=None), train(2, loss=None)])
    assert "no loss yet" in page.of("title")[0] and "2 of 2 steps" in page.text


def test_ten_thousand_steps(tmp_path):
    lines = [train(step, loss=9.5 if step == 4333 else 1 + random.random()) for step in range(1, 10001)]
    lines += [dict(event="eval", step=s, loss=1.3, perplexity=3) for s in range(10, 10001, 10)]
    long = "<&'" * 20000
    for prompt in range(30):
        lines += [dict(event="sample", step=s, prompt=f"{prompt} {long}", text=long) for s in range(0, 10001, 1000)]
    page = report(tmp_path, lines)
    assert len(page.source.encode()) < 1_000_000
    raw = page.curves()[0]
    heights = [float(y) for y in re.findall(r" ([\d.]+)", raw)]
    assert 500 < len(heights) <= 1000
    assert min(heights) < 60 and sorted(heights)[1] > 700  # the one spike is still there
    assert "more prompts are in metrics.jsonl" in page.text and "characters more)" in page.text


def test_a_loss_that_falls_far_gets_a_log_axis(tmp_path):
    page = report(tmp_path, [train(s, loss=10 * 0.98**s) for s in range(1, 301)])
    assert "log scale" in page.of("figcaption")[0] and "log scale" not in page.of("figcaption")[1]
    points = [tuple(map(float, p.split())) for p in re.split("[ML]", page.curves()[0])[1:]]
    assert points[150][1] == pytest.approx((points[0][1] + points[-1][1]) / 2, abs=5)  # a straight line
    labels = [float(text) for text in page.of("text") if re.fullmatch(r"[\d.e-]+", text)]
    assert {0.1, 1, 10} <= set(labels)


@pytest.mark.parametrize("values", [[0, 0], [1, 1], [-1, 2], [1e-9, 1e9], [5, 5 + 1e-15], [1e300, 1], [3e-320, 1e-310]])
def test_odd_ranges_stay_inside_the_chart(tmp_path, values):
    lines = [train(s, loss=v, lr=v, grad_norm=v, tokens_per_second=v) for s, v in enumerate(values, 10**9)]
    page = report(tmp_path, lines)
    numbers = [float(n) for d in page.curves() for n in re.findall(r"-?[\d.]+", d)]
    assert len(numbers) == 16 and all(-0.1 <= n <= 1000.1 for n in numbers)


def test_what_is_missing_or_broken_is_left_out(tmp_path):
    for run in (None, "{", "[]", {}, {"model": None, "config": [1], "data": "x"}, {"model": {"name": EVIL}}):
        page = report(tmp_path, [dict(event="train", step=1), {"event": "train", "loss": "x", "step": "y"}], run)
        assert page.of("h1")[0].endswith(": no loss yet")
    torn = (
        json.dumps(train(1, loss=2.0)) + '\n[1]\n"x"\n{"event": ["x"]}\n{"event": "new"}\nno\n\n{"event": "train", "st'
    )
    assert report(tmp_path, torn).figure("Steps").startswith("1epoch")
    (tmp_path / "metrics.jsonl").unlink()
    assert "no loss yet" in write_report(tmp_path).read_text()


def test_a_step_told_twice_counts_once(tmp_path):
    page = report(tmp_path, [train(2, loss=5.0), train(2, loss=3.0), train(1, loss=4.0)])
    assert page.figure("Last step's loss").startswith("3.0000from 4.0000") and page.figure("Tokens") == "2,000"


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not binary:
        pytest.skip("no chromium on PATH")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += (
        " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --window-size=1000,900 --dump-dom"
    )

    def dump(path):
        folder = tmp_path_factory.mktemp("profile")
        command = [binary, *flags.split(), f"--user-data-dir={folder}", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return dump


def test_in_a_browser(tmp_path, chromium):
    report(tmp_path, realistic())
    dom, console = chromium(tmp_path / "report.html")
    assert console == [] and "<title>smollm2-135m: held-out loss 1.3000 → 1.2000</title>" in dom
    curves = re.findall(r'<path class="\w+" d="([^"]*)"', dom)
    assert len(curves) == 7 and all(len(re.findall("[ML]", curve)) >= 6 for curve in curves)


def test_hover_reads_out_the_nearest_step(tmp_path, chromium):
    report(tmp_path, [train(s, loss=float(s), lr=0.0) for s in range(1, 12)])
    source = (tmp_path / "report.html").read_text()
    point = """<script>const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * 0.52, clientY: box.top}));
        console.error("wide " + (document.documentElement.scrollWidth > innerWidth))</script></body>"""
    source = re.sub(r"<meta http-equiv[^>]*>", "", source).replace("</body>", point)
    (tmp_path / "hover.html").write_text(source)
    dom, console = chromium(tmp_path / "hover.html")
    assert "<output>step 6  train 6.0000</output>" in dom
    assert len(console) == 1 and "wide false" in console[0]  # console lines are seen, and nothing sticks out sideways


def test_the_policy_stops_what_escaping_would_miss(tmp_path, chromium):
    report(tmp_path, realistic())
    source = (tmp_path / "report.html").read_text()
    (tmp_path / "evil.html").write_text(source.replace("<h1>", "<script>document.title='owned'</script><h1>"))
    dom, console = chromium(tmp_path / "evil.html")
    assert "<title>smollm2-135m" in dom and "<title>owned" not in dom
    assert any("Content Security Policy" in line for line in console)


def test_of_one_step_all_that_was_skipped_is_told_and_of_one_thing_the_last_word(tmp_path):
    skips = [("non-finite", 1), ("the state could not be saved", 2), ("non-finite", 3)]
    lines = [{"event": "skip", "step": 4, "reason": reason, "n": n} for reason, n in skips]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_events(tmp_path / "metrics.jsonl")["skip"]
    assert sorted((line["reason"], line["n"]) for line in found) == [skips[2], skips[1]]


@pytest.mark.parametrize(("computed", "note"), [(600, "effective; 1,200 of them computed"), (1000, "mean over the")])
def test_the_pace_tells_what_was_computed_where_that_was_less(computed, note):
    line = train(1, computed_tokens=computed)
    figures = render_key_figures({}, [line], [], {}, 1.0)
    assert "<dd>2,000<small>" in figures and f"<dd>2,000<small>{note}" in figures


@pytest.mark.parametrize(("n_bytes", "shown"), [(1, 1), (2500, 2), (10**6, 5)])
def test_prompts_that_no_longer_fit_the_page_are_counted(n_bytes, shown, monkeypatch):
    """The first one is shown whatever its size."""
    monkeypatch.setattr("engine.output.report.SAMPLES_BYTES", n_bytes)
    lines = [{"event": "sample", "step": 1, "prompt": f"p{i}", "text": "x" * 800} for i in range(5)]
    page = render_samples("Samples", lines)
    assert page.count("<article>") == shown
    assert re.findall(r"(\d+) more prompts are in", page) == ([str(5 - shown)] if shown < 5 else [])


@pytest.mark.parametrize("steps", [[0], [5], [0, 5], [5, 9], [0, 3, 6, 9]])
def test_an_answer_is_told_as_of_before_training_or_of_its_step(steps):
    """Of a run that was asked once alone too."""
    lines = [{"event": "sample", "step": step, "prompt": "p", "text": f"at {step}"} for step in steps]
    page = render_samples("Samples", lines)
    label = r'<span class="label">([^<]*)</span>(?:<div class="text">|<p class="note">)([^<]*)<'
    told = dict(re.findall(label, page))
    between = {f"Step {step}": f"at {step}" for step in steps[steps[0] == 0 : -1]}
    after = {f"After step {steps[-1]}": f"at {steps[-1]}"} if steps[-1] else {"After training": "no sample"}
    before = {"Before training": "at 0" if steps[0] == 0 else "no sample"}
    assert told == {"Prompt": "p"} | before | after | between


def show_page(page):
    """Return a page with a tag a line, without its style, its script and the hashes that let them in."""
    text = re.sub(r"(?s)<(style|script)>.*?</\1>", r"<\1>", page.source)
    text = re.sub(r"sha256-[\w+/=]+", "sha256", text).replace(EVIL_HTML, "EVIL")
    return re.sub(r">\s*<", ">\n<", text)


EVIL_HTML = html.escape(EVIL)


def test_all_of_a_short_runs_page(tmp_path, snapshot):
    lines = [
        train(step, loss=4.0 / step if step != 3 else None, mfu=0.25 if step > 1 else None, lr=step * 1e-5)
        for step in range(1, 5)
    ]
    lines += [dict(event="eval", step=step, loss=2.0 - step / 8, perplexity=math.exp(2)) for step in (0, 2, 4)]
    lines += [
        dict(event="sample", step=step, prompt=prompt, text=f"{prompt} {step}")
        for step in range(20) for prompt in ("p", "q") if prompt == "p" or step == 3
    ]  # fmt: skip
    lines += [
        dict(event="answer", step=step, prompt="ask", wanted="w", text=f"a{step}", equal=False) for step in (0, 4)
    ]
    lines += [dict(event="score", step=step, equal=step // 4, answers=2, overlap=0.5) for step in (0, 4)]
    lines += [
        dict(event="skip", step=2, reason="non-finite"),
        dict(event="save", step=2, path="checkpoint-2", seconds=1, bytes=5e9),
        dict(event="spike", step=3, loss=9.5, median=2.25, deviation=0.1, back_to=None),
        dict(event="spike", step=4, loss=9.5, median=2.25, deviation=0.1, back_to=2),
        dict(event="end", step=4, seconds=3725.0, status="done"),
    ]  # fmt: skip
    use = {"ask it": "python -m x --prompt 'a b'", "talk to it": "python -m y"}
    run = {
        **RUN,
        "changed": ["lr"],
        "use": use,
        "command": "python -m z",
        "config": {"lr": 2e-5, "n": {"a": [1, 2], "b": None}},
    }
    del run["seconds"]
    page = show_page(report(tmp_path, lines, run))
    parts = page.partition("<h2>Held-out answers")
    assert parts[0] == snapshot(name="charts")
    assert parts[1] + parts[2] == snapshot(name="rest")
