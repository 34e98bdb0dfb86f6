"""data_gen.generate as a user runs it, against a server that fails on purpose: nothing is lost or paid for twice."""

import base64
import contextlib
import datetime
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")
pytest.importorskip("rapidfuzz")

from data_gen import generate as module
from data_gen.api import prices
from data_gen.api.ledger import Ledger
from data_gen.api.prompt import Prompter, read_seed_tasks
from data_gen.api.running import stop_run
from data_gen.base.cli import run_for_exit_code
from engine.data.rows import read_rows
from tests.helpers.forks import Started
from tests.helpers.openai_server import DIALECTS, Reply, Server, error, request_key
from tests.helpers.run import ROOT, command, environment

FAULTS = {"429_ms": 0.1, "500": 0.1, "503": 0.05, "reset": 0.05, "reset_body": 0.1, "502_html": 0.05, "lost": 0.05}
FAULTS |= {"empty_choices": 0.05, "html_200": 0.05}  # of attempts: they may change nothing
ANSWERS = {"truncated": 0.1, "malformed": 0.08, "refusal": 0.06, "content_filter": 0.06, "wrong_schema": 0.06}
ODD = {"no_usage": 0.08, "prose": 0.1, "content_policy_400": 0.08}
KEY = "sk-test-5f3a9c1e77d04b21"


def flags(server, out, *more):
    common = ("--model", "m", "--price-in", "0.1", "--price-out", "0.4", "--backoff", "0.01", "--quiet")
    return [str(word) for word in ("--base-url", server.base_url, "--out", out, *common, *more)]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def generate(server, out, *more):
    """Run in this process and return the exit code."""
    return run_for_exit_code(module.main, flags(server, out, *more))


RUN = "from data_gen.base.cli import run_command\nfrom data_gen.generate import main\nrun_command(main)"


def start(server, out, *more):
    """Start a run in a process of its own, forked from one that has imported the packages."""
    return Started(RUN, *flags(server, out, *more), env=environment())


def rows_of(out):
    return json.loads((out / "dataset.json").read_text())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def about(out):
    return json.loads((out / "run.json").read_text())


def done(out):
    """Return the numbers of the requests with an outcome in the ledger."""
    with sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        sql = "SELECT request FROM received JOIN sent USING (attempt) WHERE kind IN ('answer', 'refused')"
        return {number for (number,) in db.execute(sql)}


def sent(out):
    """Return the numbers of the requests whose intent is in the ledger."""
    with sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        return {number for (number,) in db.execute("SELECT request FROM sent")}


def server_keys(numbers, **settings):
    prompter = Prompter(read_seed_tasks(), **settings)
    return {request_key(prompter.build_messages(number)) for number in numbers}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return the folder of a run of 600 rows without failed attempts."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    os.environ["OPENAI_API_KEY"] = KEY
    with Server(seed=3, faults=ANSWERS | ODD) as server:
        assert generate(server, out, "--rows", 600) == 0
    return out


CHANGING = (  # what is different at each run or on each machine
    (r"127\.0\.0\.1:\d+", "HOST"),
    (r" in \d+:\d\d\n", " in 0:00\n"),
    (r'("(?:started|seconds|python|openai|rapidfuzz)": ).*', r"\1#"),
)


