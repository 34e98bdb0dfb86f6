"""Many requests at once: engine.serve beside other servers with OpenAI's API, of the same weights, in turns.

python -m scripts.speed.serving --model DIR --json FILE --peer 'llama.cpp=python scripts/serving/llama_cpp_server.py
    smollm2-bf16.gguf {port} 2 32 256' --peer 'transformers=transformers serve DIR --port {port} --device cpu'

Every server is a process of its own, and idle while another is asked. In each round each of them gets --requests
instructions of the seed tasks at the same moment, greedy, streamed. An answer's tokens are counted by the model's own
tokenizer, whoever wrote it. Told are tokens a second, the server's CPU time a token, and the time to the first token.
"""

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import torch

from data_gen.api.prompt import read_seed_tasks
from engine.text.tokenizer_files import load_tokenizer
from kernels.base.commands import run_command
from scripts.base.results import describe_cpu, new_json_parser, summarize, summarize_ratios, today, write_json

OURS = "cria"
START = 300  # seconds that a server may take to be ready


@dataclass
class Peer:
    """A running server, and what each round of it gave."""

    name: str
    url: str
    process: subprocess.Popen
    tokens_per_s: list[float] = field(default_factory=list)
    cpu_ms_a_token: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def cpu_seconds(self) -> float:
        """Return the CPU time that the server's processes have used: all of its session."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                fields = stat.read_text().rpartition(") ")[2].split()
                ticks += (int(fields[11]) + int(fields[12])) * (int(fields[3]) == self.process.pid)
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def start_server(name: str, command: str, log: Path) -> Iterator[Peer]:
    """Run a server until the context ends; its command says {port}. Raises RuntimeError if it does not serve."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = shlex.split(command.format(port=port))
    with open(log, "w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline, url = time.monotonic() + START, f"http://127.0.0.1:{port}"
        while not is_up(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name}: {shlex.join(words)} does not serve:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield Peer(name, url, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def is_up(url: str) -> bool:
    """Return whether a server lists its models."""
    try:
        return bool(json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=10))["data"])
    except (urllib.error.URLError, ConnectionError, TimeoutError, KeyError, ValueError):
        return False


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str, n_tokens: int) -> tuple[float, str]:
    """Return the seconds to the first text of an answer, and the answer."""
    began, first, text = time.monotonic(), 0.0, ""
    messages = [{"role": "user", "content": prompt}]
    stream = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=n_tokens, temperature=0, stream=True
    )
    async for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first = first or time.monotonic() - began
            text += piece
    return first, text


async def ask_all(peer: Peer, prompts: list[str], n_tokens: int) -> list[tuple[float, str]]:
    """Return ask() of all prompts, asked at the same moment."""
    async with openai.AsyncOpenAI(base_url=f"{peer.url}/v1", api_key="none", timeout=1800, max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        return await asyncio.gather(*(ask(client, model, prompt, n_tokens) for prompt in prompts))


def measure_round(peer: Peer, prompts: list[str], n_tokens: int, tokenizer) -> None:
    """Ask a server everything at once, and add what it took to its lists."""
    cpu, began = peer.cpu_seconds(), time.monotonic()
    answers = asyncio.run(ask_all(peer, prompts, n_tokens))
    seconds, cpu = time.monotonic() - began, peer.cpu_seconds() - cpu
    n = sum(len(tokenizer.encode(text)) for _, text in answers)
    peer.tokens_per_s.append(n / seconds)
    peer.cpu_ms_a_token.append(1000 * cpu / n)
    peer.first_token_s.append(statistics.median(first for first, _ in answers))
    peer.texts = [text for _, text in answers]
    print(f"{peer.name:14} {n} tokens in {seconds:.1f} s, {1000 * cpu / n:.2f} CPU ms a token", file=sys.stderr)


def describe_peers(peers: list[Peer]) -> dict:
    """Return each server's figures, and ours beside each other's, round by round."""
    ours = next(peer for peer in peers if peer.name == OURS)
    found = {}
    for peer in peers:
        found[peer.name] = {
            "tokens_per_s": summarize(peer.tokens_per_s),
            "cpu_ms_a_token": summarize(peer.cpu_ms_a_token),
            "first_token_s": summarize(peer.first_token_s),
            "equal_answers": sum(a == b for a, b in zip(peer.texts, ours.texts, strict=True)),
            "ours_over_it": summarize_ratios(ours.tokens_per_s, peer.tokens_per_s),
            "its_cpu_over_ours": summarize_ratios(peer.cpu_ms_a_token, ours.cpu_ms_a_token),
        }
    return found


def main() -> None:
    """Print a line for each round of each server, and write the figures."""
    parser = new_json_parser(__doc__)
    parser.add_argument("--model", required=True, help="what engine.serve serves, a folder")
    parser.add_argument("--dtype", default="bf16", help="of engine.serve's weights (default: bf16)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="another server")
    parser.add_argument("--requests", type=int, default=32, help="at once (default: 32)")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most (default: 48)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each server is asked (default: 3)")
    parser.add_argument("--logs", type=Path, default=Path("out/serving"), help="folder of the servers' logs")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    ours = (
        f"{sys.executable} -m engine.serve --port {{port}} --model {args.model} --dtype {args.dtype} "
        f"--max-concurrency {args.requests} --max-length 256"
    )
    commands = {OURS: ours} | dict(peer.split("=", 1) for peer in args.peer)
    prompts = [task["instruction"] for task in read_seed_tasks() if not task["input"]][: args.requests]
    tokenizer = load_tokenizer(Path(args.model))
    with contextlib.ExitStack() as stack:
        peers = [
            stack.enter_context(start_server(name, command, args.logs / f"{name.replace(' ', '_')}.log"))
            for name, command in commands.items()
        ]
        for peer in peers:
            asyncio.run(ask_all(peer, prompts[:2], 4))
        for _ in range(args.rounds):
            for peer in peers:
                measure_round(peer, prompts, args.tokens, tokenizer)
    facts = {
        "what": f"{args.requests} requests at once, greedy, at most {args.tokens} tokens each, in turns",
        "model": Path(args.model).name, "dtype": args.dtype, "torch": torch.__version__, "date": today(),
        "load_average": os.getloadavg()[0], "rounds": args.rounds,
    }  # fmt: skip
    found = describe_peers(peers)
    write_json(args.json, facts | describe_cpu() | {"servers": found})
    for name, figures in found.items():
        print(
            f"{name:14} {figures['tokens_per_s']['median']:7.1f} tokens/s, "
            f"{figures['cpu_ms_a_token']['median']:6.2f} CPU ms a token, first token after "
            f"{figures['first_token_s']['median']:.2f} s, ours {figures['ours_over_it']['median']:.2f} times as many, "
            f"{figures['its_cpu_over_ours']['median']:.2f} times its CPU, {figures['equal_answers']} answers equal ours"
        )


if __name__ == "__main__":
    run_command(main)
