"""The commands of docs/data.md that make rows of what other programs export."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.data.rows import read_rows

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
COMMANDS = {
    name: command
    for command, name in re.findall(r"^(jq [^>]* (\S+) > rows\.jsonl)$", PAGE.replace("\n    ", " "), re.MULTILINE)
}


def said(parent, role=None, *parts):
    """A node of a ChatGPT export; the first has no message."""
    message = role and {"author": {"role": role}, "content": {"content_type": "text", "parts": parts}}
    return {"parent": parent, "message": message}


TREE = {
    "root": said(None), "s": said("root", "system", ""), "q": said("s", "user", {"asset": 1}, "Hallo „du“"),
    "dropped": said("q", "assistant", "no"), "shown": said("q", "assistant", "ja"),
}  # fmt: skip
STUDIO = {"id": 1, "data": {"text": "q"}, "annotations": [{"result": [{"value": {"text": ["a"]}}]}]}
CLAUDE = [{"sender": "human", "text": "q"}, {"sender": "assistant", "text": "a"}]
EXPORTS = {  # what the program writes, and the row of it: (instruction, input, output), or messages
    "qa.jsonl": ({"question": "q", "context": "c", "answer": "a"}, ("q", "c", "a")),
    "studio.json": ([STUDIO], ("q", "", "a")),
    "claude.json": ([{"uuid": "1", "chat_messages": CLAUDE}], (("user", "q"), ("assistant", "a"))),
    "chatgpt.json": ([{"mapping": TREE, "current_node": "shown"}], (("user", "Hallo „du“"), ("assistant", "ja"))),
}


def test_every_command_has_an_export():
    assert COMMANDS.keys() == EXPORTS.keys()


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@pytest.mark.parametrize("name", EXPORTS)
def test_rows_of_an_export(tmp_path, name):
    content, expected = EXPORTS[name]
    (tmp_path / name).write_text(json.dumps(content))
    subprocess.run(["bash", "-c", COMMANDS[name]], cwd=tmp_path, check=True, timeout=60)
    ((row,), _) = read_rows([tmp_path / "rows.jsonl"])
    assert (row.messages or (row.instruction, row.input, row.output)) == expected
