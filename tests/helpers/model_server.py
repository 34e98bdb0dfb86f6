"""An OpenAI-compatible chat endpoint over weights that engine.formats reads, with real constrained decoding.

    with Server(load("smollm2-135m"), items=3) as server:                  # threads of this process
        openai.OpenAI(base_url=server.base_url, api_key="x").chat.completions.create(...)
    python tests/helpers/model_server.py --port 0 --items 3                        # a process; prints {"base_url": ...}

Under a response_format of type json_schema every token that would leave the schema has no chance, as under llama.cpp's
grammars or vLLM's structured output: what the schema fixes is fed, what it leaves open is sampled. Requests that come
together run in one batch, each from a generator of its own. `server.log` has an entry for each request.
"""

import argparse
import hashlib
import itertools
import json
import queue
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F

import kernels
from engine.base.device import cpu_multiplies_bf16
from engine.inference.generation import sample
from engine.serving.models import load_model
from engine.text.templates import Row, encode_prompt, find_stop_ids

FORMATS = ("json_schema",)
OPTIONS = ("minItems", "maxItems", "title", "description")  # of a schema, without effect here


@dataclass(frozen=True)
class Options:
    items: int = 20  # of a list, at most
    at_least: int = 1  # items of a list, before the model may end it
    string_tokens: int = 200  # of a string, after which it is closed
    batch: int = 8  # requests that run together
    formats: tuple = FORMATS  # response_formats that are honoured
    refuses: bool = True  # other ones, with a 400; else they are ignored


# ---- the schema -----------------------------------------------------------------------------------------------------
# What is still to be written is a tuple of parts, the next one first: ("text", bytes), as it stands; ("string", bytes),
# the inside of a string and what stands of an unfinished escape or character; ("more", parts of an item, how many at
# least, how many at most).


class Unsupported(ValueError):
    """A request that the server cannot serve."""


def parts_of(schema, least, most) -> tuple:
    """Return the parts of a JSON document under the schema: strings, objects of required fields, lists of an item."""
    if not isinstance(schema, dict):
        raise Unsupported(f"Invalid schema: {schema!r} is not an object")
    if unknown := set(schema) - {"type", "properties", "required", "additionalProperties", "items", *OPTIONS}:
        raise Unsupported(f"Invalid schema for response_format: {', '.join(sorted(unknown))} is not supported")
    kind = schema.get("type")
    if kind == "string":
        return ("text", b'"'), ("string", b"")
    if kind == "array":
        item = parts_of(schema.get("items"), least, most)
        return ("text", b"["), *item, ("more", item, least - 1, most - 1)
    if kind != "object" or not schema.get("properties") or set(schema.get("required", ())) != set(schema["properties"]):
        raise Unsupported(f"Invalid schema for response_format: {kind} is not supported, or has optional fields")
    parts = [("text", b"{")]
    for n, (name, inner) in enumerate(schema["properties"].items()):
        parts += [("text", f"{', ' if n else ''}{json.dumps(name)}: ".encode()), *parts_of(inner, least, most)]
    return *parts, ("text", b"}")


def step(parts, byte):
    """Return the parts that are left after one more byte, or None where it cannot stand."""
    if not parts:
        return None
    (kind, value, *rest), then = parts[0], parts[1:]
    if kind == "text":
        if value[0] != byte:
            return None
        return (("text", value[1:]), *then) if len(value) > 1 else then
    if kind == "string":
        if byte == ord('"') and not value:
            return then
        inside = inside_string(value, byte)
        return None if inside is None else (("string", inside), *then)
    least, most = rest
    if byte == ord("]"):
        return then if least <= 0 else None
    return (("text", b" "), *value, ("more", value, least - 1, most - 1), *then) if byte == ord(",") and most else None


def inside_string(unfinished: bytes, byte: int):
    """Return the unfinished escape or UTF-8 character after one more byte: b"" for none, None where it is wrong."""
    now = unfinished + bytes([byte])
    if unfinished.startswith(b"\\"):
        if len(unfinished) == 1:
            return now if byte == ord("u") else b"" if byte in b'"\\/bfnrt' else None
        return None if byte not in b"0123456789abcdefABCDEF" else b"" if len(now) == 6 else now
    if byte < 0x20 or byte == ord('"'):
        return None
    if byte == ord("\\"):
        return None if unfinished else now
    try:
        now.decode()
        return b""
    except UnicodeDecodeError as error:
        return now if error.reason == "unexpected end of data" else None


