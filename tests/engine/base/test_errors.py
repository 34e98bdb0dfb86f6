"""What damage of a user's file becomes: one error that names the file, with its exit code."""

import pytest

from engine.base import errors
from engine.base.errors import DataError, Stopped, call_main, reading, run_main, summarize_error


def test_reading_names_the_file_and_leaves_our_own_errors(tmp_path):
    with pytest.raises(DataError, match=r"x.json: is damaged, .*OverflowError"), reading("x.json"):
        int(float("inf"))
    with pytest.raises(DataError, match=r"^as it is$"), reading("x.json"):
        raise DataError("as it is")
    with pytest.raises(RuntimeError), reading("x.json"):
        raise RuntimeError("a bug")


def test_a_name_that_no_disk_takes_is_the_users(tmp_path, capsys):
    def main(argv):
        (tmp_path / argv[0]).stat()

    assert call_main(main, ["x" * 5000]) == 2
    assert "File name too long" in capsys.readouterr().err
    assert call_main(main, ["x"]) == 1, "another error of the disk"


@pytest.mark.parametrize(
    "text, told",
    [
        ("what\nwhere\n", "what"), ("\n\n what \n", "what"), ("x" * 201, "x" * 200), ("x" * 199 + "\n", "x" * 199),
        ("", "RuntimeError"), (" \n", "RuntimeError"),
    ],
)  # fmt: skip
def test_a_summary_is_one_line_or_the_type(text, told):
    assert summarize_error(RuntimeError(text)) == told


def test_the_command_line_is_that_of_the_process_unless_it_is_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["engine.x", "--flag"])
    seen = []
    assert run_main(seen.append) == 0 and run_main(seen.append, []) == 0 and run_main(seen.append, ["a"]) == 0
    assert seen == [["--flag"], [], ["a"]]


@pytest.mark.parametrize("argv, n", [([], 1), (["--debug"], 2)])
@pytest.mark.parametrize("error, code, told", [(DataError("odd"), DataError.exit_code, "error: odd"),
                                               (KeyError("k"), 1, "error: KeyError: 'k'; --debug shows where"),
                                               (BrokenPipeError("x"), 1, "BrokenPipeError: x; --debug shows where"),
                                               (KeyboardInterrupt(), 143, "stopped by SIGINT"),
                                               (Stopped("by me"), 143, "by me")])  # fmt: skip
def test_how_a_command_fails(error, code, told, argv, n, capsys):
    def main(argv):
        raise error

    assert run_main(main, argv) == code
    text = capsys.readouterr().err
    shows = n == 2 and isinstance(error, Exception) and not isinstance(error, Stopped)
    assert text.endswith(told + "\n") and ("Traceback" in text) == shows


def test_each_kind_of_failure_has_its_exit_code():
    kinds = {kind.__name__: kind for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    codes = {"CriaError": 1, "UsageError": 2, "DataError": 3, "DivergedError": 4, "NotFiniteError": 4, "Stopped": 143}
    codes["OtherRankFailed"] = 1  # unless the other rank's code is another
    assert {name: kind.exit_code for name, kind in kinds.items()} == codes

    def main(argv):
        raise kinds["OtherRankFailed"](3, 7) if argv else kinds["NotFiniteError"]("NaN")

    assert (call_main(main, []), call_main(main, ["x"])) == (4, 7)


@pytest.mark.parametrize("rank, is_told", [("0", True), ("1", False)])
def test_one_rank_tells_that_all_have_stopped(rank, is_told, monkeypatch, capsys):
    def main(argv):
        raise Stopped("by a signal")

    monkeypatch.setenv("RANK", rank)
    assert run_main(main, []) == 143 and bool(capsys.readouterr().err) == is_told
