"""The page about a dataset: its figures are those of the data, odd files do no harm, no text is ever markup."""

import base64
import gzip
import hashlib
import itertools
import json
import math
import re
import statistics
from collections import Counter
from html import unescape
from types import SimpleNamespace

import pytest

from data_gen.base.cli import DataError, UsageError, run_for_exit_code
from data_gen.page.report import render_state, write_report
from data_gen.page.row_files import read_any_rows, read_turns
from data_gen.report import main
from data_gen.rows.tokens import tokenize
from tests.helpers.own_rows import alpaca_rows
from tests.helpers.report_page import EVIL, Page, arcs, bars, body_lines, make, plain, report


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    rows, lost, run = make()
    return rows, lost, run, report(tmp_path_factory.mktemp("whole"), rows, lost, run)


@pytest.mark.parametrize("n", [12, 36])
def test_the_page_is_kept_whole(n, tmp_path, snapshot):
    rows, lost, run = make(n, seed=n)
    assert body_lines(report(tmp_path, rows, lost if n > 12 else None, run if n > 12 else None).source) == snapshot


# ---- the figures are those of the data ------------------------------------------------------------------------------


def test_key_figures_are_those_of_the_data(whole):
    rows, lost, _, page = whole
    inputs = [row["input"] for row in rows if row["input"]]
    assert f"<title>dataset.jsonl: {len(rows)} rows</title>" in page.source
    state = "· done · started 2025-03-01 10:00 UTC · took 1h 27m"
    assert f"{state} · gpt-5.4-mini · gpt-5.4 · gpt-4.1 " in page.text.replace("Contents", " "), page.text[:400]
    assert "gpt-4.1 · gpt-4o" not in page.text
    assert page.figure("Rows") == str(len(rows))
    assert page.figure("With input") == f"{100 * len(inputs) / len(rows):.1f}%|{len(inputs)}"
    for label, texts in (
        ("instruction", [row["instruction"] for row in rows]),
        ("input", inputs),
        ("output", [row["output"] for row in rows]),
    ):
        median = statistics.median(len(tokenize(text)) for text in texts)
        assert page.figure(f"Median {label}").split("|")[0] == f"{median:g} words"
    items = len(rows) + len(lost)
    assert page.figure("Yield") == f"{100 * len(rows) / items:.1f}%|{len(rows)} of {items} items kept"
    requests = 3 + max(row["provenance"]["request"] for row in rows)
    assert page.figure("Requests") == f"{requests}|2 failed" and page.figure("Spent") == "$3.21|and $0.01 uncertain"
    assert page.figure("Per 1,000 rows") == f"${1000 * 3.21 / len(rows):.2f}"


def test_rejections_and_their_examples(whole):
    _, lost, run, page = whole
    html = page.section("rejections")
    reasons, repaired = html.split("Repaired and kept")
    counts, shares = bars(reasons)
    assert counts == run["counts"]["rejected"] and list(counts.values()) == sorted(counts.values(), reverse=True)
    assert shares["duplicate"] == f"{100 * counts['duplicate'] / len(lost):.1f}%"
    assert bars(repaired)[0] == {"marker removed": 17, "number removed": 4} and f"{len(lost)} rejections" in reasons
    assert "run.json counts" not in reasons and "could not be read" not in reasons
    widths = [float(width) for width in re.findall(r'<rect class="bar" width="([\d.]+)%"', reasons)]
    assert widths == [pytest.approx(100 * n / max(counts.values()), abs=0.3) for n in counts.values()]
    for reason, part in re.findall(r'<span class="name">([^<]*)</span>(.*?)</details>', reasons, re.DOTALL):
        shown = [plain(label).split(" · ") for label in re.findall(r'<span class="label">([^<]* · [^<]*)</span>', part)]
        of = {(f"request {x['request']}", f"item {x['item']}"): x for x in lost if x["reason"] == reason}
        assert len(shown) == part.count("<article>") == min(3, counts[reason])
        for words in shown:
            line = of[words[1], words[2]]
            assert f'<div class="text">{line["detail"]}</div>' in part
            assert words[0] == ("instruction" if "instruction" in line else "no instruction")
            assert ("similarity" in line) == (len(words) == 4) == (line.get("duplicate_of", "no such text") in part)


