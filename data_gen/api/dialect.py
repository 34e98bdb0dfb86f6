"""The part of the API that a server understands, the body of a request in it, and whether an answer keeps to it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data_gen.api.errors import read_json
from data_gen.api.prompt import FORMATS

# From the most exact to none. llama-cpp-python knows no json_schema, and enforces a schema beside json_object.
FORMAT_NAMES = ("json_schema", "json_object+schema", "json_object", "text")
TYPES = {"object": dict, "array": list, "string": str}


@dataclass(frozen=True)
class Dialect:
    """The part of the API that a server understands. It begins with everything; each refusal leaves something out."""

    format: str = FORMAT_NAMES[0]
    limit: str = "max_completion_tokens"  # or max_tokens
    temperature: bool = True

    def drop_refused(self, refusal: str) -> "Dialect | None":
        """Return the dialect to try after a refusal, or None if the refusal names nothing that we can leave out."""
        text = refusal.lower()
        if self.temperature and "temperature" in text:
            return replace(self, temperature=False)
        other = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}[self.limit]
        if re.search(rf"\b{self.limit}\b", text):
            return replace(self, limit=other)
        if any(word in text for word in ("response_format", "json_schema", "json_object", "schema", "grammar")):
            return self.lower_format()
        return None

    def lower_format(self) -> "Dialect | None":
        """Return the dialect with the next less exact format, or None below text."""
        lower = FORMAT_NAMES[FORMAT_NAMES.index(self.format) + 1 :][:1]
        return replace(self, format=lower[0]) if lower else None


@dataclass(frozen=True)
class Sampling:
    """The fields that every request has besides its messages."""

    model: str
    max_output_tokens: int
    temperature: float
    extra: dict[str, Any] = field(default_factory=dict)  # fields of --extra, which replace others

    def build_body(
        self, messages: list[dict[str, str]], dialect: Dialect, formats: Mapping[str, Any] = FORMATS
    ) -> dict[str, Any]:
        """Return the body of a request."""
        body: dict[str, Any] = {"model": self.model, "messages": messages, dialect.limit: self.max_output_tokens}
        if dialect.temperature:
            body["temperature"] = self.temperature
        if formats[dialect.format]:
            body["response_format"] = formats[dialect.format]
        return body | self.extra


def keeps_format(text: str, format: Mapping[str, Any] | None) -> bool:
    """Return whether a whole answer is what its response_format asked for."""
    if not format:
        return True
    value = read_json(text.strip().lstrip("\ufeff"))
    schema = format.get("schema") or format.get("json_schema", {}).get("schema") or {"type": "object"}
    return fits_schema(value, schema)


def fits_schema(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a JSON value fits a schema of objects, arrays and strings."""
    if not isinstance(value, TYPES[schema["type"]]):
        return False
    if isinstance(value, list):
        return "items" not in schema or all(fits_schema(one, schema["items"]) for one in value)
    if isinstance(value, str):
        return value in schema.get("enum", (value,))
    known = schema.get("properties", {})
    if not set(schema.get("required", ())) <= set(value):
        return False
    if schema.get("additionalProperties") is False and not set(value) <= set(known):
        return False
    return all(fits_schema(value[name], inner) for name, inner in known.items() if name in value)