def after(parts, piece: bytes):
    for byte in piece:
        parts = step(parts, byte)
        if parts is None:
            return None
    return parts


class Vocabulary:
    """The bytes of each id, and which ids can stand where."""

    def __init__(self, tokenizer):
        self.pieces = {id: piece for id, piece in tokenizer._pieces.items() if piece}
        self.strings, self.masks = {}, {}

    def in_string(self, unfinished):
        """(ids that stay inside a string, [(id, bytes that begin with the quote that ends it)])."""
        if unfinished not in self.strings:
            inside, ending = [], []
            for id, piece in self.pieces.items():
                state = unfinished
                for at, byte in enumerate(piece):
                    if byte == ord('"') and not state:
                        ending.append((id, piece[at:]))
                        break
                    state = inside_string(state, byte)
                    if state is None:
                        break
                else:
                    inside.append(id)
            self.strings[unfinished] = inside, ending
        return self.strings[unfinished]

    def allowed(self, parts) -> torch.Tensor:
        """Return the ids that may come next."""
        if parts not in self.masks:
            if parts[0][0] == "string":
                inside, ending = self.in_string(parts[0][1])
                quoted = (("string", b""), *parts[1:])
                ids = inside + [id for id, rest in ending if after(quoted, rest) is not None]
            else:
                ids = [id for id, piece in self.pieces.items() if after(parts, piece) is not None]
            self.masks[parts] = torch.tensor(ids)
        return self.masks[parts]


class Guide:
    """Where an answer stands in its schema."""

    def __init__(self, schema, vocabulary, options):
        self.parts, self.vocabulary = parts_of(schema, options.at_least, options.items), vocabulary
        self.string_tokens = self.room = options.string_tokens  # room: tokens for the string that is being written

    def fixed(self) -> bytes:
        """Return what the schema, or a limit, leaves no choice about; it is passed over."""
        text = b""
        while self.parts:
            kind, value, *rest = self.parts[0]
            if kind == "text":
                now = value
            elif kind == "more" and (rest[0] > 0 or not rest[1]):
                now = b"," if rest[1] else b"]"
            elif kind == "string" and not value and self.room <= 0:
                now, self.room = b'"', self.string_tokens
            else:
                break
            text, self.parts = text + now, after(self.parts, now)
        return text

    def allowed(self):
        return self.vocabulary.allowed(self.parts)

    def take(self, id):
        left = after(self.parts, self.vocabulary.pieces[id])
        in_same_string = self.parts[0][0] == "string" and self.parts[1:] == left[1:]
        self.parts, self.room = left, self.room - 1 if in_same_string else self.string_tokens


# ---- the model ------------------------------------------------------------------------------------------------------


@dataclass
class Weights:
    model: object
    tokenizer: object
    vocabulary: Vocabulary
    name: str


def load(name, dtype=None) -> Weights:
    dtype = dtype or (torch.bfloat16 if cpu_multiplies_bf16() else torch.float32)
    model, tokenizer, _ = load_model(str(name), torch.device("cpu"), dtype, "ref")
    return Weights(model, tokenizer, Vocabulary(tokenizer), Path(name).stem)


@dataclass
class Sequence:
    """A request on its way through the model."""

    pending: list  # ids that the model has not seen: the prompt, then what was sampled or is fixed
    room: int  # tokens that the answer may still take
    temperature: float
    top_p: float
    guide: Guide | None
    generator: torch.Generator
    answer: list = field(default_factory=list)
    finish: str = ""
    left: bool = False  # the client hung up
    done: threading.Event = field(default_factory=threading.Event)
    seen: int = 0  # tokens in k and v
    k: torch.Tensor | None = None  # (layers, tokens at most, K, Dh)
    v: torch.Tensor | None = None

    def write(self, ids):
        """Takes ids into the answer, as far as there is room."""
        ids = ids[: self.room]
        self.pending, self.answer, self.room = self.pending + ids, self.answer + ids, self.room - len(ids)

    def take(self, logits, tokenizer, stops):
        """Return the next token from logits (V,), and what is fixed behind it; sets finish at the end."""
        logits = logits.float()
        if self.guide:
            allowed = self.guide.allowed()
            logits = torch.full_like(logits, -torch.inf).index_copy(0, allowed, logits[allowed])
        id = sample(logits, self.temperature, self.top_p, self.generator)
        if not self.guide and id in stops:
            self.finish = "stop"
            return
        self.write([id])
        if self.guide:
            self.guide.take(id)
        self.end_or_go_on(tokenizer)

    def end_or_go_on(self, tokenizer):
        room = self.room
        fixed = tokenizer.encode(self.guide.fixed().decode()) if self.guide else []
        self.write(fixed)
        if self.guide and not self.guide.parts and len(fixed) <= room:
            self.finish = "stop"
        elif self.room == 0:
            self.finish = "length"


