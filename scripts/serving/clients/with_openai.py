"""OpenAI's Python client against a server: with_openai.py URL prints a JSON line for each feature."""

import asyncio
import json
import sys

import openai

URL = sys.argv[1]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
MODEL = client.models.list().data[0].id
ASKED = [{"role": "user", "content": "Name three fruits."}]
SCHEMA = {
    "type": "object", "properties": {"fruits": {"type": "array", "items": {"type": "string"}, "maxItems": 2}},
    "required": ["fruits"], "additionalProperties": False,
}  # fmt: skip


def tell(feature: str, is_right: bool, got: object) -> None:
    """Print the line of one feature."""
    print(json.dumps({"feature": feature, "right": bool(is_right), "got": str(got)[:60]}), flush=True)


def chat(**options):
    """Ask for a short greedy answer."""
    return client.chat.completions.create(
        model=MODEL, **{"messages": ASKED, "max_tokens": 12, "temperature": 0, **options}
    )


def fail(kind: type, **options) -> tuple[bool, str]:
    """Return whether a request is refused with that class of error and a message, and the message."""
    try:
        chat(**options)
    except kind as error:
        return bool(error.message), error.message
    except openai.OpenAIError as error:
        return False, repr(error)
    return False, "an answer"


plain = chat()
text = plain.choices[0].message.content
tell("plain", text and plain.choices[0].finish_reason in ("stop", "length"), text)
tell("usage", plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens, plain.usage)
chunks = list(chat(stream=True))
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
tell("streaming", streamed == text and all(chunk.usage is None for chunk in chunks), streamed)
*_, last = chat(stream=True, stream_options={"include_usage": True})
tell("streaming with usage", last.usage and last.usage == plain.usage and not last.choices, last.usage)
two = chat(n=2, temperature=1, seed=1)
again = chat(n=2, temperature=1, seed=1)
texts = [choice.message.content for choice in two.choices]
tell("n and seed", len(set(texts)) == 2 and texts == [choice.message.content for choice in again.choices], texts)
stop = text.split()[1]
tell("stop", chat(stop=[stop]).choices[0].message.content == text[: text.index(stop)], chat(stop=[stop]).choices[0])
logged = chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
joined = b"".join(bytes(token.bytes) for token in logged).decode()
tell("logprobs", joined == text and all(len(token.top_logprobs) == 2 for token in logged), joined)
schema = {"type": "json_schema", "json_schema": {"name": "fruits", "schema": SCHEMA, "strict": True}}
written = json.loads(chat(response_format=schema, max_tokens=120).choices[0].message.content)
tell("json_schema", set(written) == {"fruits"} and len(written["fruits"]) <= 2, written)
content = chat(response_format={"type": "json_object"}, max_tokens=200).choices[0]
tell("json_object", content.finish_reason == "length" or isinstance(json.loads(content.message.content), dict), content)
legacy = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=6, temperature=0, logprobs=1)
tell("completions", legacy.choices[0].text and len(legacy.choices[0].logprobs.tokens) == 6, legacy.choices[0].text)
long = [{"role": "user", "content": "word " * 5000}]
is_right, message = fail(openai.BadRequestError, messages=long)
tell("too long", is_right and "context_length_exceeded" in message, message)
try:
    client.chat.completions.create(model="nothing", messages=ASKED)
except openai.NotFoundError as error:
    tell("unknown model", error.code == "model_not_found", error.message)
tell("a wrong value", *fail(openai.BadRequestError, temperature=9))


async def many() -> list[str]:
    """Return eight greedy answers asked for at once."""
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none") as asynchronous:
        asked = (
            asynchronous.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=12, temperature=0)
            for _ in range(8)
        )
        return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]


answers = asyncio.run(many())
tell("eight at once", set(answers) == {text}, answers)
