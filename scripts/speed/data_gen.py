"""A dataset as large as Alpaca's, built from a server that fails on purpose, and built again under kill -9.

    python -m scripts.speed.data_gen --json benchmarks/data_gen.json

tests/helpers/openai_server.py answers, in a process of its own. Three runs of data_gen.generate must give one dataset,
byte for byte: an unbroken run, a run that is killed (SIGKILL) at random moments and started again each time, and a run
in batches. The server's log must show no second request whose answer was in the ledger at the time of a kill.
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
from data_gen.base.cli import run_for_reader
from data_gen.rows import curator as curate
from data_gen.rows.curator import Curator
from scripts.base.results import ROOT, describe_cpu, new_json_parser, today, write_json
from tests.helpers.openai_server import request_key

PRICES = ("--price-in", "0.10", "--price-out", "0.40")
ANSWER_FAULTS = {  # share of answers, drawn once a request
    "truncated": 0.03, "malformed": 0.01, "refusal": 0.005, "content_filter": 0.005, "wrong_schema": 0.01,
    "no_usage": 0.01, "prose": 0.02, "content_policy_400": 0.005,
}  # fmt: skip
ATTEMPT_FAULTS = {  # share of attempts
    "429_ms": 0.002, "500": 0.01, "502_html": 0.005, "reset": 0.005, "reset_body": 0.005, "html_200": 0.002,
}  # fmt: skip


class Server:
    """The fault server in a process of its own, with one line a request in its log."""

    def __init__(self, folder, latency_s, faults):
        self.log = folder / "server.jsonl"
        flags = ("--seed", "7", "--faults", json.dumps(faults), "--latency-s", str(latency_s), "--log", str(self.log))
        command = [sys.executable, "-m", "tests.helpers.openai_server", "--port", "0", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.base_url = json.loads(self.process.stdout.readline())["base_url"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def read_log(self):
        """Return the log's entries."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def count_requests(self):
        """Return the number of requests that have arrived."""
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0


def start_generate(server, out, options, *more):
    """Start data_gen.generate in a process of its own."""
    flags = ["--base-url", server.base_url, "--model", "fault-server", *PRICES, "--rows", str(options.rows), "--quiet"]
    flags += ["--concurrency", str(options.concurrency), "--backoff", "0.2", "--out", str(out), *more]
    environment = os.environ | {"OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "data_gen.generate", *flags], cwd=ROOT, env=environment)


def wait_for(process):
    """Return wall and CPU seconds and the peak memory of a process that must end with exit code 0."""
    start = time.monotonic()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"data_gen.generate ended with {process.returncode}")
    figures = {"wall_s": time.monotonic() - start, "cpu_s": usage.ru_utime + usage.ru_stime}
    return figures | {"peak_memory_bytes": usage.ru_maxrss * 1024}


def read_run(out):
    """Return the run.json of a dataset's folder."""
    return json.loads((out / "run.json").read_text())


def measure_unbroken_run(server, out, options, *more):
    """Run data_gen.generate to its end and return its figures and the server's counts."""
    figures = wait_for(start_generate(server, out, options, *more))
    run, entries = read_run(out), server.read_log()
    return figures | {
        "counts": run["counts"], "cost": run["cost"],
        "requests_billed": sum(entry.get("billed", False) for entry in entries),
        "requests_at_the_server": len(entries),
    }  # fmt: skip


def recorded_requests(out):
    """Return the numbers of the requests whose outcome is in the ledger."""
    if not (out / "ledger.sqlite").exists():
        return set()
    with sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        sql = "SELECT request FROM received JOIN sent USING (attempt) WHERE kind IN ('answer', 'refused')"
        return {number for (number,) in db.execute(sql)}