@pytest.mark.parametrize("name", ["plain", "capped"])
def test_what_a_run_writes_is_kept_whole(name, tmp_path, snapshot, capsys):
    """One request at a time: the ledger, the rows, what was lost, the record of the run and what it says."""
    more = {"plain": (), "capped": ("--max-usd", "0.0036", "--language", "de")}[name]
    with Server(seed=7, items=4, defects=0.4, faults=ANSWERS | ODD) as server:
        words = ("--rows", 12, "--tasks-per-request", 4, "--examples", 1, "--concurrency", 1)
        loud = [word for word in flags(server, tmp_path, *words, *more) if word != "--quiet"]
        code = run_for_exit_code(module.main, loud)
    said = capsys.readouterr()
    with sqlite3.connect(f"file:{tmp_path / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        fields = "request, attempt, kind, status, input_tokens, output_tokens, cost, reserved"
        sql = f"SELECT {fields} FROM sent LEFT JOIN received USING (attempt) ORDER BY attempt"
        told = [f"exit code {code}", said.out, said.err, *map(str, db.execute(sql))]
    told += [f"--- {file}\n{(tmp_path / file).read_text()}" for file in ("run.json", "dataset.jsonl", "rejected.jsonl")]
    text = "\n".join(told).replace(str(tmp_path), "OUT")
    for pattern, instead in CHANGING:
        text = re.sub(pattern, instead, text)
    assert text == snapshot


def test_a_dataset_as_promised(unbroken):
    rows, told = rows_of(unbroken), about(unbroken)
    assert len(rows) == 600 and all(list(row) == ["instruction", "input", "output"] for row in rows)
    lines = lines_of(unbroken / "dataset.jsonl")
    assert [{k: v for k, v in line.items() if k != "provenance"} for line in lines] == rows
    source = lines[0]["provenance"]
    assert source["request"] == 0 and source["model"] == "m" and source["response_id"].startswith("chatcmpl-")
    messages = Prompter(read_seed_tasks()).build_messages(0)
    assert source["prompt_sha256"] == hashlib.sha256(json.dumps(messages).encode()).hexdigest()
    counts, rejected = told["counts"], lines_of(unbroken / "rejected.jsonl")
    assert told["status"] == "done" and counts["kept"] == 600
    assert sum(counts["rejected"].values()) == len(rejected)
    assert {line["reason"] for line in rejected} >= {"refused by the server", "refusal", "duplicate"}
    assert {"truncated", "missing field"} & {line["reason"] for line in rejected}
    assert (unbroken / "report.html").read_text().startswith("<!DOCTYPE html>")
    used = {line["provenance"]["request"] for line in lines}
    paid = sum(line["provenance"]["usd"] for line in lines)
    assert paid <= told["cost"]["spent_usd"] and len(used) <= counts["answers"]


def test_the_money_told_is_what_the_server_billed(tmp_path):
    with Server(seed=4) as server:
        assert generate(server, tmp_path, "--rows", 300) == 0
        billed, attempts = server.stats()["billed"], len(server.log)
    cost = about(tmp_path)["cost"]
    assert about(tmp_path)["counts"]["attempts"] == attempts
    assert (cost["usd_per_million_in"], cost["usd_per_million_out"], cost["cap_usd"]) == (0.1, 0.4, None)
    assert (cost["input_tokens"], cost["output_tokens"]) == (billed["prompt_tokens"], billed["completion_tokens"])
    assert cost["spent_usd"] == pytest.approx(
        (0.1 * cost["input_tokens"] + 0.4 * cost["output_tokens"]) / 1e6, rel=1e-12
    )


@pytest.mark.parametrize("name", ["dataset.json", "dataset.jsonl", "chat.jsonl"])
def test_the_engine_reads_every_format(unbroken, name):
    rows, skipped = read_rows([unbroken / name], False)
    assert len(rows) == 600 and not skipped


@pytest.mark.parametrize("concurrency", [1, 50])
def test_faults_and_concurrency_change_nothing(unbroken, tmp_path, concurrency):
    with Server(seed=3, faults=FAULTS | ANSWERS | ODD, latency_s=0.002) as server:
        assert generate(server, tmp_path, "--rows", 600, "--concurrency", concurrency) == 0
        outcomes = server.stats()["outcomes"]
    assert set(FAULTS) <= set(outcomes), "some fault never came"
    for name in ("dataset.json", "chat.jsonl"):
        assert (tmp_path / name).read_bytes() == (unbroken / name).read_bytes()
    strip = [{k: v for k, v in line.items() if k != "provenance"} for line in lines_of(tmp_path / "rejected.jsonl")]
    assert strip == lines_of(unbroken / "rejected.jsonl")


def test_killed_again_and_again_it_is_the_same_dataset_and_nothing_recorded_is_asked_twice(unbroken, tmp_path):
    rng = random.Random(5)
    with Server(seed=3, faults=FAULTS | ANSWERS | ODD, latency_s=0.05) as server:
        kills, known = 0, []
        while kills < 5:
            process = start(server, tmp_path, "--rows", 600, "--concurrency", 8)
            before = len(server.log)
            while len(server.log) < before + rng.randrange(1, 9) and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.06)
            if process.poll() is not None:
                break
            process.kill()
            process.communicate()
            kills += 1
            while server.stats()["in_flight"]:  # until the server notices
                time.sleep(0.01)
            arrived = {entry["key"] for entry in server.log}
            assert arrived <= server_keys(sent(tmp_path)), "a request reached the server before it was on the disk"
            known.append((len(server.log), server_keys(done(tmp_path))))
        assert kills >= 3, "it was done before it could be killed"
        assert generate(server, tmp_path, "--rows", 600) == 0
        log = [entry["key"] for entry in server.log]
    assert known[-1][1], "nothing was recorded before the last kill"
    for arrived, keys in known:
        assert not keys & set(log[arrived:]), "a request whose answer was recorded was sent again"
    assert (tmp_path / "dataset.json").read_bytes() == (unbroken / "dataset.json").read_bytes()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        sql = "SELECT coalesce(sum(reserved), 0) FROM sent LEFT JOIN received USING (attempt) WHERE kind"
        in_flight, lost = (db.execute(f"{sql} {state}").fetchone()[0] for state in ("IS NULL", "= 'lost'"))
    assert in_flight > 0, "nothing was in flight at a kill"
    assert about(tmp_path)["cost"]["uncertain_usd"] == (in_flight + lost) / 10**12, "both may have been billed"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_it_with_143_and_what_was_paid_for_on_disk(unbroken, tmp_path, name):
    with Server(seed=3, faults=ANSWERS | ODD, latency_s=0.1) as server:
        process = start(server, tmp_path, "--rows", 600, "--concurrency", 4)
        while len(server.log) < 6:
            time.sleep(0.001)
        os.kill(process.pid, getattr(signal, name))
        _, said = process.communicate(timeout=60)
        assert process.returncode == 143, said
        assert "the same command goes on" in said
        billed = {entry["key"] for entry in server.log if entry["billed"]}
        assert billed <= server_keys(done(tmp_path)), "a paid answer was thrown away"
        assert about(tmp_path)["status"] == "stopped" and 0 < len(rows_of(tmp_path)) < 600
        assert generate(server, tmp_path, "--rows", 600) == 0
    assert (tmp_path / "dataset.json").read_bytes() == (unbroken / "dataset.json").read_bytes()


