"""The names of the files of answers, and what is matched of them."""

import json
from pathlib import Path

import pytest

from data_gen.base.cli import DataError, UsageError
from data_gen.judging.answers import AnswerFile, choose_names, match_answers, read_answers


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


def test_an_instruction_that_comes_again_is_another_question(tmp_path):
    paths = [tmp_path / f"{name}.json" for name in "ab"]
    for path in paths:
        asked = ("Same.", "Other.", " Same. ", "Same.")
        path.write_text(json.dumps([{"instruction": x, "output": f"{path.stem} {n}"} for n, x in enumerate(asked)]))
    found = match_answers([read_answers(path) for path in paths])
    assert found.instructions == ("Same.", "Other.", "Same.", "Same.")
    assert found.outputs == tuple((f"a {n}", f"b {n}") for n in range(4))


def test_files_without_a_common_instruction_are_told_with_their_paths(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps([{"instruction": f"Only {name}.", "output": "x"}]))
    files = [read_answers(tmp_path / f"{name}.json") for name in "ab"]
    with pytest.raises(DataError, match=r"a\.json, .*b\.json share no instruction"):
        match_answers(files, is_common=True)
    with pytest.raises(
        DataError, match=r"a\.json lacks 1 of 2 .*'Only b.'; .*b\.json lacks 1 of 2 .*'Only a.'; --common"
    ):
        match_answers(files)


def test_a_question_has_the_first_dataset_that_a_file_tells(tmp_path):
    told = {"a": [None, "first", "", None], "b": ["second", "third", "fourth", None]}
    for name, sets in told.items():
        rows = [{"instruction": f"Question {n}.", "output": "x", "dataset": found} for n, found in enumerate(sets)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    found = match_answers([read_answers(tmp_path / f"{name}.json") for name in "ab"])
    assert found.datasets == ("second", "first", "fourth", None)
