"""data_gen.generate against real servers of SmolLM2-135M: what each takes, keeps to, bills, and how its run ends.

python -m scripts.serving.data_servers --json benchmarks/data_servers.json [--environments FOLDER]

llama.cpp's server (as the package xllamacpp carries it), llama-cpp-python's (compiled from its source, some ten
minutes of a C++ compiler) and `transformers serve` are installed into environments of their own; --environments keeps
them. Each run is killed (SIGKILL) once some answers are recorded and some are in flight, and the same command goes
on. Exits 1 if a recorded request is sent again, or if the bill is not the usage of the recorded answers. Needs a
network or an index of packages.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from data_gen.api.answers import read_answer
from data_gen.api.dialect import keeps_format
from data_gen.api.prompt import FORMATS
from kernels.base.commands import run_command
from scripts.base.environment import make_environment
from scripts.base.results import ROOT, describe_cpu, new_parser, today, write_json

PACKAGES = {  # of each server's environment
    "llama.cpp": ("xllamacpp",),
    "llama-cpp-python": ("llama-cpp-python[server]==0.3.16",),
    "transformers": ("torch==2.13.0", "transformers==5.24.0", "fastapi", "uvicorn", "openai", "accelerate"),
}
VERSIONED = {"llama.cpp": "xllamacpp", "llama-cpp-python": "llama_cpp_python", "transformers": "transformers"}
PRICES = ("--price-in", "0.1", "--price-out", "0.4")
AT_ONCE, LENGTH = 4, 2048  # requests in flight, and tokens of each with its answer
START_S = 600  # for a server to be there
PATH = re.compile(r"(?:/[\w.-]+){2,}")  # in an error of a server
LEFT_OUT = re.compile(r"^[\d,]+ of [\d,]+ rows · |/(?:dataset|ledger)\.")  # progress, and paths of this machine


def find_port() -> int:
    """Return a port that was free just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def make_command(name: str, commands: Path, models: dict[str, Path], port: int) -> list[str]:
    """Return the command of a server, whose environment has this folder of commands."""
    if name == "llama.cpp":
        program = str(Path(__file__).with_name("llama_cpp_server.py"))
        numbers = (port, 1, AT_ONCE, LENGTH)  # its threads wait busily for each other, where others want the cores
        return [str(commands / "python"), program, str(models[name]), *map(str, numbers)]
    if name == "llama-cpp-python":
        flags = ("--model", str(models[name]), "--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(LENGTH))
        return [str(commands / "python"), "-m", "llama_cpp.server", *flags, "--n_threads", "1"]
    return [str(commands / "transformers"), "serve", str(models[name]), "--host", "127.0.0.1", "--port", str(port)]


@contextlib.contextmanager
def start_server(command: list[str], port: int, log: Path) -> Iterator[str]:
    """Run a server until the context ends, and yield its address. Raise RuntimeError with its log if it never comes."""
    url = f"http://127.0.0.1:{port}/v1"
    # Without our path: transformers would take our folder kernels/ for the package kernels of Hugging Face's Hub.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent, env=environment)
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{url}/models", timeout=10).read()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not serve:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.kill()
        process.wait()


def query(out: Path, sql: str) -> list[tuple]:
    """Return the rows of a query of the ledger in a folder, none before there is one."""
    if not (out / "ledger.sqlite").exists():
        return []
    db = sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True)
    with contextlib.closing(db), contextlib.suppress(sqlite3.OperationalError):  # the tables are not there yet
        return db.execute(sql).fetchall()
    return []


def list_done(out: Path) -> set[int]:
    """Return the requests whose answers are recorded."""
    return {n for (n,) in query(out, "SELECT request FROM received JOIN sent USING (attempt) WHERE kind = 'answer'")}


def list_sent(out: Path) -> list[tuple[int, int]]:
    """Return (attempt, request) of all attempts."""
    return query(out, "SELECT attempt, request FROM sent")