def test_a_reader_that_leaves_costs_no_answer(tmp_path):
    """A reader such as tee ends at the Ctrl-C that stops the run."""
    with Server(seed=3, latency_s=0.3) as server:
        words = [sys.executable, "-m", "data_gen.generate", *flags(server, tmp_path, "--rows", 600, "--concurrency", 4)]
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while len(server.log) < 4:
            time.sleep(0.001)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 143
        assert server_keys(done(tmp_path)) == {entry["key"] for entry in server.log}
    assert about(tmp_path)["status"] == "stopped"


def test_a_second_signal_leaves_at_once(tmp_path):
    with Server(seed=3, faults={"hang": 1.0}) as server:
        process = start(server, tmp_path, "--rows", 600)
        while not server.stats()["in_flight"]:
            time.sleep(0.01)
        process.terminate()
        time.sleep(0.7)  # it would have left by now
        assert process.poll() is None, "it did not wait for what was in flight"
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 143


def test_a_second_signal_gives_the_terminal_back(monkeypatch):
    did = []
    monkeypatch.setattr(module.os, "_exit", sys.exit)
    collector = SimpleNamespace(stopping=True, progress=SimpleNamespace(close=lambda: did.append("closed")))
    stop_run(collector, signal.SIGHUP)
    assert not did, "a terminal that is closed may say so twice"
    with pytest.raises(SystemExit, match="143"):
        stop_run(collector, signal.SIGTERM)
    assert did == ["closed"]


