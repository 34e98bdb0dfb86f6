"""A dataset as large as Alpaca's, built from a server that fails on purpose: what it takes, and what kill -9 changes.

    python -m scripts.speed.data_gen --json benchmarks/data_gen.json

tests/helpers/openai_server.py answers, in a process of its own. Three runs of data_gen.generate, which must give one dataset
byte for byte: one that is let alone, one that is killed (SIGKILL) at random moments and given again each time, one in
batches. The server's log must show no request again whose answer was in the ledger when the run was killed.
"""

import argparse
import json
import os
import platform
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import rapidfuzz

from data_gen.api.ledger import Ledger
from data_gen.api.prompt import Prompter, read_seed_tasks
from data_gen.rows import curator as curate
from data_gen.rows.curator import Curator
from scripts.speed.data import cpu_name

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PRICES = ("--price-in", "0.10", "--price-out", "0.40")
ANSWERS = {"truncated": 0.03, "malformed": 0.01, "refusal": 0.005, "content_filter": 0.005, "wrong_schema": 0.01}
ANSWERS |= {"no_usage": 0.01, "prose": 0.02, "content_policy_400": 0.005}  # whenever the request is answered
ATTEMPTS = {"429_ms": 0.002, "500": 0.01, "502_html": 0.005, "reset": 0.005, "reset_body": 0.005, "html_200": 0.002}


class Server:
    """The fault server in a process of its own, with a log of a line a request."""

    def __init__(self, folder, latency_s, faults):
        self.log = folder / "server.jsonl"
        flags = ("--seed", "7", "--faults", json.dumps(faults), "--latency-s", str(latency_s), "--log", str(self.log))
        command = [sys.executable, str(ROOT / "tests" / "openai_server.py"), "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.base_url = json.loads(self.process.stdout.readline())["base_url"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def entries(self, first=0):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines[first:]]

    def arrived(self):
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0


def generate(server, out, options, *more):
    flags = ["--base-url", server.base_url, "--model", "fault-server", *PRICES, "--rows", str(options.rows), "--quiet"]
    flags += ["--concurrency", str(options.concurrency), "--backoff", "0.2", "--out", str(out), *more]
    environment = os.environ | {"OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "data_gen.generate", *flags], cwd=ROOT, env=environment)


def finished(process):
    """Wall and CPU seconds and the peak memory of a process that must end well."""
    start = time.monotonic()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"data_gen.generate ended with {process.returncode}")
    figures = {"wall_s": time.monotonic() - start, "cpu_s": usage.ru_utime + usage.ru_stime}
    return figures | {"peak_memory_bytes": usage.ru_maxrss * 1024}


def unbroken(server, out, options, *more):
    figures = finished(generate(server, out, options, *more))
    told = json.loads((out / "run.json").read_text())
    entries = server.entries()
    billed = sum(entry.get("billed", False) for entry in entries)
    return figures | {
        "counts": told["counts"],
        "cost": told["cost"],
        "requests_billed": billed,
        "requests_at_the_server": len(entries),
    }


def recorded(out):
    """Requests whose outcome is in the ledger."""
    if not (out / "ledger.sqlite").exists():
        return set()
    with sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        sql = "SELECT request FROM received JOIN sent USING (attempt) WHERE kind IN ('answer', 'refused')"
        return {number for (number,) in db.execute(sql)}


def killed(server, out, options, requests):
    """options.kills kills spread over the run at random, then on to its end."""
    from openai_server import request_key

    rng, prompter, known, start = random.Random(11), Prompter(read_seed_tasks()), [], time.monotonic()
    step = requests / (options.kills + 1)
    for kill in range(options.kills):
        process, target = generate(server, out, options), (kill + rng.random()) * step
        while server.arrived() < target or server.arrived() == (known[-1][0] if known else 0):
            if process.poll() is not None:
                raise SystemExit(f"the run was done before kill {kill + 1}; fewer --kills")
            time.sleep(0.005)
        time.sleep(0.2 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)  # what was in flight arrives in the log
        known.append((server.arrived(), {request_key(prompter.messages(number)) for number in recorded(out)}))
        print(f"kill {kill + 1}: {len(known[-1][1]):,} requests recorded", flush=True)
    finished(generate(server, out, options))
    log = [entry["key"] for entry in server.entries() if "key" in entry]
    again = sum(len(keys & set(log[arrived:])) for arrived, keys in known)
    told = json.loads((out / "run.json").read_text())
    return {
        "kills": options.kills,
        "recorded_at_kills": [len(keys) for _, keys in known],
        "recorded_and_sent_again": again,
        "wall_s": time.monotonic() - start,
        "requests_at_the_server": len(log),
        "cost": told["cost"],
    }


def stages(out, options):
    """CPU seconds of a replay by what takes them, in this process."""
    spent = dict.fromkeys(("parse", "tidy and filters", "de-duplication"), 0.0)

    def timed(name, call):
        def wrapper(*args):
            start = time.process_time()
            try:
                return call(*args)
            finally:
                spent[name] += time.process_time() - start

        return wrapper

    plain = {name: getattr(curate, name) for name in ("parse", "tidy", "defect")}
    for name, stage in zip(plain, ("parse", "tidy and filters", "tidy and filters"), strict=True):
        setattr(curate, name, timed(stage, plain[name]))
    start, ledger = time.process_time(), Ledger(out, create=False)
    curator = Curator(options.rows, read_seed_tasks())
    curator.index.add = timed("de-duplication", curator.index.add)
    for entry in ledger.done():
        curator.take(entry)
    ledger.close()
    for name, call in plain.items():
        setattr(curate, name, call)
    return spent | {"all": time.process_time() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency-s", type=float, default=0.5, help="of an answer at the server")
    parser.add_argument("--keep", type=Path, help="folder to leave the datasets in")
    parser.add_argument("--json", required=True, help="where the figures go")
    options = parser.parse_args()
    load, faults = os.getloadavg()[0], ANSWERS | ATTEMPTS
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder)
        runs = {}
        for name in ("unbroken", "killed", "batches"):
            (root / name).mkdir(parents=True, exist_ok=True)
            with Server(root / name, options.latency_s, ANSWERS if name == "batches" else faults) as server:
                out = root / name / "out"
                if name == "killed":
                    runs[name] = killed(server, out, options, runs["unbroken"]["requests_at_the_server"])
                else:
                    runs[name] = unbroken(
                        server, out, options, *(("--batch", "--poll", "1") if name == "batches" else ())
                    )
            print(name, json.dumps(runs[name], indent=1), flush=True)
            if name == "unbroken":
                replay = stages(root / name / "out", options)
                print("replay", json.dumps(replay, indent=1), flush=True)
        datasets = {(root / name / "out" / "dataset.json").read_bytes() for name in runs}
        result = {
            "what": f"{options.rows} rows by data_gen.generate from a server that fails on purpose",
            "identical": len(datasets) == 1,
            "runs": runs,
            "replay_cpu_s": replay,
            "server": {"latency_s": options.latency_s, "faults": faults, "concurrency": options.concurrency},
            "peak_memory_bytes_of_replay": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "load_average": load,
            "python": platform.python_version(), "openai": openai.__version__, "rapidfuzz": rapidfuzz.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
    Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    print("identical:", result["identical"])
    if not result["identical"] or runs["killed"]["recorded_and_sent_again"]:
        raise SystemExit("the datasets differ, or a recorded request was sent again")


if __name__ == "__main__":
    main()
