"""A server that serves the page under the real headers, and streams what a test tells it to as the model's answers."""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from engine.serving.app import PAGE
from engine.serving.guard import HEADERS
from engine.serving.openai_api import ApiError, Choice, Wanted, chat_chunk, count_usage, new_head, read_chat
from engine.serving.pages import read_page


@dataclass
class Canned:
    """One answer. hangs: nothing comes after the chunks, until the client leaves. cut: the stream ends after them."""

    chunks: tuple = ()
    hangs: bool = False
    cut: bool = False
    reason: str = "stop"
    error: ApiError | None = None  # with its status, before anything else
    late_error: str = ""  # after the chunks


@dataclass
class Script:
    """What the server says, and what it has heard."""

    answers: list = field(default_factory=list)
    heard: list[Wanted] = field(default_factory=list)
    key: str = ""
    style: str = "alpaca"
    models: tuple = ("demo",)
    left: threading.Event = field(default_factory=threading.Event)  # a client left a stream that hangs


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "PageServer"

    def log_message(self, *_):
        pass

    def send(self, status, body, kind="application/json", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.begin(status, kind, **{"Content-Length": str(len(body))} | headers)
        self.wfile.write(body)

    def begin(self, status, kind, **headers):
        self.send_response(status)
        for name, value in (HEADERS | {"Content-Type": kind} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def is_allowed(self):
        key = self.server.script.key
        if not key or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.send(401, ApiError(401, "the API key is missing or wrong").body())
        return False

    def do_GET(self):
        script = self.server.script
        if self.path == "/":
            self.send(200, read_page(PAGE).encode(), "text/html; charset=utf-8")
        elif self.path != "/v1/models":
            self.send(404, {})
        elif self.is_allowed():
            models = [{"id": name, "prompt_style": script.style, "max_model_len": 2048} for name in script.models]
            self.send(200, {"object": "list", "data": models})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.is_allowed():
            return
        script = self.server.script
        wanted = read_chat(json.loads(body))  # the real reader: what it refuses fails the test
        assert wanted.stream and wanted.include_usage
        script.heard.append(wanted)
        canned = script.answers.pop(0)
        if canned.error:
            self.send(canned.error.status, canned.error.body(), **{"Retry-After": "0.05"})
            return
        self.begin(200, "text/event-stream", Connection="close")
        self.close_connection = True
        head, choice = new_head("chat.completion", wanted.model), Choice()
        self.event(chat_chunk(head, 0, {"role": "assistant", "content": ""}))
        for text in canned.chunks:
            self.event(chat_chunk(head, 0, {"content": text}))
            choice.n_tokens += 1
        try:
            while canned.hangs:
                self.wfile.write(b": still here\n\n")
                self.server.script.left.wait(0.02)
        except OSError:
            script.left.set()
            return
        if canned.late_error:
            self.event(ApiError(500, canned.late_error).body())
        elif not canned.cut:
            self.event(chat_chunk(head, 0, {}, finish_reason=canned.reason))
            self.event({**head, "choices": [], "usage": count_usage(7, [choice])})
            self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value):
        self.wfile.write(f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode())


class PageServer(ThreadingHTTPServer):
    """Listens on a free port of this machine while it is entered."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = Script()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