def test_a_signal_while_the_ledger_is_read_changes_no_file(unbroken, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    add_outcome = module.Curator.add_outcome

    def stopped(curator, entry):
        if entry.request == 5:
            signal.raise_signal(signal.SIGTERM)
        add_outcome(curator, entry)

    monkeypatch.setattr(module.Curator, "add_outcome", stopped)
    with Server(seed=3) as server:
        assert generate(server, out, "--rows", 700) == 143
        assert not server.log and capsys.readouterr().err.endswith("stopped by a signal\n")
    for path in unbroken.glob("*.*"):
        if path.suffix.startswith(".json") or path.suffix == ".html":
            assert (out / path.name).read_bytes() == path.read_bytes()


def test_the_cap_stops_it_and_a_larger_one_goes_on(unbroken, tmp_path, capsys):
    with Server(seed=3, faults=FAULTS | ANSWERS | ODD) as server:
        assert generate(server, tmp_path, "--rows", 600, "--max-usd", "0.02") == 1
        billed = server.stats()["billed"]
        true_cost = (0.1 * billed["prompt_tokens"] + 0.4 * billed["completion_tokens"]) / 1e6
        assert 0.01 < true_cost <= 0.02
        said = capsys.readouterr()
        assert "stopped at the cap" in said.err and "--max-usd goes on" in said.err
        told = about(tmp_path)
        assert told["status"] == "cap reached" and 0 < len(rows_of(tmp_path)) < 600
        assert told["cost"]["spent_usd"] + told["cost"]["uncertain_usd"] <= 0.02
        assert generate(server, tmp_path, "--rows", 600, "--max-usd", "0.02") == 1, (
            "a cap is of the ledger, not of a run"
        )
        assert server.stats()["billed"] == billed
        assert generate(server, tmp_path, "--rows", 600, "--max-usd", "1") == 0
    assert (tmp_path / "dataset.json").read_bytes() == (unbroken / "dataset.json").read_bytes()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"api_key": "another"}, "401"),
        ({"models": ["other"]}, "404"),
        ({"quota_after": 8}, "429"),
    ],
)
def test_what_no_retry_mends_stops_it_at_once_and_keeps_what_there_is(unbroken, tmp_path, capsys, options, said):
    with Server(seed=3, faults=ANSWERS | ODD, **options) as server:
        assert generate(server, tmp_path, "--rows", 600, "--concurrency", 4) == 1
        assert len(server.log) <= 8 + 8
        told = capsys.readouterr().err
        assert f"the server said {said}" in told and "the same command goes on from here" in told
        assert KEY not in told
        server.within(lambda: server.configure(api_key=None, models=None, quota_after=None))
        assert generate(server, tmp_path, "--rows", 600) == 0
    assert (tmp_path / "dataset.json").read_bytes() == (unbroken / "dataset.json").read_bytes()


def test_no_key_is_told_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    out = tmp_path / "out"
    words = ["--model", "gpt-5.4", "--base-url", "https://api.openai.com/v1", "--out", str(out)]
    assert run_for_exit_code(module.main, words) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err and not out.exists()


def test_the_key_is_nowhere(tmp_path, capsys):
    """Even a server that echoes the key gets it into no file and no message."""
    with Server(seed=3, answer=lambda key, body: f'{{"tasks": [], "seen": "{KEY}"}}') as server:
        generate(server, tmp_path, "--rows", 5)
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize(
    "flag, value, said",
    [
        ("--language", "xx", "--language is 'xx'"),
        ("--rows", "0", "--rows"),
        ("--max-usd", "-1", "--max-usd"),
        ("--model", "m\udcff", "wanted UTF-8"),
        ("--max-output-tokens", "1000001", "wanted a whole number from 1 to a million"),
        ("--extra", "[1]", "wanted a JSON object"),
        ("--extra", '{"top_p": NaN}', "wanted a JSON object"),
        ("--extra", '{"top_p": 1e999}', "wanted a JSON object"),
        ("--extra", r'{"user": "\ud800"}', "wanted a JSON object"),
        ("--extra", '{"stream": true}', "without model, messages, n, stream"),
        ("--extra", '{"max_tokens": 9}', "max_tokens"),
        ("--temperature", "nan", "wanted a number from 0 to 2"),
        ("--base-url", "localhost:8000/v1", "no address of a server"),
        ("--patience", "5", "--patience 5 is not longer than --timeout 600"),
        ("--max-uds", "1", "did you mean --max-usd?"),
        ("--seed-tasks", "nowhere.json", "nowhere.json"),
        ("--decontaminate", "nowhere.json", "nowhere.json"),
        ("--prices", "nowhere.json", "nowhere.json"),
    ],
)
def test_bad_flags_are_told_before_anything_is_done(tmp_path, capsys, flag, value, said):
    out = tmp_path / "out"
    words = ["--model", "m", "--price-in", "0", "--price-out", "0", "--out", str(out), flag, value]
    try:
        code = run_for_exit_code(module.main, words)
    except SystemExit as left:
        code = left.code
    assert code in (2, 3)
    assert said in capsys.readouterr().err and not out.exists()


def test_an_unknown_price_is_refused(tmp_path, capsys):
    assert run_for_exit_code(module.main, ["--model", "gpt-5.4-mni", "--out", str(tmp_path / "out")]) == 2
    assert "did you mean gpt-5.4-mini?" in capsys.readouterr().err


