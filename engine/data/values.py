"""Values of rows, whatever file they come from, and what makes a row bad."""

from typing import Any, NamedTuple

MAX_ROW_BYTES = 8 << 20  # thousands of times an Alpaca row; parsing one takes up to 30 times its bytes
NO_KEY = "missing, got the keys"  # of a row without a key that it must have; read_rows looks for both in reasons
NO_UTF8 = "got invalid UTF-8"
KINDS: dict[type, str] = {
    str: "a string",
    float: "a number",
    int: "a number",
    bool: "a boolean",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


class BadRow(ValueError):
    """A row is not usable; the text says why."""


class Record(NamedTuple):
    """What a file holds at one place."""

    number: int  # of the row, counted from 1; the line, where rows are lines
    line: int  # on which it begins, counted from 1; 0 where a file has no lines
    column: int  # of its first character, counted from 1; 0 where no other row begins on its line
    position: int  # bytes of the file before it
    value: Any  # a BadRow where it cannot be read


class Place(str):
    """Where a row was read, as an editor jumps to it: FILE:LINE, or FILE:LINE:COLUMN where rows share a line.

    A row of a file without lines is FILE row N, and one that no file holds has a name alone. The parts are kept beside
    the text, for a path may hold colons.
    """

    __slots__ = ("column", "line", "number", "path")
    path: str
    number: int
    line: int
    column: int

    def __new__(cls, path: str, number: int = 0, line: int = 0, column: int = 0) -> "Place":
        """Return the place of a row, whose number, line and column are those of its Record."""
        text = f"{path}:{line}" if line else f"{path} row {number}" if number else path
        if column:
            text += f":{column}"
        place = super().__new__(cls, text)
        place.path, place.number, place.line, place.column = path, number, line, column
        return place


def name_kind(value: Any) -> str:
    """Return what a value is, as "a string"."""
    return KINDS.get(type(value), f"a {type(value).__name__}")


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: null, an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def require_type(value: Any, kind: type, name: str) -> Any:
    """Return the value. Raise BadRow, with this name, when it is of another type."""
    if not isinstance(value, kind):
        raise BadRow(f"{name}: got {name_kind(value)}, wanted {KINDS[kind]}")
    return value


def get_text(row: dict[str, Any], key: str, prefix: str = "") -> str:
    """Return the string at key. Raise BadRow when it is missing, no string or not encodable."""
    if key not in row:
        raise BadRow(f"{prefix}{key}: {NO_KEY} {shorten(list(row))}")
    return require_text(row[key], prefix + key)


def require_text(value: Any, name: str) -> str:
    """Return a string. Raise BadRow, with this name, when it is none or not encodable.

    JSON may escape half a surrogate pair, which UTF-8 cannot hold.
    """
    text = require_type(value, str, name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise BadRow(f"{name}: got the lone surrogate {lone!r} at character {error.start}") from None
    return text


def shorten(value: Any) -> str:
    """Return the repr of a value, 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
