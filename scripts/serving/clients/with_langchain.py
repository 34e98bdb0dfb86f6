"""LangChain's ChatOpenAI against a server: with_langchain.py URL prints a JSON line for each feature."""

import json
import sys

import openai
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

URL = sys.argv[1]
MODEL = openai.OpenAI(base_url=f"{URL}/v1", api_key="none").models.list().data[0].id
ASKED = [SystemMessage("You are brief."), HumanMessage("Name three fruits.")]
SCHEMA = {
    "title": "fruits", "description": "some fruits", "type": "object",
    "properties": {"fruits": {"type": "array", "items": {"type": "string"}, "maxItems": 2}},
    "required": ["fruits"], "additionalProperties": False,
}  # fmt: skip


def tell(feature: str, is_right: bool, got: object) -> None:
    """Print the line of one feature."""
    print(json.dumps({"feature": feature, "right": bool(is_right), "got": str(got)[:60]}), flush=True)


def model(**options):
    """Return a short greedy model."""
    settings = {"max_tokens": 12, "temperature": 0, "max_retries": 0, **options}
    return ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, **settings)


plain = model().invoke(ASKED)
text = plain.content
tell("plain", text, text)
tell("usage", plain.usage_metadata["total_tokens"] > 0, plain.usage_metadata)
chunks = list(model().stream(ASKED))
streamed = "".join(chunk.content for chunk in chunks)
tell("streaming", streamed == text, streamed)
merged = list(model(stream_usage=True).stream(ASKED))
whole = sum(merged[1:], merged[0])
tell("streaming with usage", whole.usage_metadata == plain.usage_metadata, whole.usage_metadata)
made = model(n=2, temperature=1, seed=1).generate([ASKED]).generations[0]
tell("n", len({choice.text for choice in made}) == 2, [choice.text for choice in made])
stop = text.split()[1]
tell("stop", model().invoke(ASKED, stop=[stop]).content == text[: text.index(stop)], stop)
logged = model(logprobs=True, top_logprobs=2).invoke(ASKED).response_metadata["logprobs"]["content"]
tell("logprobs", "".join(token["token"] for token in logged) == text, len(logged))
written = model(max_tokens=120).with_structured_output(SCHEMA, method="json_schema").invoke(ASKED)
tell("json_schema", set(written) == {"fruits"} and len(written["fruits"]) <= 2, written)
try:
    model().invoke([HumanMessage("word " * 5000)])
except ContextOverflowError as error:
    tell("too long", True, error)
try:
    model().invoke(ASKED, top_p=9)
except openai.BadRequestError as error:
    tell("a wrong value", True, error)
batch = model().batch([ASKED] * 4)
tell("four at once", {answer.content for answer in batch} == {text}, len(batch))