def test_a_tier_with_prices_of_its_own_needs_them(tmp_path, capsys):
    words = ["--model", "gpt-5.4", "--max-usd", "1", "--extra", '{"service_tier": "priority"}']
    assert run_for_exit_code(module.main, [*words, "--out", str(tmp_path / "out")]) == 2
    assert "pass its --price-in and --price-out" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_key_in_other_forms_is_nowhere(tmp_path, capsys):
    """Neither escaped, nor encoded, nor in what the rows decode to."""
    codes = "".join(f"\\u{ord(char):04x}" for char in KEY)
    encoded = base64.b64encode(f"Bearer {KEY}".encode()).decode()
    percents = "".join(f"%{ord(char):02x}" for char in KEY)

    def echo(key, body):
        rng = random.Random(key)
        words = " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(8))
        fields = (
            f'"instruction": "Explain {words}: {codes}", "input": "{encoded}", "output": "It is {codes} {percents}."'
        )
        return f'{{"tasks": [{{{fields}}}]}}'

    with Server(seed=3, answer=echo) as server:
        generate(server, tmp_path, "--rows", 5, "--tasks-per-request", 1)
    assert len(rows_of(tmp_path)) == 5
    said = capsys.readouterr()
    for form in (KEY, encoded[10:-4], percents, KEY[3:]):
        assert form not in said.out + said.err
        for path in tmp_path.iterdir():
            assert form.encode() not in path.read_bytes(), path.name
    assert all("[key]" in row[field] for row in rows_of(tmp_path) for field in ("instruction", "input", "output"))


def test_a_server_that_ignores_the_format_is_told_once(tmp_path, capsys):
    with Server(seed=3, items=5, ignores=["response_format"]) as server:
        assert generate(server, tmp_path, "--rows", 60, "--tasks-per-request", 5) == 0
    said = capsys.readouterr().err
    assert said.count("the server takes json_schema and does not keep to it") == 1 and "understands" not in said
    assert len(rows_of(tmp_path)) == 60


@pytest.mark.parametrize("enforced", [True, False])
def test_a_schema_beside_json_object_is_tried_before_json_object_alone(tmp_path, enforced):
    seen = []

    class Strict(Server):
        def gate(self, request, body, entry):
            form = body.get("response_format") or {}
            seen.append((form.get("type"), "schema" in form))
            if form.get("type") == "json_schema" or ("schema" in form and not enforced):
                return error(self.options, 400, "response_format: unknown")
            return super().gate(request, body, entry)

    with Strict(seed=3, items=5) as server:
        assert generate(server, tmp_path, "--rows", 30, "--tasks-per-request", 5) == 0
    assert seen[:2] == [("json_schema", False), ("json_object", True)]
    assert set(seen[2:]) == {("json_object", enforced)}


def test_a_price_that_would_never_end_is_refused_at_once(tmp_path, capsys):
    words = ["--model", "m", "--price-in", "1e-99999999", "--price-out", "0", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        module.main(words)
    assert "got '1e-99999999', wanted dollars from 0 to a million" in capsys.readouterr().err


def test_a_model_near_its_end_is_told(tmp_path, capsys, monkeypatch):
    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(2027, 3, 1)

    monkeypatch.setattr(prices.datetime, "date", Day)
    monkeypatch.setenv("OPENAI_API_KEY", "x y")
    words = ["--model", "gpt-5.1", "--out", str(tmp_path / "out")]
    assert run_for_exit_code(module.main, words) == 2
    assert "warning: gpt-5.1 was announced to end on 2027-04-01, in 31 days" in capsys.readouterr().err


def test_a_password_in_the_address_is_nowhere(tmp_path, capsys):
    with Server(seed=3) as server:
        address = server.base_url.replace("//", "//mary:Tr0ub4dor@")
        assert generate(server, tmp_path, "--rows", 20, "--base-url", address) == 0
    said = capsys.readouterr()
    assert "Tr0ub4dor" not in said.out + said.err
    for path in tmp_path.iterdir():
        assert b"Tr0ub4dor" not in path.read_bytes(), path.name


def test_a_full_disk_is_told_and_costs_nothing_that_is_written(unbroken, tmp_path):
    size = 250_000  # of any file
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    with Server(seed=3, faults=ANSWERS | ODD) as server:
        full = Started(limit + RUN, *flags(server, tmp_path, "--rows", 600), env=environment())
        _, said = full.communicate(timeout=100)
        assert full.returncode == 1 and said.count("error:") == 1, said
        assert "ledger.sqlite could not be written" in said and "Traceback" not in said
        recorded, arrived = server_keys(done(tmp_path)), len(server.log)
        assert recorded and generate(server, tmp_path, "--rows", 600) == 0
        assert not recorded & {entry["key"] for entry in server.log[arrived:]}
    assert (tmp_path / "dataset.json").read_bytes() == (unbroken / "dataset.json").read_bytes()


def test_a_dataset_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "dataset.jsonl").mkdir()
    with Server(seed=3) as server:
        assert generate(server, tmp_path, "--rows", 20) == 1
        assert "the dataset could not be written: " in capsys.readouterr().err
        (tmp_path / "dataset.jsonl").rmdir()
        asked = len(server.log)
        assert generate(server, tmp_path, "--rows", 20) == 0
        assert len(server.log) == asked and len(rows_of(tmp_path)) == 20