def test_histograms_of_lengths_count_every_row(whole):
    rows, _, _, page = whole
    for title, key in (("Instruction", "instruction"), ("Input", "input"), ("Output", "output")):
        found = sorted(len(tokenize(row[key])) for row in rows if key != "input" or row[key])
        bins = page.chart(title)
        assert sum(n for _, n in bins) == len(found) and sum(n > 0 for _, n in bins) > 4
        for tip, n in bins:
            first, last = (
                int(x)
                for x in re.match(r"(\d+)(?:\u2013(\d+))? words", tip.replace(",", "")).groups(default=tip.split()[0])
            )
            assert n == sum(first <= value <= last for value in found)
        part = page.section("lengths").split(f"<h3>{title}</h3>")[1].split("</figure>")[0]
        high = next(v for v in found if sum(x <= v for x in found) >= 0.95 * len(found))
        assert f">median {statistics.median(found):g}<" in part and f">95% up to {high}<" in part
        assert f"longest {found[-1]:,} words" in part and ("log scale" in part) == (
            found[-1] > 6 * statistics.median(found)
        )
    assert (
        "log scale" in page.section("lengths") and f"{sum(not row['input'] for row in rows)} rows without" in page.text
    )


def test_rows_without_words_count_in_the_median_alone(tmp_path):
    page = report(
        tmp_path, [{"instruction": "Say it now.", "output": "! !"}] * 3 + [{"instruction": "Go on.", "output": "a b"}]
    )
    assert (
        page.figure("Median output") == "0 words" and ">median 0<" in page.source and "3 rows of no words" in page.text
    )
    assert sum(n for _, n in page.chart("Output")) == 1 and page.figure("Median input").startswith("-")


def test_a_long_tail_is_drawn_to_the_logarithm(tmp_path):
    rows = [{"instruction": "word " * k, "output": "x"} for k in (1, 2, 3, 3, 4, 7, 60)]
    part = report(tmp_path, rows).source.split("<h3>Instruction</h3>")[1].split("</figure>")[0]
    left = [float(x) for x in re.findall(r'<rect class="hit" x="([\d.]+)%"', part)]
    first = [int(x) for x in re.findall(r"<title>(\d+)", part)]
    scale = left[3] / math.log(first[3])
    assert left == [pytest.approx(scale * math.log(x), abs=0.01) for x in first] and len(first) > 8
    marked = re.search(r'<line class="quantile" x1="([\d.]+)%"', part)[1]
    assert float(marked) == pytest.approx(scale * math.log(3.5), abs=0.01)  # amid what is 3


def test_sunburst_counts_verbs_and_objects(whole):
    rows, _, _, page = whole
    pairs = Counter(
        tuple(w.lower() for w in re.match(r"(\w+) a short (\w+)", row["instruction"]).groups()) for row in rows
    )
    expected = {}
    for verb in {verb for verb, _ in pairs}:
        of = sorted(((n, noun) for (v, noun), n in pairs.items() if v == verb), key=lambda x: (-x[0], x[1]))[:4]
        expected |= {(verb, noun): n for n, noun in of} | {(verb, None): sum(n for n, _ in of)}
    assert arcs(page) == expected
    drawn = sum(n for (_, noun), n in expected.items() if noun)
    assert f"{drawn} rows, {100 * drawn / len(rows):.1f}% of the dataset" in page.text and "heuristic" in page.text
    assert f"found in {len(rows)} of {len(rows)} instructions; {len(rows)} have a verb" in page.text
    table = dict(re.findall(r'<tr><th>(\w+)</th><td class="n">(\d+)</td>', page.section("content")))
    assert {verb: int(n) for verb, n in table.items()} == Counter(verb for verb, _ in pairs.elements())


def test_arcs_are_as_wide_as_their_counts(whole):
    page, sweeps = whole[3], {}
    for d, tip in re.findall(r'<path class="\w+" d="([^"]*)"><title>(.*?)</title>', page.source):
        (x0, y0), (x1, y1) = ([float(v) - 360 for v in re.findall(r"[\d.]+", d)[i : i + 2]] for i in (2, 9))
        sweeps[tip.split(":")[0]] = (math.atan2(x1, -y1) - math.atan2(x0, -y0)) % (2 * math.pi)
    counts = {verb if noun is None else f"{verb} … {noun}": n for (verb, noun), n in arcs(page).items()}
    total = sum(n for name, n in counts.items() if "…" not in name)
    assert sweeps == {name: pytest.approx(6.28319 * n / total, abs=0.01) for name, n in counts.items()}


