"""The names of the files of answers."""

from pathlib import Path

import pytest

from data_gen.base.cli import UsageError
from data_gen.judging.answers import AnswerFile, choose_names


@pytest.mark.parametrize(
    "files, names",
    [
        ([("a.json", "m"), ("b.json", "n")], ("m", "n")), ([("a.json", "m"), ("b.json", "m")], ("a", "b")),
        ([("a.json", "m"), ("b.json", "m"), ("c.json", "n")], ("a", "b", "n")),
    ],
)  # fmt: skip
def test_a_file_has_its_models_name_or_its_own(files, names):
    assert choose_names([AnswerFile(Path(path), name, {}) for path, name in files]) == names


@pytest.mark.parametrize("files", [[("x/a.json", "m"), ("y/a.json", "m")], [("b", "a"), ("a.json", "m"), ("c", "m")]])
def test_two_files_of_one_name_are_told(files):
    with pytest.raises(UsageError, match=r"^two files are called a; give one of them another name, or another"):
        choose_names([AnswerFile(Path(path), name, {}) for path, name in files])