class Step:
    """The cache of one forward over several sequences, each with as many new tokens as it has pending."""

    documents = None

    def __init__(self, sequences):
        self.sequences = sequences

    def attend_in_layer(self, i, cos, sin):
        def attend(qkv):
            n_kv_heads, at, out = self.sequences[0].k.shape[2], 0, []
            q, k, v = qkv.split((qkv.shape[1] - 2 * n_kv_heads, n_kv_heads, n_kv_heads), dim=1)
            q, k = kernels.rope(q, k, cos, sin, "ref")
            for s in self.sequences:
                n = len(s.pending)
                new, end = slice(at, at + n), s.seen + n
                s.k[i, s.seen : end], s.v[i, s.seen : end] = k[new], v[new]
                past = (t[i, :end].transpose(0, 1)[None] for t in (s.k, s.v))  # (1, K, S, Dh)
                mask = torch.ones(n, end, dtype=torch.bool).tril(s.seen)
                o = F.scaled_dot_product_attention(q[new].transpose(0, 1)[None], *past, mask, enable_gqa=True)
                out.append(o[0].transpose(0, 1))
                at += n
            return torch.cat(out).flatten(1)

        return attend


class Decoder(threading.Thread):
    """The thread that the model runs in: whatever is waiting joins the others before each forward."""

    def __init__(self, weights, batch):
        super().__init__(daemon=True)
        self.weights, self.batch, self.waiting = weights, batch, queue.Queue()
        self.stops = find_stop_ids(weights.tokenizer, "chatml")
        self.stopping = False

    @torch.inference_mode()
    def run(self):
        running = []
        while not self.stopping:
            while len(running) < self.batch and not (running and self.waiting.empty()):
                sequence = self.waiting.get()
                if sequence is None:
                    return
                running.append(sequence)
            self.forward(running)
            for s in running:
                if s.left:
                    s.finish = "abort"
                if s.finish:
                    s.k = s.v = None
                    s.done.set()
            running = [s for s in running if not s.finish]

    def forward(self, running):
        model, tokenizer = self.weights.model, self.weights.tokenizer
        c = model.config
        for s in running:
            if s.k is None:
                shape = (c.n_layers, len(s.pending) + s.room, c.n_kv_heads, c.head_dim)
                s.k, s.v = (torch.empty(shape, dtype=model.norm.dtype) for _ in "kv")
                s.end_or_go_on(tokenizer)  # a schema begins with what is fixed
        tokens = torch.tensor([id for s in running for id in s.pending])
        positions = torch.cat([torch.arange(s.seen, s.seen + len(s.pending)) for s in running])
        ends = torch.tensor([len(s.pending) for s in running]).cumsum(0) - 1
        logits = model.logits(model(tokens, positions, cache=Step(running))[ends])
        for s, row in zip(running, logits, strict=True):
            s.seen, s.pending = s.seen + len(s.pending), []
            if not s.finish:
                s.take(row, tokenizer, self.stops)


# ---- HTTP -----------------------------------------------------------------------------------------------------------


