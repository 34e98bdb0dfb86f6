"""The calls that Open WebUI and LibreChat make: with_web_pages.py URL prints a JSON line for each feature.

Open WebUI 0.12 waits 10 s for the list of models, and reads a stream only where Content-Type is text/event-stream;
LibreChat waits 5 s and reads data[].id. Both send the whole conversation and fields that a server may not know of.
"""

import json
import sys

import httpx

URL = sys.argv[1]
HEADERS = {"Authorization": "Bearer none", "Content-Type": "application/json"}
ASKED = [{"role": "developer", "content": "You are brief."}, {"role": "user", "content": "Name three fruits."}]


def tell(feature: str, is_right: bool, got: object) -> None:
    """Print the line of one feature."""
    print(json.dumps({"feature": feature, "right": bool(is_right), "got": str(got)[:60]}), flush=True)


def read_stream(body: dict) -> tuple[str, list[dict], bool]:
    """Return a stream's Content-Type, its chunks, and whether [DONE] came last."""
    chunks, is_done = [], False
    with httpx.stream("POST", f"{URL}/v1/chat/completions", json=body, headers=HEADERS, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                is_done = line == "data: [DONE]"
                chunks += [] if is_done else [json.loads(line[6:])]
        return response.headers["content-type"], chunks, is_done


def join(chunks: list[dict]) -> dict:
    """Add the deltas of the first choice key by key, as clients do: a role told twice would be one too long."""
    joined: dict = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            for key, value in choice["delta"].items():
                joined[key] = joined.get(key, "") + value
    return joined


models = httpx.get(f"{URL}/v1/models", headers=HEADERS, timeout=5).json()
model = models["data"][0]["id"]
tell("models", models["object"] == "list" and isinstance(model, str), model)
body = {"model": model, "messages": ASKED, "stream": True, "max_tokens": 12, "temperature": 0}
kind, chunks, is_done = read_stream({**body, "stream_options": {"include_usage": True}})
message = join(chunks)
tell("Open WebUI: a stream", kind.startswith("text/event-stream") and is_done, kind)
tell("role once, text added", message["role"] == "assistant" and message["content"], message)
tell("usage last", chunks[-1]["usage"]["total_tokens"] > 0 and chunks[-1]["choices"] == [], chunks[-1]["usage"])
tell("id and created are one", len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1, chunks[0]["id"])
more = {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "user": "65f1", "stop": ["\n\n\n"]}
_, chunks, is_done = read_stream({**body, **more})
tell("LibreChat: its fields", is_done and join(chunks)["content"] == message["content"], join(chunks))
answered = [{"role": "assistant", "content": message["content"]}, {"role": "user", "content": "And one more?"}]
_, chunks, is_done = read_stream({**body, "messages": ASKED + answered})
tell("a second turn", is_done and join(chunks)["content"], join(chunks)["content"])
title = {"model": model, "messages": [{"role": "user", "content": "Give this chat a title."}], "max_tokens": 8}
told = httpx.post(f"{URL}/v1/chat/completions", json={**title, "stream": False}, headers=HEADERS, timeout=120)
tell("a title, not streamed", told.json()["choices"][0]["message"]["content"], told.json()["choices"][0])
wrong = httpx.post(f"{URL}/v1/chat/completions", content=b"{", headers=HEADERS, timeout=60)
tell("an error they can show", wrong.status_code == 400 and wrong.json()["error"]["message"], wrong.json()["error"])
