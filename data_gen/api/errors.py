"""What a server's errors mean: those with an error status, and those inside of a 200."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

RETRIED = {408, 409, 425, 429}  # and every 5xx
OVERLOADED = {408, 429, 503, 504, 524, 529}
GAVE_UP = {504, 524}  # a proxy gave up; the server behind it may go on, and bill
OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_funds")
BLOCKED = ("content_policy", "content_filter", "invalid_prompt", "moderation", "safety system", "responsibleai")
CODES = ("code", "status", "status_code", "statuscode", "http_code", "error_code")  # fields that may hold a status
ERRORS = ("error", "errors", "detail", "message", "msg", "error_msg", "error_message")  # fields that may hold an error
# The status that an error's words stand for where it names none, the first that fits. Any other is a 500.
WORDS = {
    400: BLOCKED,
    402: (
        *OUT_OF_MONEY, "insufficient credit", "insufficient balance", "insufficient quota", "insufficient fund",
        "out of credit", "payment required", "current quota", "billing",
    ),
    429: ("rate limit", "rate_limit", "ratelimit", "too many requests", "resource_exhausted", "throttl", "slow down"),
    401: (
        "unauthorized", "unauthenticated", "api key", "api_key", "apikey", "authentication", "authorization",
        "credential", "access token",
    ),
    503: ("overloaded", "unavailable", "capacity", "busy", "loading", "try again"),
    408: ("timed out", "timeout", "time-out", "deadline exceeded"),
    404: (
        "unexpected endpoint", "unknown endpoint", "endpoint or method", "not found", "not_found", "no such",
        "no route", "does not exist", "cannot post", "invalid url", "unknown url", "unknown model", "no models loaded",
    ),
    403: ("forbidden", "permission", "not allowed", "access denied"),
    422: (
        "invalid_request", "invalid request", "bad request", "invalid_argument", "unsupported", "not supported",
        "unrecognized", "unknown parameter", "response_format", "max_tokens", "temperature", "context length",
        "context size", "extra inputs", "invalid value",
    ),
}  # fmt: skip


def classify_error(status: int, text: str) -> str:
    """Return the kind of a Reply with an error status. "failed" is worth another try."""
    text = text.lower()
    if any(code in text for code in OUT_OF_MONEY):
        return "fatal"
    if status == 429 and "request too large" in text:  # for the limit of a minute: it will never fit
        return "unsupported"
    if status in RETRIED or status >= 500:
        return "failed"
    if status in (400, 403, 422) and any(word in text for word in BLOCKED):
        return "refused"  # 403: a router's moderation
    return "fatal" if status in (401, 402, 403, 404) else "unsupported"


def read_json(text: str) -> Any:
    """Return the value of a JSON text, None for any other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def find_error(found: Any) -> int | None:
    """Return the status that the error in a parsed 200 stands for, None for a body that holds no error.

    The error stands in place of the answer, or in its first choice, which then may hold the beginning of an answer.
    """
    if isinstance(found, list) and len(found) == 1:  # as Gemini wraps its errors
        found = found[0]
    if not isinstance(found, dict):
        return None
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict):
        if choice.get("error") or choice.get("finish_reason") == "error":
            return read_status(choice.get("error") or found.get("error"), found)
        message = choice.get("message")
        if isinstance(message, dict) and message.get("content"):  # an answer, whatever stands beside it
            return None
    if found.get("error"):
        return read_status(found["error"], found)
    if choices is None and any(is_error(found.get(name)) for name in ERRORS):
        return read_status(next(found[name] for name in ERRORS if is_error(found.get(name))), found)
    return None


def is_error(value: Any) -> bool:
    """Return whether a field under a name of ERRORS holds an error: a text or a list of errors."""
    return bool(value) and isinstance(value, str | list)


def read_status(error: Any, body: Mapping[str, Any]) -> int:
    """Return the status that an error names, or that its words stand for."""
    if isinstance(error, list) and error:
        error = error[0]
    places = [place for place in (error, body) if isinstance(place, dict)]
    for place in places:
        fields = {str(name).lower(): value for name, value in place.items()}
        for name in CODES:
            code = str(fields.get(name) or "")
            if len(code) == 3 and code.isascii() and code.isdigit() and 400 <= int(code) < 600:
                return int(code)
    words = " ".join(list_texts(error if error else body if is_bare(body) else None))[:4000].lower()
    return next((status for status, known in WORDS.items() if any(word in words for word in known)), 500)


def is_bare(body: Mapping[str, Any]) -> bool:
    """Return whether a body holds no choices, whose texts would be taken for an error's words."""
    return not body.get("choices")


def list_texts(value: Any, depth: int = 3) -> list[str]:
    """Return the texts in a value, down to this many levels."""
    if isinstance(value, str):
        return [value]
    if depth and isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [text for one in list(inner)[:100] for text in list_texts(one, depth - 1)]
    return []


def extract_message(body: str) -> str:
    """Return the message in an error's body, whatever the body's structure."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        found = json.loads(body)
        found = found[0] if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict) else found
        found = found.get("error") or find_choice_error(found) or found.get("detail") or found.get("message") or found
        if isinstance(found, dict):
            found = found.get("message") or found
        if said := " ".join(str(found).split()):  # blanks say nothing: the whole body then tells what there is
            return said[:300]
    return " ".join(body.split())[:300] or "an empty answer"


def find_choice_error(found: Mapping[str, Any]) -> Any:
    """Return the error in the first choice of a body, None without one."""
    with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):
        return found["choices"][0].get("error")
    return None