def test_two_runs_in_one_folder(tmp_path, capsys):
    with Server(seed=3, faults={"hang": 1.0}) as server:
        first = start(server, tmp_path, "--rows", 600)
        while not server.stats()["in_flight"]:
            time.sleep(0.01)
        assert generate(server, tmp_path, "--rows", 600) == 2
        assert first.poll() is None and "another process is at work" in capsys.readouterr().err
        first.kill()
        first.communicate()


def test_other_settings_are_refused_or_allowed(tmp_path, capsys):
    with Server(seed=3) as server:
        assert generate(server, tmp_path, "--rows", 40) == 0
        assert generate(server, tmp_path, "--rows", 80, "--seed", 1) == 2
        assert "seed was 0, is 1" in capsys.readouterr().err
        for flag, value in {
            "model": "n", "temperature": 0.5, "max-output-tokens": 99, "extra": '{"top_p": 1}', "examples": 2,
            "tasks-per-request": 9, "language": "fr",
        }.items():  # fmt: skip
            assert generate(server, tmp_path, "--rows", 80, "--" + flag, value) == 2, flag
            assert f"{flag.replace('-', '_')} was " in capsys.readouterr().err
        assert len(rows_of(tmp_path)) == 40, "a refused run touched the dataset"
        first = rows_of(tmp_path)
        assert generate(server, tmp_path, "--rows", 80, "--seed", 1, "--allow-changed") == 0
        assert generate(server, tmp_path, "--rows", 80, "--seed", 1) == 0, "it was to be allowed once"
        assert generate(server, tmp_path, "--rows", 80) == 2
    assert rows_of(tmp_path)[:40] == first and len(rows_of(tmp_path)) == 80


def test_more_rows_go_on_from_those_there_are(tmp_path):
    with Server(seed=3) as server:
        assert generate(server, tmp_path, "--rows", 50) == 0
        first, asked = rows_of(tmp_path), len(server.log)
        assert generate(server, tmp_path, "--rows", 50) == 0
        assert len(server.log) == asked, "a finished run asked again"
        assert generate(server, tmp_path, "--rows", 130) == 0
        assert len({entry["key"] for entry in server.log}) == len(server.log)
    assert rows_of(tmp_path)[:50] == first


def test_a_replay_sends_nothing_and_takes_new_filters(unbroken, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "ledger.sqlite").write_bytes((unbroken / "ledger.sqlite").read_bytes())
    assert run_for_exit_code(module.main, ["--out", str(out), "--rows", "600", "--replay"]) == 0
    for name in ("dataset.json", "dataset.jsonl", "chat.jsonl", "rejected.jsonl"):
        assert (out / name).read_bytes() == (unbroken / name).read_bytes()
    prompts = tmp_path / "evaluation.jsonl"
    row = rows_of(out)[17]
    prompts.write_text(json.dumps({"instruction": row["instruction"], "input": row["input"]}))
    assert (
        run_for_exit_code(
            module.main, ["--out", str(out), "--rows", "600", "--replay", "--decontaminate", str(prompts)]
        )
        == 0
    )
    assert row not in rows_of(out) and about(out)["counts"]["rejected"]["evaluation prompt"] >= 1
    assert run_for_exit_code(module.main, ["--out", str(tmp_path / "none"), "--replay"]) == 2


def forget_request(folder, number):
    """Leave a ledger as a kill leaves it that comes before the answer to this request."""
    db = sqlite3.connect(folder / "ledger.sqlite")
    attempts = [attempt for (attempt,) in db.execute("SELECT attempt FROM sent WHERE request = ?", (number,))]
    for attempt in attempts:
        db.execute("DELETE FROM received WHERE attempt = ?", (attempt,))
        db.execute("DELETE FROM seal WHERE place = ?", (f"received {attempt}",))
    db.commit()
    db.close()


