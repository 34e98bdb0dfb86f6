"""Prompts to be answered, of a text file or of a dataset file."""

from pathlib import Path

from engine.base.errors import DataError
from engine.data.data_files import has_rows
from engine.data.rows import read_rows
from engine.text.templates import Row


def read_prompts(path: Path) -> list[Row]:
    """Return the rows of the file --prompts; one that is not JSON has one prompt a line. Raise DataError for none."""
    try:
        if path.stat().st_size and has_rows(path):
            return read_rows([path], None, require_answers=False, with_tools=True)[0]
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: cannot be read ({error}); give a UTF-8 text, JSON or JSONL file") from None
    rows = [Row(f"{path.name}:{n}", None, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise DataError(f"--prompts {path}: holds no prompt; write one a line")
    return rows


def ask_for(row: Row) -> str:
    """Return the question of a row in one text: the last one of a chat, or an instruction with its input."""
    if row.messages:
        return next(text for role, text in reversed(row.messages) if role == "user")
    return f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
