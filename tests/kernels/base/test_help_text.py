"""The parser of the commands: defaults as they are, and no flag by its first letters."""

import pytest

from kernels.base import help_text
from kernels.base.help_text import HelpParser


@pytest.fixture
def parser():
    parser = HelpParser("kernels.it", "Does it.\n\n    python -m kernels.it --on")
    parser.add_argument("--on", action="store_true", help="one")
    parser.add_argument("--off", action="store_false", help="other")
    parser.add_argument("--minutes", type=float, default=10, help="time")
    parser.add_argument("--chip", nargs="+", choices=["a", "b"], default=["a", "b"], help="chips")
    parser.add_argument("--op", nargs="+", choices=["a", "b"], default=["b"], help="ops")
    parser.add_argument("--json", help="file")
    parser.add_argument("--model", required=True, help="which")
    return parser


def test_help_tells_every_default_as_it_is(parser):
    text = " ".join(parser.format_help().split())
    for said in ("one (default: off)", "other (default: on)", "time (default: 10)", "chips (default: all)",
                 "ops (default: b)", "file (default: none)", "which"):  # fmt: skip
        assert said in text
    assert "which (default" not in text and text.endswith("python -m kernels.it --on")


@pytest.mark.parametrize(("more", "n_lines"), [(-1, 1), (0, 1), (1, 2)])
def test_an_example_is_as_wide_as_a_line(more, n_lines):
    """Two blanks before it, and the line is full."""
    command = "python -m kernels.it " + "x" * (help_text.WIDTH - 2 - 21 - 2 + more) + " y"
    lines = help_text.wrap_example(command).split("\n")
    assert len(lines) == n_lines and max(map(len, lines)) <= help_text.WIDTH
    assert [word for line in lines for word in line.removesuffix("\\").split()] == command.split()


def test_half_a_flag_is_refused(parser, capsys):
    assert parser.parse_args(["--model", "x", "--minutes", "3"]).minutes == 3
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--model", "x", "--minu", "3"])
    assert stop.value.code == 2 and "unrecognized arguments: --minu" in capsys.readouterr().err
