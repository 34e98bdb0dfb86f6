"""The commands that a run tells are those that a shell can take, and ask what its rows ask."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest

from engine.training import next_commands
from engine.training.next_commands import describe_use, find_question, format_command

OUR_OWN = ["--prompt", "Name three uses for a paper clip."]


@pytest.mark.parametrize(("n_ranks", "start"), [(1, ["python"]), (2, ["torchrun", "--nproc-per-node=2"])])
def test_the_command_of_a_run_starts_as_many_ranks(n_ranks, start, monkeypatch):
    monkeypatch.setattr(next_commands, "name_python", lambda: "python")
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--data", "my rows.json"])
    assert shlex.split(format_command(n_ranks)) == [*start, "-m", "engine.finetune", "--data", "my rows.json"]


def test_a_folder_with_blanks_is_one_word():
    config = SimpleNamespace(out="my model's", eval_data=(), prompt_style="alpaca")
    for command in describe_use(config).values():
        words = shlex.split(command)
        assert words[words.index("--model") + 1] == "my model's"


@pytest.mark.parametrize(
    ("row", "style", "asked"),
    [
        ({"instruction": "Sort.", "input": "b a", "output": "a b"}, "alpaca", ["--prompt", "Sort.", "--input", "b a"]),
        ({"instruction": "It's?", "output": "a"}, "alpaca", ["--prompt", "It's?"]),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f"}}]}, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "One"}]},
         "template", ["--prompt", "Hi"]),
    ],
)  # fmt: skip
def test_the_first_row_that_is_held_out_is_asked(row, style, asked, tmp_path, monkeypatch):
    """Also behind a bad row; a large file is not read for it."""
    (tmp_path / "held.jsonl").write_text("{}\n" + json.dumps(row) + "\n")
    config = SimpleNamespace(eval_data=(str(tmp_path / "held.jsonl"), "another"), prompt_style=style)
    assert shlex.split(find_question(config)) == asked
    monkeypatch.setattr(next_commands, "MOST_BYTES", 9)
    assert shlex.split(find_question(config)) == OUR_OWN
    assert shlex.split(find_question(SimpleNamespace(eval_data=(), prompt_style=style))) == OUR_OWN