def test_a_replay_has_the_rows_of_every_answer_and_says_which_requests_are_missing(unbroken, tmp_path, capsys):
    (tmp_path / "ledger.sqlite").write_bytes((unbroken / "ledger.sqlite").read_bytes())
    answered = done(unbroken)
    for number in (7, 8, 12):
        forget_request(tmp_path, number)
    for _ in range(2):
        assert run_for_exit_code(module.main, ["--out", str(tmp_path), "--replay", "--quiet"]) == 0
        lines, said = lines_of(tmp_path / "dataset.jsonl"), capsys.readouterr().out
        found = {line["provenance"]["request"] for line in lines}
        assert found <= answered - {7, 8, 12} and max(found) > 12 and min(found) == 0
        assert about(tmp_path)["status"] == "replayed" and about(tmp_path)["counts"]["missing_requests"] == "7-8, 12"
        assert "requests without an answer, which the same command asks again: 7-8, 12" in said
        assert lines == lines_of(tmp_path / "dataset.jsonl")


class DeafServer(Server):
    """Never answers one request, while deaf to it."""

    deaf = ""

    def reply_to(self, body, key, attempt, fault, entry):
        if key == self.deaf:
            entry["outcome"] = "deaf"
            return Reply(0, way="reset")
        return super().reply_to(body, key, attempt, fault, entry)


@pytest.mark.parametrize("end, options", [(("--max-usd", "0.02"), {}), (("--patience", "2"), {"down_after": 14})])
def test_what_is_paid_is_in_the_dataset_however_the_run_ends(tmp_path, end, options, capsys):
    """The answer to request 1 never comes: those behind it are in the dataset all the same."""
    prompter, more = Prompter(read_seed_tasks(), n_tasks=3), ("--tasks-per-request", 3, "--timeout", 1)
    with DeafServer(seed=3, items=3, down_for_s=10**6, **options) as server:
        server.deaf = request_key(prompter.build_messages(1))
        assert generate(server, tmp_path / "out", "--rows", 300, *more, "--max-attempts", 999, *end) == 1
        answered = done(tmp_path / "out")
        assert len(answered) >= 10 and 1 not in answered and 0 in answered
        lines, told = lines_of(tmp_path / "out" / "dataset.jsonl"), about(tmp_path / "out")
        assert {line["provenance"]["request"] for line in lines} > {0} and told["counts"]["answers"] == len(answered)
        assert told["counts"]["missing_requests"].startswith("1,") or told["counts"]["missing_requests"] == "1"
        said = capsys.readouterr().out
        assert "requests without an answer, which the same command asks again: 1" in said
        before = (tmp_path / "out" / "dataset.jsonl").read_bytes()
        replay = ["--out", str(tmp_path / "out"), "--rows", "300", "--replay", "--quiet"]
        assert run_for_exit_code(module.main, replay) == 0
        assert (tmp_path / "out" / "dataset.jsonl").read_bytes() == before
        server.deaf = ""
        server.within(lambda: server.configure(down_after=None))
        for folder in ("out", "unbroken"):
            assert generate(server, tmp_path / folder, "--rows", 300, *more) == 0
        assert about(tmp_path / "out")["counts"]["missing_requests"] == ""
    assert (tmp_path / "out" / "dataset.json").read_bytes() == (tmp_path / "unbroken" / "dataset.json").read_bytes()


