"""Tables on a terminal and elsewhere."""

import io
import re

import pytest

from engine.planning.tables import format_duration, print_table


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_on_a_terminal_keep_to_its_width(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    print_table(
        "A title",
        ("GB", "with"),
        [("1.50", "--optimizer-states 8bit --recompute block " * 2), ("12.00", "b")],
        terminal,
    )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert lines[0].strip() == "A title" and max(map(len, lines)) <= width
    assert any(line.startswith("12.00  b") for line in lines) and any(line.startswith(" 1.50  --") for line in lines)
    plain = io.StringIO()
    print_table("A title", ("GB", "with"), [("1.50", "a"), ("12.00", "b")], plain)
    assert plain.getvalue() == "A title\n     GB  with\n   1.50  a\n  12.00  b\n\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7100, "118 min"), (7200, "2.0 h")]
)
def test_a_duration_has_the_unit_that_suits_it(seconds, text):
    assert format_duration(seconds) == text