def test_a_single_verb_fills_the_ring(tmp_path):
    page = report(tmp_path, [{"instruction": "Write a poem.", "input": "", "output": "x"}] * 3)
    assert arcs(page) == {("write", None): 3, ("write", "poem"): 3} and "A352 352 0 1 1" in page.source
    ends = re.findall(r'd="M([\d.]+ [\d.]+)L[\d.]+ [\d.]+A.*?L([\d.]+ [\d.]+)A', page.source)
    assert len(ends) == 2 and all(start != end for start, end in ends)  # an arc between equal points is not drawn


def test_similarities_and_what_attracted_duplicates(whole):
    _, lost, _, page = whole
    like = [line["similarity"] for line in lost if "similarity" in line]
    bins = page.chart("Rejected duplicates")
    assert sum(n for _, n in bins) == len(like) > 30 and len(bins) == 15
    first = sum(value < 0.72 for value in like)
    assert bins[0] == (f"0.70\u20130.72 similarity: {first} row{'s' * (first != 1)}", first)
    expected = Counter(line["duplicate_of"] for line in lost if "duplicate_of" in line)
    html = page.section("duplicates").split("Most imitated")[1].split("Closest pairs")[0]
    assert bars(html)[0] == dict(expected) and list(bars(html)[0].values()) == sorted(expected.values(), reverse=True)


def test_kinds_and_languages_are_counted(tmp_path):
    outputs = [
        "42",
        "-3.5%",
        "yes",
        "yes",
        "a b",
        "- a\n- b",
        "1. a\n2. b\n\nc",
        "```\nx\n```",
        "| a | b |\n| c | d |",
        "",
        "- a",
    ]
    rows = [{"instruction": "What is the weather like in the city today?", "input": "", "output": o} for o in outputs]
    rows += [
        {"instruction": "Schreibe einen kurzen Text über das Wetter und die Stadt.", "output": f"nein {i}"}
        for i in range(2)
    ]
    rows += [
        {"instruction": "请写一个关于天气的故事。", "output": "好的, 一个"},
        {"instruction": "???", "output": "! !"},
    ]
    page = report(tmp_path, rows, name="d.json")
    kinds, languages = page.section("content").split("<h3>Languages</h3>")
    assert bars(kinds)[0] == {
        "asked as a question": 12, "output seen in another row": 2, "output of one word": 4, "output with a list": 2,
        "output of one number": 2, "output with code (```)": 1, "output with a table": 1, "output of paragraphs": 1,
        "output empty": 1,
    }  # fmt: skip
    assert bars(languages)[0] == {"English": 11, "German": 2, "Chinese": 1, "undetermined": 1}
    assert "none found. 3 rows in other languages are left out." in page.text


def test_yield_over_the_run(whole, tmp_path, monkeypatch):
    rows, lost, run, _ = whole
    monkeypatch.setattr("data_gen.page.sections.STRETCHES", 10)
    page = report(tmp_path, rows, lost, run)
    tips = page.chart("Rows per request")
    numbers = [[int(n) for n in re.findall(r"(\d+) (?:kept,|duplicates|rejected)", tip)] for tip, _ in tips]
    same = sum("similarity" in line for line in lost)
    assert [sum(column) for column in zip(*numbers, strict=True)] == [len(rows), same, len(lost) - same]
    first, last = (int(n) for n in re.match(r"requests (\d+) to (\d+)", tips[2][0]).groups())
    assert numbers[2][0] == sum(first <= row["provenance"]["request"] <= last for row in rows)
    stretches = [[int(n) for n in re.match(r"requests (\d+) to (\d+)", tip).groups()] for tip, _ in tips]
    assert stretches[0][0] == 0 and stretches[-1][1] == max(row["provenance"]["request"] for row in rows)
    assert all(end + 1 == begin for (_, end), (begin, _) in itertools.pairwise(stretches))
    assert len(tips) <= 10 and last - first > 1 and page.source.count('<path class="curve') == 2
    top = max(float(v) for v in re.findall(r'dy=".35em" text-anchor="end">(\d+)<', page.section("yield")))
    (d,) = re.findall(r'<path class="curve " d="([^"]*)"', page.source)
    heights = [top * (1 - float(y) / 1000) for y in re.findall(r" ([\d.]+)", d)]
    assert heights[2] == pytest.approx(numbers[2][0] / (last - first + 1), abs=0.01 * top)
    page = report(tmp_path, [*rows, {"instruction": "Do.", "output": "x"}])
    assert page.source.count('<path class="curve') == 1 and "1 row without a request number left out." in page.text


