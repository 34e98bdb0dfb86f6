"""A crowd of good, bad and vanishing clients against engine.serve: what each got, and what they left behind.

python -m scripts.serving.crowd [--requests 1000] [--at-once 64] [--model smollm2-135m] [--json FILE]

Every client is drawn from KINDS by a seed: answers and streams, clients that vanish before, while or after they ask,
bodies that never end, are too large or no JSON, and requests that another site's page would send. The server's memory,
threads and open files are told at the start (once every kind has been there), half way and at the end, when no answer
may be left. Exits 1 if a client got what its kind does not expect.
"""

import asyncio
import json
import random
import re
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.progress import Progress

from kernels.base.commands import run_command
from scripts.base.results import describe_cpu, new_parser, today, write_json
from scripts.serving.server import Served, serve_model

SLOWEST = 3  # --timeout of the server: seconds until a body must be there
LARGEST = 100_000  # --max-body-bytes
BUSY = "503"  # with Retry-After: the queue was full

Client = Callable[["Door", random.Random], Awaitable[str]]


class Door:
    """How a client comes in: a connection of its own, written and read as bytes, since no library sends what is bad."""

    def __init__(self, port: int):
        self.port = port

    async def send(self, body: bytes, length: int | None = None, host: str = "", more: str = "") -> tuple:
        """Connect and send a chat's request. length: what Content-Length says. Return (reader, writer)."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host or f'127.0.0.1:{self.port}'}\r\n{more}"
            f"Content-Type: application/json\r\nContent-Length: {len(body) if length is None else length}\r\n"
            "Connection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        return reader, writer

    async def ask(self, body: bytes, **how) -> tuple[str, bytes]:
        """Send a request and return the status and the whole response."""
        reader, writer = await self.send(body, **how)
        answer = b""
        try:
            answer = await reader.read()
        except ConnectionResetError:  # the server refused the body before all of it was sent
            pass
        finally:
            writer.close()
        status = re.match(rb"HTTP/1.1 (\d+)", answer)
        return status[1].decode() if status else "closed", answer


def chat(draw: random.Random, **more) -> bytes:
    """Return the body of a question for a short answer."""
    question = f"Name {draw.randint(2, 9)} {draw.choice(['fruits', 'rivers', 'colours', 'tools'])}."
    messages = [{"role": "user", "content": question}]
    return json.dumps({"messages": messages, "max_tokens": draw.randint(1, 8), **more}).encode()


async def take_answer(door: Door, draw: random.Random) -> str:
    """Ask and read the answer."""
    status, answer = await door.ask(chat(draw))
    if status != "200":
        return status
    return "answer" if b'"finish_reason"' in answer else "no answer"


async def take_stream(door: Door, draw: random.Random) -> str:
    """Ask for a stream and read it to its end."""
    status, answer = await door.ask(chat(draw, stream=True))
    return "stream" if status == "200" and b"data: [DONE]" in answer else status


async def vanish_in_a_stream(door: Door, draw: random.Random) -> str:
    """Leave in the midst of a stream of a long answer."""
    reader, writer = await door.send(chat(draw, stream=True, max_tokens=400))
    await reader.read(draw.randint(1, 900))
    writer.transport.abort()
    return "left"


async def vanish_while_waiting(door: Door, draw: random.Random) -> str:
    """Leave before an answer has come."""
    _, writer = await door.send(chat(draw, max_tokens=400))
    await asyncio.sleep(draw.random() / 4)
    writer.transport.abort()
    return "left"


async def vanish_in_a_body(door: Door, draw: random.Random) -> str:
    """Leave in the midst of one's own request."""
    body = chat(draw)
    _, writer = await door.send(body[: len(body) // 2], length=len(body))
    writer.transport.abort()
    return "left"


async def never_finish(door: Door, draw: random.Random) -> str:
    """Send half of a body, and wait."""
    body = chat(draw)
    return (await door.ask(body[: len(body) // 2], length=len(body)))[0]


async def send_too_much(door: Door, draw: random.Random) -> str:
    """Send a body over the limit."""
    return (await door.ask(chat(draw, user="x" * LARGEST)))[0]


async def send_no_json(door: Door, draw: random.Random) -> str:
    """Send a body that a random byte has made no JSON."""
    return (await door.ask(b"{" + draw.randbytes(draw.randint(1, 200)) + b"\xff"))[0]


async def ask_too_much(door: Door, draw: random.Random) -> str:
    """Ask with more tokens than the model takes."""
    return (await door.ask(chat(draw, messages=[{"role": "user", "content": "word " * 3000}])))[0]


async def come_from_elsewhere(door: Door, draw: random.Random) -> str:
    """Ask as a page of another site would."""
    return (await door.ask(chat(draw), more="Origin: https://example.com\r\n"))[0]


async def name_another_host(door: Door, draw: random.Random) -> str:
    """Ask under a name that another site gave this address."""
    return (await door.ask(chat(draw), host="example.com"))[0]


KINDS: tuple[tuple[Client, int, set[str]], ...] = (  # weight, what it may get
    (take_answer, 30, {"answer", BUSY}),
    (take_stream, 20, {"stream", BUSY}),
    (vanish_in_a_stream, 10, {"left"}),
    (vanish_while_waiting, 10, {"left"}),
    (vanish_in_a_body, 5, {"left"}),
    (never_finish, 4, {"408"}),
    (send_too_much, 5, {"413"}),
    (send_no_json, 5, {"400"}),
    (ask_too_much, 5, {"400"}),
    (come_from_elsewhere, 3, {"403"}),
    (name_another_host, 3, {"403", "421"}),
)


async def send_crowd(served: Served, n: int, at_once: int, draw: random.Random, advance: Callable[[], None]) -> Counter:
    """Let n clients come, so many at once. Return how many of each kind got what."""
    door, found, places = Door(int(served.url.rpartition(":")[2])), Counter(), asyncio.Semaphore(at_once)

    async def come(client: Client, seed: int) -> None:
        async with places:
            try:
                got = await client(door, random.Random(seed))
            except OSError as error:
                got = type(error).__name__
        found[client.__name__, got] += 1
        advance()

    clients, weights = zip(*((client, weight) for client, weight, _ in KINDS), strict=True)
    drawn = [*clients, *draw.choices(clients, weights, k=n)][:n]
    await asyncio.gather(*(come(client, draw.getrandbits(32)) for client in drawn))
    return found


def read_gauge(served: Served, name: str) -> float:
    """Return one number of /metrics."""
    text = urllib.request.urlopen(f"{served.url}/metrics", timeout=60).read().decode()
    found = re.search(rf"^{name} (\S+)$", text, re.M)
    if not found:
        raise RuntimeError(f"/metrics has no {name}")
    return float(found[1])


async def describe(served: Served) -> dict:
    """Return what the server holds, once no answer is being written or waited for."""
    while await asyncio.to_thread(read_gauge, served, "cria_answers_running") or await asyncio.to_thread(
        read_gauge, served, "cria_answers_waiting"
    ):
        await asyncio.sleep(0.1)
    files = len(list(Path(f"/proc/{served.pid}/fd").iterdir()))
    return {"resident_mb": round(served.resident_mb(), 1), "threads": served.n_threads(), "files": files}


async def watch_crowd(served: Served, n: int, at_once: int, advance: Callable[[], None]) -> dict:
    """Return what n clients got, and what the server held before, half way and after."""
    draw, got, held = random.Random(0), Counter(), []
    for part in (2 * at_once, n // 2, n - n // 2):
        found = await send_crowd(served, part, at_once, draw, advance)
        held.append(await describe(served))
        got += found
    return {"got": [{"kind": kind, "got": what, "n": n} for (kind, what), n in sorted(got.items())], "held": held}


def main() -> int:
    """Print what each kind got, and what the server held."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="what is served (default: smollm2-135m)")
    parser.add_argument("--requests", type=int, default=1000, help="clients, beside those of the start (default: 1000)")
    parser.add_argument("--at-once", type=int, default=64, help="connections at a time (default: 64)")
    parser.add_argument("--json", help="write the figures there")
    args = parser.parse_args()
    limits = ("--max-length", "512", "--timeout", str(SLOWEST), "--max-body-bytes", str(LARGEST))
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_model(("--model", args.model, *limits), Path(folder) / "log") as served,
        Progress() as progress,
    ):
        task = progress.add_task("clients", total=args.requests + 2 * args.at_once)
        found = asyncio.run(watch_crowd(served, args.requests, args.at_once, lambda: progress.advance(task)))
    expected = {client.__name__: may for client, _, may in KINDS}
    wrong = [line for line in found["got"] if line["got"] not in expected[line["kind"]]]
    for line in found["got"]:
        print(f"{line['kind']:22} {line['got']:24} {line['n']:5}{'   WRONG' if line in wrong else ''}")
    for when, held in zip(("before", "half way", "after"), found["held"], strict=True):
        print(f"{when:9} {held['resident_mb']:8.1f} MB, {held['threads']} threads, {held['files']} open files")
    if args.json:
        facts = {"date": today(), "model": args.model, "at_once": args.at_once, "requests": args.requests}
        write_json(args.json, facts | describe_cpu() | found)
    return int(bool(wrong))


if __name__ == "__main__":
    run_command(main)