def start_run(url: str, model: str, out: Path, options) -> subprocess.Popen:
    """Start data_gen.generate in a process of its own."""
    flags = ["--base-url", url, "--model", model, *PRICES, "--rows", "1000", "--max-usd", str(options.max_usd)]
    flags += ["--tasks-per-request", "3", "--examples", "1", "--max-output-tokens", str(options.max_output_tokens)]
    flags += ["--concurrency", str(AT_ONCE), "--timeout", "900", "--patience", "1000", "--out", str(out)]
    command = [sys.executable, "-m", "data_gen.generate", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def measure(url: str, model: str, out: Path, options) -> dict:
    """Run data_gen.generate, kill it once, let the same command go on to its end, and return what came of it."""
    process = start_run(url, model, out, options)
    while len(list_done(out)) < options.kill_after or len(list_sent(out)) == len(list_done(out)):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before it was killed:\n{process.stdout.read()}")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    done, sent = list_done(out), list_sent(out)
    process = start_run(url, model, out, options)
    said_again = process.communicate()[0]
    run = json.loads((out / "run.json").read_text())
    kept = [request for attempt, request in list_sent(out) if (attempt, request) not in sent and request in done]
    return {
        "told_before_the_kill": drop_progress(said), "told_after": drop_progress(said_again),
        "exit_code": process.returncode, "status": run["status"], "counts": run["counts"], "cost": run["cost"],
        "recorded_at_the_kill": len(done), "in_flight_at_the_kill": len(sent) - len(done),
        "recorded_and_sent_again": len(kept), **describe_answers(out),
    }  # fmt: skip


def drop_progress(said: str) -> list[str]:
    """Return the lines of a run without those of its progress and those with paths."""
    return [line for line in said.splitlines() if not LEFT_OUT.search(line)]


def describe_answers(out: Path) -> dict:
    """Return what the recorded answers show: the format, how many keep to it, and the dollars of their usages."""
    bodies = query(out, "SELECT body FROM received WHERE kind = 'answer'")
    ((dialect,),) = query(out, "SELECT value FROM setting WHERE name = 'dialect'")
    format = json.loads(dialect)["format"]
    answers = [read_answer(body) for (body,) in bodies]
    whole = [answer for answer in answers if answer.finish_reason != "length"]
    refusals = query(out, "SELECT status, substr(body, 1, 300) FROM received WHERE kind = 'failed'")
    usages = [json.loads(body)["usage"] for (body,) in bodies]
    prices = (float(PRICES[1]), float(PRICES[3]))
    usd = sum(u["prompt_tokens"] * prices[0] + u["completion_tokens"] * prices[1] for u in usages) / 1e6
    return {
        "format": format, "usage_usd": usd, "cut_by_the_limit": len(answers) - len(whole),
        "refusals": [(status, PATH.sub("PATH", said)) for status, said in refusals],
        "whole": len(whole), "whole_in_the_format": sum(keeps_format(a.text, FORMATS[format]) for a in whole),
    }  # fmt: skip


def export_models(folder: Path) -> dict[str, Path]:
    """Write SmolLM2-135M as each server reads it: a GGUF in q8_0, and Hugging Face's layout."""
    models = {"llama.cpp": folder / "model.gguf", "transformers": folder / "model"}
    for path, flags in zip(models.values(), (("--layout", "gguf", "--gguf-type", "q8_0"), ()), strict=True):
        subprocess.run([sys.executable, "-m", "engine.export", *flags, "--out", str(path)], cwd=ROOT, check=True)
    return models | {"llama-cpp-python": models["llama.cpp"]}


def main() -> int:
    """Measure each server, and return 1 if a request was paid for twice or the bill is not that of the usages."""
    parser = new_parser(__doc__)
    parser.add_argument("--json", required=True, help="where the figures go")
    parser.add_argument("--environments", type=Path, help="folder that keeps the servers' environments")
    parser.add_argument("--only", choices=list(PACKAGES), help="one server alone; the others' figures stay")
    parser.add_argument("--max-usd", type=float, default=0.0025, help="cap of each run")
    parser.add_argument("--max-output-tokens", type=int, default=200)
    parser.add_argument("--kill-after", type=int, default=2, help="answers after which the run is killed")
    options = parser.parse_args()
    path, servers = Path(options.json), {}
    if options.only and path.exists():
        servers = json.loads(path.read_text())["servers"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = export_models(folder)
        for name in [options.only] if options.only else PACKAGES:
            commands, installed = make_environment((options.environments or folder) / name, PACKAGES[name])
            port, log = find_port(), folder / f"{name}.log"
            with start_server(make_command(name, commands, models, port), port, log) as url:
                servers[name] = measure(url, str(models[name]), folder / f"out-{name}", options)
            servers[name]["version"] = f"{VERSIONED[name]} {installed[VERSIONED[name]]}"
            print(name, json.dumps(servers[name], indent=1), flush=True)
            write_json(path, {"servers": servers, "date": today(), **describe_cpu()})
    wrong = [
        name for name, found in servers.items()
        if found["recorded_and_sent_again"] or abs(found["usage_usd"] - found["cost"]["spent_usd"]) > 1e-9
    ]  # fmt: skip
    print("a request was sent twice, or the bill is wrong: " + ", ".join(wrong) if wrong else "every bill is right")
    return int(bool(wrong))


if __name__ == "__main__":
    run_command(main)