class HTTP(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


class Server:
    """The endpoint, on loopback, from __enter__ to __exit__. log: a dict for each chat request, in order of arrival."""

    def __init__(self, weights, port=0, **options):
        self.weights, self.options = weights, Options(**options)
        self.log, self.numbers = [], itertools.count()
        self.decoder = Decoder(weights, self.options.batch)
        handler = type("Bound", (Handler,), {"server_": self})
        self.http = HTTP(("127.0.0.1", port), handler)
        self.base_url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self):
        self.decoder.start()
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.decoder.stopping = True
        self.decoder.waiting.put(None)
        self.http.shutdown()
        self.http.server_close()
        self.decoder.join()

    def sequence(self, body) -> Sequence:
        """Raises Unsupported."""
        messages = body.get("messages")
        try:
            row = Row("request", tuple((m["role"], m["content"] + "") for m in messages))
            prompt = encode_prompt(row, self.weights.tokenizer, "chatml")
        except (KeyError, TypeError, IndexError) as error:
            raise Unsupported("messages: wanted a list of {role, content}") from error
        context = self.weights.model.config.max_seq_len
        room = body.get("max_completion_tokens", body.get("max_tokens", context - len(prompt)))
        if not isinstance(room, int) or room < 1 or len(prompt) + room > context:
            raise Unsupported(f"max_tokens: {room} behind {len(prompt)} of the prompt, wanted 1 to {context} in all")
        guide, wanted = None, body.get("response_format") or {"type": "text"}
        if wanted.get("type") in self.options.formats:
            schema = (wanted.get("json_schema") or {}).get("schema")
            guide = Guide(schema, self.weights.vocabulary, self.options)
        elif wanted.get("type") != "text" and self.options.refuses:
            raise Unsupported(f"response_format of type {wanted.get('type')} is not supported")
        seed = body.get("seed")
        if seed is None:  # the same request draws the same numbers
            seed = int.from_bytes(hashlib.sha256(json.dumps(messages).encode()).digest()[:7], "big")
        sampling = float(body.get("temperature", 1)), float(body.get("top_p", 1))
        return Sequence(prompt, room, *sampling, guide, torch.Generator().manual_seed(seed))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_: Server

    def log_message(self, *_):
        pass

    def reply(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, message):
        self.reply(status, {"error": {"message": message, "type": "invalid_request_error", "code": status}})

    def do_GET(self):
        if self.path != "/v1/models":
            return self.refuse(404, f"no such path: {self.path}")
        self.reply(200, {"object": "list", "data": [{"id": self.server_.weights.name, "object": "model"}]})

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/v1/chat/completions":
            return self.refuse(404, f"no such path: {self.path}")
        server, number = self.server_, next(self.server_.numbers)
        try:
            body = json.loads(raw)
            told = (body.get("response_format") or {}).get("type")
        except (ValueError, AttributeError):
            return self.refuse(400, "the body is no JSON object")
        entry = {"status": 400, "messages": body.get("messages"), "format": told, "finish_reason": None}
        server.log.append(entry)
        try:
            sequence = server.sequence(body)
        except ValueError as error:
            return self.refuse(400, str(error))
        entry["status"], n_prompt = 200, len(sequence.pending)
        server.decoder.waiting.put(sequence)
        while not sequence.done.wait(0.05):
            if not server.decoder.is_alive():
                return self.refuse(500, "the model's thread has ended")
            sequence.left = sequence.left or self.hung_up()
        n_answer = len(sequence.answer)
        entry |= {"finish_reason": sequence.finish, "prompt_tokens": n_prompt, "completion_tokens": n_answer}
        if sequence.finish == "abort":
            self.close_connection = True
            return
        message = {"role": "assistant", "content": server.weights.tokenizer.decode(sequence.answer)}
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_answer, "total_tokens": n_prompt + n_answer}
        self.reply(
            200,
            {
                "id": f"chatcmpl-{number}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": server.weights.name,
                "choices": [{"index": 0, "message": message, "finish_reason": sequence.finish}],
                "usage": usage,
            },
        )

    def hung_up(self):
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


def main():
    flags = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flags.add_argument("--model", default="smollm2-135m", help="a folder, a .gguf, a name")
    flags.add_argument("--port", type=int, default=0)
    flags.add_argument("--items", type=int, default=Options.items, help="of a list, at most")
    flags.add_argument("--at-least", type=int, default=Options.at_least, help="items of a list")
    flags.add_argument("--string-tokens", type=int, default=Options.string_tokens, help="of a string, at most")
    flags.add_argument("--batch", type=int, default=Options.batch, help="requests that run together")
    flags.add_argument("--formats", nargs="*", default=FORMATS, help="response_formats that are honoured")
    flags.add_argument("--ignores", dest="refuses", action="store_false", help="other formats; else they are refused")
    options = vars(flags.parse_args())
    with Server(load(options.pop("model")), options.pop("port"), **options) as server:
        print(json.dumps({"base_url": server.base_url}), flush=True)
        server.decoder.join()


if __name__ == "__main__":
    main()
