"""What damage of a user's file becomes: one error that names the file, with its exit code."""

import pytest

from engine.base.errors import DataError, call_main, reading, summarize_error


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