def test_costs_are_those_of_the_run(whole, tmp_path):
    rows, _, run, page = whole
    table = page.table()
    assert table["spent"] == "$3.21" and table["uncertain"] == "$0.01" and table["cap"] == "$5.00"
    assert table["per 1,000 rows kept"] == f"${3210 / len(rows):.2f}" and table["input tokens"] == "345,678"
    assert table["output tokens"] == "2,345,678" and table["input price"] == "$0.40 per million tokens"
    assert table["output price"] == "$1.60 per million tokens" and table["batch prices"] == "no"
    assert float(table["per request"][1:]) == pytest.approx(3.21 / run["counts"]["requests"], rel=0.05)
    assert bars(page.section("cost"))[0] == run["models"] and len(run["models"]) == 4
    page = report(tmp_path, rows)
    spent = sum(row["provenance"]["usd"] for row in rows)
    assert len({row["provenance"]["usd"] for row in rows}) > 5
    assert page.figure("Spent") == f"${spent:.2f}|sum over the rows kept" and page.figure("Requests") is None
    assert page.figure("Per 1,000 rows") == f"${1000 * spent / len(rows):.2f}" and page.figure("Yield") is None


def test_blank_inputs_are_none_and_a_run_without_a_cost_spent_nothing(tmp_path):
    rows = [{"instruction": "Say it.", "input": text, "output": "Sí, claro, hombre."} for text in ("a b", " ", "")]
    page = report(tmp_path, rows, None, {"cost": {"spent_usd": 0}, "counts": {"kept": 3}})
    assert page.figure("With input") == "33.3%|1" and page.figure("Median input").startswith("2 words")
    assert page.figure("Spent") == "$0.00" and page.figure("Per 1,000 rows") == "$0.00"


def test_a_language_is_guessed_of_the_whole_row_where_the_instruction_is_too_short(tmp_path):
    given = "Il faut que nous partions maintenant parce que la nuit tombe et que les enfants ont faim."
    page = report(tmp_path, [{"instruction": "1 + 1 = ?", "input": given, "output": "2"}])
    assert "French" in page.section("content")


def test_sample_shows_rows_whole(tmp_path):
    rows = make()[0]
    rows[0]["output"] = "word " * 500
    page = report(tmp_path, rows)
    numbers = [int(n) - 1 for n in re.findall(r'<span class="label">row (\d+)</span>', page.section("sample"))]
    assert len(numbers) == 30 and numbers == sorted(set(numbers)) and numbers[-1] > 300
    for at, card in zip(numbers, page.section("sample").split("<article>")[1:], strict=True):
        texts = [unescape(text) for text in re.findall(r'<div class="text">(.*?)</div>', card, re.DOTALL)]
        row = rows[at]
        wanted = [row[key] for key in ("instruction", "input", "output") if row[key]]
        assert card.count('<span class="label">input</span>') == bool(row["input"])
        assert " ".join(" ".join(texts).split()) == " ".join(" ".join(wanted).split())
    page = report(tmp_path, rows[:1])
    assert "All rows." in page.text and re.search(r"<summary>1,9\d\d characters more</summary>", page.source)


def test_settings_and_versions_are_tables(whole):
    table = whole[3].table()
    assert table["model"] == "gpt-5.4" and table["batch"] == "no" and table["seed-tasks"] == "-"
    assert table["openai"] == "3.1.0"


# ---- hostile, odd and missing ---------------------------------------------------------------------------------------


def hostile():
    rows, lost, run = make(60)
    for row in rows:
        row |= {"instruction": f"Write a poem {EVIL}", "input": EVIL, "output": EVIL * 20}
        row["provenance"]["model"] = EVIL
    for line in lost:
        line |= {"reason": line["reason"] + EVIL, "detail": EVIL, "instruction": EVIL, "input": EVIL, "output": EVIL}
        line |= {"duplicate_of": EVIL, "similarity": 0.9, "item": EVIL}
    run |= {
        "status": EVIL,
        "started": EVIL,
        "settings": {EVIL: EVIL, "list": [EVIL]},
        "models": {EVIL: 5},
        "versions": {EVIL: EVIL},
    }
    run["counts"] |= {"repaired": {EVIL: 4}, "rejected": {EVIL: 2}}
    return rows, lost, run


