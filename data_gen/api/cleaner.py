"""Secrets: a key that a server echoes, in whatever form, is taken out of its text before anything is kept."""

import base64
import json
import re
from collections.abc import Iterable
from typing import Any

MIN_CHARS = 8  # a shorter key is not hidden: "none" or "EMPTY", for a server without keys, may occur in answers
MARK = "[key]"
BASE64_CHARS = "A-Za-z0-9+/_-"
MAX_DEPTH = 50  # levels of a JSON value that are cleaned


class Cleaner:
    """Puts [key] in place of secrets: as they are, with escapes of JSON, URLs and HTML, in base64 and in hex."""

    def __init__(self, secrets: Iterable[str]):
        known = sorted({one for one in secrets if len(one) >= MIN_CHARS and not one.isalpha()}, key=len, reverse=True)
        forms = [form for one in known for form in (spell_out(one), *list_base64(one), f"(?i:{one.encode().hex()})")]
        self.pattern = re.compile("|".join(forms)) if forms else None

    def clean(self, text: str) -> str:
        """Return a text without the secrets."""
        return self.pattern.sub(MARK, text) if self.pattern else text

    def clean_body(self, text: str) -> str:
        """Return the body of a response without the secrets, neither in its text nor in the values that it decodes to.

        What a list of parts of a text spells out together is looked at too.
        """
        text = self.clean(text)
        if not self.pattern:
            return text
        try:
            value = json.loads(text)
            cleaned = self.clean_value(value, MAX_DEPTH)
            return text if cleaned == value else json.dumps(cleaned, ensure_ascii=False)
        except (ValueError, RecursionError):
            return text

    def clean_value(self, value: Any, depth: int) -> Any:
        """Return a JSON value with every text in it cleaned, and a list of parts joined where it spells a secret."""
        if isinstance(value, str):
            return self.clean(value)
        if depth and isinstance(value, dict):
            return {self.clean(name): self.clean_value(inner, depth - 1) for name, inner in value.items()}
        if depth and isinstance(value, list):
            inner = [self.clean_value(one, depth - 1) for one in value]
            joined = "".join(text for text in map(get_text, inner) if isinstance(text, str))
            return inner if self.clean(joined) == joined else [{"type": "text", "text": self.clean(joined)}]
        return value


def get_text(part: Any) -> Any:
    """Return the text of a part of a message's content."""
    return part.get("text") if isinstance(part, dict) else part


def spell_out(secret: str) -> str:
    r"""Return a pattern of a secret in which each character may be escaped: s, \u0073, \\u0073, \x73, %73, &#115;."""
    return "".join(map(spell_character, secret))


def spell_character(char: str) -> str:
    """Return a pattern of one character and of its escapes."""
    code = f"{ord(char):02x}"
    digits = "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in code)
    plain = re.escape(char) if char.isalnum() else rf"\\{{0,8}}{re.escape(char)}"
    escapes = rf"\\{{1,8}}(?:u(?:00{digits}|\{{0{{0,6}}{digits}\}})|x{digits})"
    return rf"(?:{escapes}|%(?:25){{0,3}}{digits}|&#(?:0{{0,6}}{ord(char)}|[xX]0{{0,6}}{digits});|{plain})"


def list_base64(secret: str) -> list[str]:
    """Return patterns of a secret within base64, at each of the three places where it can begin in a group of three."""
    patterns = []
    for shift in range(3):
        whole = base64.b64encode(b"\0" * shift + secret.encode()).decode().rstrip("=")
        end = len(whole) - (1 if (shift + len(secret.encode())) % 3 else 0)
        core = whole[(0, 2, 3)[shift] : end]  # the characters that the secret alone decides
        spelled = "".join(spell_base64(char) for char in core)
        patterns.append(rf"{spelled}[{BASE64_CHARS}]?(?:=|%3[dD]|\\{{1,8}}u003[dD]){{0,2}}")
    return patterns


def spell_base64(char: str) -> str:
    """Return a pattern of a character of base64 in both of its alphabets."""
    other = {"+": "-", "/": "_"}.get(char)
    return f"(?:{spell_character(char)}|{other})" if other else re.escape(char)
