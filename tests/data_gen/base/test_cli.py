"""Command lines of data_gen: flags, errors of one line, and exit codes."""

import argparse
import importlib
import json
import subprocess
import sys
from decimal import Decimal

import pytest

from data_gen.base import cli
from data_gen.base.cli import (
    DataError,
    Failure,
    Parser,
    Stopped,
    UsageError,
    run_for_exit_code,
    suggest_nearest,
)  # fmt: skip
from tests.helpers.run import ROOT


def flags():
    parser = Parser("thing", "Does a thing.")
    parser.add_argument("--max-usd", type=Decimal, help="dollars")
    parser.add_argument("--rows", type=int, default=1, help="rows, 100%% of them")
    parser.add_argument("--extra", type=json.loads, default={}, help="fields")
    parser.add_argument("--files", nargs="+", default=[], help="files")
    parser.add_argument("--some-thing", default="50%", help="more")
    parser.add_argument("--on", action=argparse.BooleanOptionalAction, default=True, help="switch")
    parser.add_argument("--must", required=True, help="needed")
    return parser


def error_of(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        flags().parse_args(["--must", "1", *words])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# ---- flags -----------------------------------------------------------------------------------------------------------


def test_dashes_and_underscores_are_the_same_in_names_alone():
    found = flags().parse_args(
        ["--max_usd=1.5", "--must", "a_b", "--files", "x_y", "--rows", "3", "--some-thing=c_d=e_f"]
    )
    assert (found.max_usd, found.must, found.files, found.rows) == (Decimal("1.5"), "a_b", ["x_y"], 3)
    assert found.some_thing == "c_d=e_f" and found.debug is False


def test_an_unknown_flag_is_told_the_nearest(capsys):
    assert "unknown flag --max-us; did you mean --max-usd?" in error_of(capsys, "--max_us", "5")
    both = error_of(capsys, "--rwos=5", "--filse", "a")
    assert "--rwos=5; did you mean --rows?" in both and "--filse; did you mean --files?" in both
    assert "did you mean" not in error_of(capsys, "--zzzzzz")
    assert "--debug?" in error_of(capsys, "--debgu")


def test_a_flag_of_one_dash_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        Parser("x", "").parse_args(["-x"])
    assert "unknown flag -x" in capsys.readouterr().err


def test_a_value_without_a_flag_is_named_as_such(capsys):
    assert "unexpected 'stray'" in error_of(capsys, "stray")


def test_no_abbreviations(capsys):
    assert "unknown flag --ro" in error_of(capsys, "--ro", "5")


def test_bad_and_missing_values_are_one_line(capsys):
    assert "--rows" in error_of(capsys, "--rows", "x\ny")
    assert "--rows" in error_of(capsys, "--rows")
    with pytest.raises(SystemExit) as caught:
        flags().parse_args([])
    assert caught.value.code == 2 and "--must" in capsys.readouterr().err


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        flags().parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    lines = ("dollars (default: none)", "rows, 100% of them (default: 1)", "fields (default: none)")
    lines += ("files (default: none)", "more (default: 50%)", "switch (default: on)", "came from (default: off)")
    assert not [line for line in lines if line not in told]
    assert "needed" in told and "needed (default" not in told


@pytest.mark.parametrize("name", ["generate", "estimate"])
def test_the_help_of_each_command_of_the_pipeline(name):
    pytest.importorskip("openai")
    pytest.importorskip("rapidfuzz")
    text = importlib.import_module(f"data_gen.{name}").build_parser().format_help()
    assert "(default: none)" in text and "(default: off)" in text and "(default: 52000)" in text
    assert "%(" not in text


def test_the_nearest_known_word_is_suggested():
    assert (
        suggest_nearest("gpt-4o-mni", ["gpt-4o-mini", "o3"]) == "; did you mean gpt-4o-mini?"
        and suggest_nearest("x", []) == ""
    )


# ---- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, code", [(Failure, 1), (UsageError, 2), (DataError, 3), (Stopped, 143)])
def test_a_failure_is_one_line_and_its_code(capsys, kind, code):
    def main(argv):
        raise kind("the server said no; ask later")

    assert run_for_exit_code(main, []) == code
    out, err = capsys.readouterr()
    assert out == "" and err == "error: the server said no; ask later\n"


def test_an_error_of_ours_names_its_kind_and_how_to_see_more(capsys):
    assert run_for_exit_code(lambda argv: {}["x"], []) == 1
    err = capsys.readouterr().err
    assert err == "error: KeyError: 'x'; --debug shows where\n"


@pytest.mark.parametrize("error", [DataError("row 3"), KeyError("x")])
def test_debug_shows_where(capsys, error):
    def main(argv):
        raise error

    run_for_exit_code(main, ["--debug"])
    err = capsys.readouterr().err
    assert "Traceback" in err and "in main" in err and err.splitlines()[-1].startswith("error: ")


def test_success_and_interrupt(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert run_for_exit_code(lambda argv: None, []) == 0
    assert run_for_exit_code(interrupted, []) == 143 and capsys.readouterr().err == "stopped by a signal\n"


def test_a_process_ends_with_the_code():
    main = "lambda argv: (_ for _ in ()).throw(DataError('\\ud800 ' + argv[0]))"
    text = f"from data_gen.base.cli import *\nrun_command({main})"
    done = subprocess.run([sys.executable, "-c", text, "here"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "error: \\ud800 here\n")


def test_the_layout_of_help_is_that_of_the_other_commands():
    ours, theirs = (ROOT / folder / "base" / "help_text.py" for folder in ("data_gen", "kernels"))
    assert ours.read_text() == theirs.read_text()


def test_help_groups_flags_and_ends_with_examples_that_a_shell_reads(capsys):
    long = "python -m data_gen.x " + "--rows 1 " * 12
    parser = Parser("x", f"Does x.\n\npython -m data_gen.x --rows 1\n{long}\n\nMore of it.")
    parser.add_argument("file", metavar="FILE", nargs="+", help="what is read")
    parser.add_argument_group("money").add_argument("--rows", default=3, help="rows, " + "of them " * 20)
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("usage: python -m data_gen.x FILE ... [--flag value ...]\n\nDoes x.\n\nMore of it.\n")
    assert text.index("files:") < text.index("flags:") < text.index("money:\n  --rows\n      rows, of them")
    assert "(default: 3)" in text and "examples:\n  python -m data_gen.x --rows 1\n" in text
    assert text[text.rindex("python") :].replace("\\\n", "").split() == long.split()


@pytest.mark.parametrize("error, is_written", [(None, True), (BrokenPipeError(), False), (OSError(28, "full"), True)])
@pytest.mark.parametrize("code", [None, 0, 3])
def test_output_that_nobody_reads_is_told_by_the_code_and_a_full_disk_by_python(error, is_written, code, monkeypatch):
    class Output:
        def flush(self):
            if error is not None:
                raise error

    given_up = []
    monkeypatch.setattr(cli, "discard_output", given_up.append)
    monkeypatch.setattr("sys.stdout", Output())
    assert cli.flush_stdout() == is_written and len(given_up) == (not is_written)
    assert cli.run_for_reader(lambda: code) == (code if is_written or code else cli.READER_LEFT)
    monkeypatch.setattr("sys.stdout", None)
    assert cli.flush_stdout()