def test_texts_are_never_markup(tmp_path):
    rows, lost, run = hostile()
    page = report(tmp_path, rows, lost, run, name=f"d{EVIL.replace('/', '')[:60]}.jsonl")
    assert page.text.count("document.title='owned'") > 100
    assert page.table()[EVIL] == EVIL and "<script>document" not in page.source and "<img" not in page.source


def test_texts_that_utf_8_cannot_hold(tmp_path):
    rows = [{"instruction": "Write \ud800 \x00 \u202e a poem", "input": "\ud800", "output": "\udfff ok"}]
    assert "ok" in report(tmp_path, rows, [{"reason": "\ud800", "instruction": "\ud800"}]).text


ODD = [None, "x", 3, -1, True, [], ["x"], {}, {"x": "y"}, float("nan"), float("inf"), 10**400, 1e308, ""]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: str(odd)[:8])
def test_odd_parts_never_crash(tmp_path, odd):
    rows, lost, run = make(40)
    report(tmp_path, rows, lost, odd if odd == odd and not isinstance(odd, str) else {})
    for part in run:
        report(tmp_path, rows, None, run | {part: odd})
    counts = {key: odd for key in run["counts"]}
    report(tmp_path, rows, None, run | {"counts": counts, "cost": {key: odd for key in run["cost"]}})
    inner = {"repaired": {"x": odd}, "rejected": {"x": odd}}
    report(tmp_path, rows, None, run | {"counts": run["counts"] | inner, "models": {"m": odd}, "settings": {"s": odd}})
    broken = [{key: odd for key in line} for line in lost[:3]]
    broken += [lost[5] | {key: odd} for key in ("request", "reason", "similarity", "duplicate_of", "instruction")]
    report(tmp_path, rows, broken, run)
    rows = [
        {key: odd for key in rows[0]},
        rows[1] | {"provenance": {key: odd for key in rows[1]["provenance"]}},
        {"instruction": odd},
    ]
    report(tmp_path, rows, lost, run)


def test_torn_and_missing_files(tmp_path):
    rows, lost, run = make(60)
    text = "".join(json.dumps(line) + "\n" for line in lost[:9]) + '[1]\nnull\n\n{"reason": "du'
    page = report(tmp_path, rows, text, "{")
    assert bars(page.section("rejections"))[0] == Counter(line["reason"] for line in lost[:9])
    assert "3 lines of rejected.jsonl could not be read" in page.text and not page.section("settings")
    assert page.figure("Yield") == f"{100 * len(rows) / (len(rows) + 9):.1f}%|{len(rows)} of {len(rows) + 9} items kept"
    page = report(tmp_path, rows, None, run)  # without rejected.jsonl the counts of run.json
    assert bars(page.section("rejections").split("Repaired")[0])[0] == run["counts"]["rejected"]
    assert "<details><summary>" not in page.section("rejections")
    page = report(tmp_path, rows, lost[:-1], run)
    assert f"{len(lost) - 1} rejections" in page.text and f"run.json counts {len(lost)}." in page.text
    run["counts"]["kept"] = 7
    assert (
        page.figure("Rows") == str(len(rows))
        and report(tmp_path, rows, lost, run).figure("Rows") == f"{len(rows)}|run.json counts 7"
    )


def test_a_run_of_another_kind_is_left_alone(tmp_path):
    run = {"status": "done", "started": "2025", "config": {"lr": 1}, "model": {"name": "x"}}
    page = report(tmp_path, make(30)[0], None, run)
    assert "done" not in page.text and "2025" not in page.text and not page.section("settings")


@pytest.mark.parametrize("content", [b"", b'{"counts": {', b"[1]", b'{"a": "\xff"}', b"[" * 100_000])
def test_a_damaged_run_is_named(tmp_path, capsys, content):
    """A page without the run's costs and rejections would else look like that of a dataset without a run."""
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "d.jsonl").write_text('{"instruction": "Write.", "output": "x"}\n')
    assert run_for_exit_code(main, [str(tmp_path / "d.jsonl")]) == 0
    assert "run.json is damaged and left out: " in capsys.readouterr().err
    assert "run.json is damaged and left out" in Page((tmp_path / "report.html").read_text()).text


def test_a_dataset_without_rows_has_a_page(tmp_path):
    page = report(tmp_path, [])
    assert page.figure("Rows") == "0" and page.figure("Median output") == "-" and "<section>" not in page.source
    _, lost, run = make(40)
    page = report(tmp_path, [], lost, run | {"status": "cap reached"})
    assert '<span class="open">cap reached</span>' in page.source and page.section("rejections")