def test_seed_tasks_of_self_instruct_and_another_language(tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    instances = [{"input": "", "output": "Pommes, pain."}]
    seeds.write_text(
        "".join(json.dumps({"instruction": f"List {n} foods.", "instances": instances}) + "\n" for n in range(5))
    )
    asked = []

    words = [
        "chat",
        "maison",
        "route",
        "neige",
        "jardin",
        "fromage",
        "train",
        "musique",
        "hiver",
        "école",
        "pluie",
        "pain",
    ]

    def french(key, body):
        asked.append(body["messages"][-1]["content"])
        some = " ".join(random.Random(key).sample(words, 8))
        task = {"instruction": f"Écrivez une lettre avec les mots que voici : {some}.", "input": ""}
        return json.dumps({"tasks": [task | {"output": "Cher voisin, je vous écris au sujet de notre jardin."}]})

    def english(key, body):
        text = f"Please write a letter to the neighbours about the garden and all of their {key[:5]} and {key[5:11]}."
        return json.dumps(
            {"tasks": [{"instruction": text, "input": "", "output": "Dear neighbours, this is the letter."}]}
        )

    more = ("--seed-tasks", seeds, "--language", "fr", "--rows", 3, "--tasks-per-request", 1)
    with Server(answer=french) as server:
        assert generate(server, tmp_path / "out", *more) == 0
    assert "French" in asked[0] and "foods" in asked[0] and "Pommes, pain." in asked[0]
    with Server(answer=english) as server:
        assert generate(server, tmp_path / "english", *more) == 1
    assert about(tmp_path / "english")["counts"]["rejected"]["wrong language"] >= 15


def test_a_model_that_writes_no_tasks_is_left_soon(tmp_path, capsys):
    with Server(answer=lambda key, body: "I would rather talk about the weather.") as server:
        assert generate(server, tmp_path, "--rows", 1000) == 1
        assert len(server.log) < 120
    assert "held nothing new that can be kept (no items" in capsys.readouterr().err


NEWER, OLDER = ["json_schema", "max_completion_tokens"], ["json_object", "max_tokens"]


@pytest.mark.parametrize(
    "dialect, supports",
    [
        *((dialect, ["max_tokens"]) for dialect in DIALECTS),
        *((dialect, supports) for dialect in ("openai", "llama.cpp_old") for supports in (NEWER, OLDER)),
    ],
)
def test_what_a_server_understands_is_found_once(tmp_path, dialect, supports):
    known = {"response_format"} if any(name.startswith("json") for name in supports) else set()
    with Server(seed=3, dialect=dialect, supports=[*supports, *known]) as server:
        assert generate(server, tmp_path, "--rows", 100, "--tasks-per-request", 5) == 0
        refused = [entry for entry in server.log if entry["status"] in (400, 422, 500)]
        assert len(refused) <= 4 and server.log[-1] not in refused
        assert generate(server, tmp_path, "--rows", 160, "--tasks-per-request", 5) == 0
        assert [entry for entry in server.log if entry["status"] in (400, 422, 500)] == refused


def test_a_server_that_is_down_for_a_while(unbroken, tmp_path):
    with Server(seed=3, faults=ANSWERS | ODD, down_after=12, down_for_s=1.5) as server:
        assert generate(server, tmp_path, "--rows", 600, "--backoff", "0.05") == 0
        down = sum(entry["outcome"] == "down" for entry in server.log)
    assert 0 < down < 80, "it was hammered"
    assert (tmp_path / "dataset.json").read_bytes() == (unbroken / "dataset.json").read_bytes()


def test_a_rate_limit_is_kept_to(tmp_path):
    with Server(seed=3, rate_limit_rpm=1200, rate_burst=10) as server:
        assert generate(server, tmp_path, "--rows", 600, "--backoff", "0.05") == 0
        outcomes = server.stats()["outcomes"]
    assert outcomes["answered"] >= 30 and sum(outcomes.values()) < 2.5 * outcomes["answered"]


def test_help_names_every_flag_with_its_default():
    said = command("data_gen.generate", "--help").stdout
    for action in module.build_parser()._actions:
        assert all(flag in said for flag in action.option_strings)
    assert said.count("(default:") >= 25
    assert Path(ROOT / "data_gen" / "prices.json").exists()


def test_a_dataset_lacks_the_requests_before_its_last_and_one_that_is_not_full_all_without_an_answer(tmp_path):
    """A replay is done once the dataset is full and lacks none."""
    with contextlib.closing(Ledger(tmp_path)) as ledger:

        def ask(request, *kinds):
            attempt, intent = ledger.prepare_intent(request, "-", "m", 5)
            ledger.commit([intent, *(ledger.prepare_outcome(attempt, kind, 200, "{}") for kind in kinds)])

        def replay(is_full):
            curator = SimpleNamespace(is_full=is_full, last_request=2, add_outcome=lambda entry: None)
            return module.replay_ledger(ledger, curator, quiet=True), module.list_missing(ledger, curator)

        for request, *kinds in (0, "answer"), (1, "lost"), (2, "refused"), (3,), (4, "answer"), (5, "failed"):
            ask(request, *kinds)
        assert replay(True) == ("replayed", [1]) and replay(False) == ("replayed", [1, 3, 5])
        ask(1, "answer")
        assert replay(True) == ("done", []) and replay(False) == ("replayed", [3, 5])
