"""Blocks of the report's HTML: texts, examples and tables."""

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from typing import Any

from data_gen.page.formatting import as_text, clip_text, format_count

EXAMPLE_CHARS, SAMPLE_CHARS = 300, 3000  # of one text at most
FOLDED_CHARS = 600  # a longer text of a sample is folded here
ENTRIES = 100  # of a table at most


def render_passage(text: str) -> str:
    """Return the HTML of a text with its line ends."""
    return f'<div class="text">{escape(text)}</div>'


def render_folded(text: str) -> str:
    """Return the HTML of a sample's text. The end of a long one is folded."""
    text = clip_text(text, SAMPLE_CHARS)
    if not text.strip():
        return '<p class="note">empty</p>'
    if len(text) <= FOLDED_CHARS * 1.3:
        return render_passage(text)
    cut = max(text.rfind(" ", 0, FOLDED_CHARS), text.rfind("\n", 0, FOLDED_CHARS)) + 1
    cut = cut if cut > FOLDED_CHARS / 2 else FOLDED_CHARS
    more = f"<summary>{format_count(len(text) - cut)} characters more</summary>{render_passage(text[cut:])}"
    return f'{render_passage(text[:cut].rstrip())}<details class="more">{more}</details>'


def render_field(label: str, value: Any, is_first: bool = False) -> str:
    """Return the HTML of an example's labelled text. A blank one gives "", unless it is the first of its card."""
    text = clip_text(as_text(value), EXAMPLE_CHARS)
    if not text.strip() and not is_first:
        return ""
    label = f'<span class="label">{escape(label)}</span>'
    return f'<div class="{"prompt" if is_first else "field"}">{label}{render_passage(text)}</div>'


def render_table(entries: Mapping[Any, Any]) -> str:
    """Return a table of two columns with the first ENTRIES keys and values."""
    words = {"None": "-", "True": "yes", "False": "no"}
    rows = ""
    for key, value in list(entries.items())[:ENTRIES]:
        cell = clip_text(words.get(str(value)) or as_text(value), 300)
        rows += f"<tr><th>{escape(clip_text(as_text(key), 100))}</th><td>{escape(cell)}</td></tr>"
    return f'<table class="two">{rows}</table>'


def hash_inline_block(text: str) -> str:
    """Return the hash by which a content security policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