def test_many_reasons_and_long_texts_stay_small(tmp_path):
    long = "<&'\"" * 5000
    rows = [{"instruction": f"{i} {long}", "input": long, "output": long} for i in range(200)]
    lost = [
        {"reason": f"{i} {long}", "detail": long, "instruction": long, "duplicate_of": f"{i}{long}", "similarity": 0.8}
        for i in range(150)
    ]
    run = {
        "counts": {"repaired": {f"{i}{long}": 3 for i in range(300)}},
        "settings": {f"{i}{long}": long for i in range(300)},
    }
    page = report(
        tmp_path, rows, lost, run | {"models": {f"{i}{long}": 2 for i in range(90)}, "cost": {"spent_usd": 1}}
    )
    assert len(page.source.encode()) < 2_000_000 and "characters more)" in page.text
    counts = bars(page.section("rejections").split("Repaired")[0])[0]
    assert len(counts) == 41 and counts["110 other reasons"] == 110


def test_wrong_files_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "d.jsonl"
    path.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="none of its 1 rows has an instruction"):
        write_report(path)
    path.write_text('{"instruction": "Write.", "output": "x"}\n')
    for out in (path, "d.jsonl", tmp_path / "run.json", tmp_path / "." / "rejected.jsonl"):
        with pytest.raises(UsageError, match="made from"):
            write_report(path, out)
    with pytest.raises(UsageError, match="no folder"):
        write_report(path, tmp_path / "missing" / "x.html")
    assert run_for_exit_code(main, [str(path), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html") and (tmp_path / "page.html").exists()
    assert run_for_exit_code(main, [str(tmp_path / "none.json")]) == 3 and "cannot be read" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["d.jsonl", "page.html"]


def test_same_bytes_and_its_own_blocks_alone(whole, tmp_path):
    rows, lost, run, page = whole
    assert report(tmp_path, rows, lost, run).source == page.source
    (policy,) = (a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    for kind in ("style", "script"):
        (block,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert not re.search(r"https?:|url\(|@import|//[a-z]", page.source)


def test_rows_of_any_origin_have_a_page(tmp_path):
    """Of a file without a run: many verbs, of which the page shows the most frequent with what they are said of."""
    rows = alpaca_rows() + [
        {"instruction": f"Rewrite the sentence about {i} hats.", "input": "", "output": "Done."} for i in range(60)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    page = Page(write_report(tmp_path / "rows.json", tmp_path / "r.html").read_text())
    assert page.figure("Rows") == "1,059" and not page.section("rejections") and not page.section("cost")
    assert arcs(page)["rewrite", "sentence"] == 60 and len([1 for _, noun in arcs(page) if noun is None]) == 20


# ---- in a browser ---------------------------------------------------------------------------------------------------

PROBE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1 ||
  (e.matches(".text, td, th, .name, h1") && e.scrollWidth > e.clientWidth + 1));
const scroll = document.documentElement.scrollWidth;
console.error(`width ${innerWidth} scroll ${scroll} out ${wide.map(e => e.outerHTML)[0]}`);
const bin = document.querySelector("g.bin"), say = () => document.querySelector("figure output").textContent;
bin.firstElementChild.nextElementSibling.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
console.error("says " + (say() === bin.querySelector("title").textContent));
document.querySelector("figure svg").dispatchEvent(new PointerEvent("pointerleave"));
console.error("then " + (say() === ""));
</script></body>"""


def test_in_a_browser(chromium, tmp_path):
    rows, lost, run = hostile()
    source = report(tmp_path, rows, lost, run).source
    dom, console = chromium(source, 1280)
    assert console == [] and "<title>dataset.jsonl: " in dom and "<title>owned" not in dom
    dom, console = chromium(source.replace("<h1>", "<script>document.title='owned'</script><h1>"), 1280)
    assert "<title>owned" not in dom and any("Content Security Policy" in line for line in console)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_and_charts_answer(chromium, tmp_path, width):
    rows, lost, run = make(24)
    rows[3]["instruction"] = rows[4]["output"] = "x" * 900  # a word without end
    run["settings"]["y" * 300] = "z" * 300
    source = report(tmp_path, rows, [lost[0] | {"reason": "w" * 110}, *lost], run).source
    source = (
        re.sub(r"<meta http-equiv[^>]*>", "", source).replace("</body>", PROBE).replace("<details", "<details open")
    )
    _, console = chromium(source, width)
    assert len(console) == 3 and f"width {width} scroll {width} out undefined" in console[0], console
    assert "says true" in console[1] and "then true" in console[2]


# ---- every kind of file and row -------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": "An oak."}]
KINDS = {
    "alpaca": {"instruction": "Name a tree.", "input": "", "output": "An oak."},
    "messages": {"messages": [{"role": "system", "content": "Be short."}, *CHAT]},
    "conversations": {
        "conversations": [{"from": "human", "value": "Name a tree."}, {"from": "gpt", "value": "An oak."}]
    },
    "completion": {"prompt": "Name a tree.", "completion": "An oak."},
    "chats of two parts": {"prompt": CHAT[:1], "completion": CHAT[1:]},
}


def write_file(path, rows):
    """Write rows as the file's name says."""
    if ".csv" in path.suffixes:
        text = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows)
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
        return
    else:
        text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row_is_read(tmp_path, kind):
    write_file(tmp_path / "rows.jsonl", [KINDS[kind]])
    page = Page(write_report(tmp_path / "rows.jsonl").read_text())
    assert page.figure("Rows") == "1" and page.figure("Median instruction").startswith("3 words")
    assert page.figure("Median output").startswith("2 words") and "Bad rows" not in page.text


@pytest.mark.parametrize(
    "name", ["rows.json", "rows.jsonl.gz", "rows.csv", "v1.2.rows.csv.gz", "v1.2.csv", "rows.parquet", "v1.2.parquet"]
)
def test_every_kind_of_file_is_read(tmp_path, name):
    write_file(tmp_path / name, [KINDS["completion"]] * 3)
    page = Page(write_report(tmp_path / name).read_text())
    assert page.figure("Rows") == "3" and page.figure("Median output").startswith("2 words")


def test_a_turn_between_the_first_question_and_the_last_answer_is_input():
    turns = [*CHAT, {"role": "user", "content": "Another?"}, {"role": "assistant", "content": "An elm."}]
    expected = {"instruction": "Name a tree.", "input": "assistant: An oak.\n\nuser: Another?", "output": "An elm."}
    assert read_turns(turns) == expected


@pytest.mark.parametrize("divider", ",;\t")
def test_a_table_of_any_divider_is_read(tmp_path, divider):
    text = f'\ufeffinstruction{divider}input{divider}output\r\n"a\r\nb"{divider}""{divider}"c, d;\te ""f"""\r\n'
    for name in ("rows.csv", "rows.tsv"):
        (tmp_path / name).write_bytes(text.encode())
        (row,), n_bad = read_any_rows(tmp_path / name)
        assert row == {"instruction": "a\r\nb", "input": "", "output": 'c, d;\te "f"'} and not n_bad
    (tmp_path / "rows.csv").write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match=r"rows.csv cannot be read: no UTF-8 at byte 0"):
        read_any_rows(tmp_path / "rows.csv")


def test_bad_rows_are_counted_and_left_out(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(KINDS["alpaca"]) + '\n{"instruction": "cut\n5\n{"other": 1}\n\n[]\n')
    page = Page(write_report(path).read_text())
    assert page.figure("Rows") == "1" and page.figure("Bad rows").startswith("4|left out")
    assert "rows.jsonl: 4 of 5 rows are bad, and left out of the page" in capsys.readouterr().err
    path.write_text(json.dumps(KINDS["alpaca"]))
    write_report(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "run, models, text",
    [
        ({}, [], ""), ({"status": "done"}, [], " · <span class=\"\">done</span>"),
        ({"status": "failed"}, [], " · <span class=\"open\">failed</span>"), ({"seconds": 90}, [], " · took 1m 30s"),
        ({"fault": "x<"}, [], " · <span class=\"open\">x&lt;</span>"), ({}, ["b", None, "a", "b", ""], " · a · b"),
        ({"models": {"m": 1}}, ["b"], " · m"), ({}, list("dcba"), " · a · b · c"),
    ],
)  # fmt: skip
def test_the_state_of_a_run(run, models, text):
    record = {"fault": None, "status": None, "started": None, "seconds": None, "models": {}} | run
    rows = [SimpleNamespace(model=model) for model in models]
    assert render_state(rows, SimpleNamespace(**record)) == text