def measure_killed_run(server, out, options, n_requests):
    """Kill the run options.kills times, at random moments spread over n_requests, and let it end after the last."""
    rng, prompter, known, start = random.Random(11), Prompter(read_seed_tasks()), [], time.monotonic()
    requests_a_kill = n_requests / (options.kills + 1)
    for kill in range(options.kills):
        process, target = start_generate(server, out, options), (kill + rng.random()) * requests_a_kill
        at_last_kill = known[-1][0] if known else 0
        while server.count_requests() < target or server.count_requests() == at_last_kill:
            if process.poll() is not None:
                raise SystemExit(f"the run was done before kill {kill + 1}; fewer --kills")
            time.sleep(0.005)
        time.sleep(0.2 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)  # requests in flight arrive in the log
        keys = {request_key(prompter.build_messages(number)) for number in recorded_requests(out)}
        known.append((server.count_requests(), keys))
        print(f"kill {kill + 1}: {len(keys):,} requests recorded", flush=True)
    wait_for(start_generate(server, out, options))
    log = [entry["key"] for entry in server.read_log() if "key" in entry]
    return {
        "kills": options.kills,
        "recorded_at_kills": [len(keys) for _, keys in known],
        "recorded_and_sent_again": sum(len(keys & set(log[n_arrived:])) for n_arrived, keys in known),
        "wall_s": time.monotonic() - start,
        "requests_at_the_server": len(log),
        "cost": read_run(out)["cost"],
    }


def measure_replay(out, options):
    """Replay a ledger in this process and return the CPU seconds of each of its stages."""
    spent = dict.fromkeys(("parse", "tidy and filters", "de-duplication"), 0.0)

    def timed(name, call):
        def wrapper(*args):
            start = time.process_time()
            try:
                return call(*args)
            finally:
                spent[name] += time.process_time() - start

        return wrapper

    plain = {name: getattr(curate, name) for name in ("parse_answer", "repair_item", "find_defect")}
    for name, stage in zip(plain, ("parse", "tidy and filters", "tidy and filters"), strict=True):
        setattr(curate, name, timed(stage, plain[name]))
    start, ledger = time.process_time(), Ledger(out, create=False)
    curator = Curator(options.rows, read_seed_tasks())
    curator.index.add = timed("de-duplication", curator.index.add)
    for entry in ledger.read_outcomes():
        curator.add_outcome(entry)
    ledger.close()
    for name, call in plain.items():
        setattr(curate, name, call)
    return spent | {"all": time.process_time() - start}


def measure_runs(root, options):
    """Make the three datasets in folders of root. Return each run's figures and the replay's of the unbroken one."""
    runs, replay = {}, {}
    for name in ("unbroken", "killed", "batches"):
        (root / name).mkdir(parents=True, exist_ok=True)
        faults = ANSWER_FAULTS if name == "batches" else ANSWER_FAULTS | ATTEMPT_FAULTS
        with Server(root / name, options.latency_s, faults) as server:
            out = root / name / "out"
            if name == "killed":
                runs[name] = measure_killed_run(server, out, options, runs["unbroken"]["requests_at_the_server"])
            else:
                more = ("--batch", "--poll", "1") if name == "batches" else ()
                runs[name] = measure_unbroken_run(server, out, options, *more)
        print(name, json.dumps(runs[name], indent=1), flush=True)
        if name == "unbroken":
            replay = measure_replay(out, options)
            print("replay", json.dumps(replay, indent=1), flush=True)
    return runs, replay


def parse_arguments() -> argparse.Namespace:
    parser = new_json_parser(__doc__)
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency-s", type=float, default=0.5, help="of an answer at the server")
    parser.add_argument("--keep", type=Path, help="folder to leave the datasets in")
    return parser.parse_args()


def main():
    options = parse_arguments()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder)
        runs, replay = measure_runs(root, options)
        datasets = {(root / name / "out" / "dataset.json").read_bytes() for name in runs}
    faults = ANSWER_FAULTS | ATTEMPT_FAULTS
    result = {
        "what": f"{options.rows} rows by data_gen.generate from a server that fails on purpose",
        "identical": len(datasets) == 1, "runs": runs, "replay_cpu_s": replay,
        "server": {"latency_s": options.latency_s, "faults": faults, "concurrency": options.concurrency},
        "peak_memory_bytes_of_replay": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **describe_cpu(), "load_average": load, "python": platform.python_version(), "openai": openai.__version__,
        "rapidfuzz": rapidfuzz.__version__, "date": today(),
    }  # fmt: skip
    write_json(options.json, result)
    print("identical:", result["identical"])
    if not result["identical"] or runs["killed"]["recorded_and_sent_again"]:
        raise SystemExit("the datasets differ, or a recorded request was sent again")


if __name__ == "__main__":
    sys.exit(run_for_reader(main))
