"""What every kind of row becomes, or why it is refused, and what every kind of file gives."""

# ruff: noqa: E501 (a kind of row a line)
import gzip
import json

import pytest

from engine.base.errors import DataError
from engine.data.chats import TOOLS
from engine.data.rows import Wanted, parse_row, read_rows
from engine.data.values import BadRow

CALL = {"function": {"name": "look", "arguments": '{"at": 1}'}, "id": "c1", "odd": 1}
ASK, SAY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SHARE, SHARED = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}


def talk(*turns, **more):
    return {"messages": list(turns), **more}


VALUES = {
    "instructions": [
        {"instruction": "I", "input": "in", "output": "O"}, {"instruction": "I", "output": "O"}, {"instruction": "I"},
        {"instruction": "I", "input": None, "output": "O"}, {"instruction": "", "input": "in", "output": "O"},
        {"instruction": "", "input": "", "output": "O"}, {"instruction": "", "output": "O"}, {"input": "in"}, [], "x", {},
        {"instruction": 1, "input": "", "output": "O"}, {"instruction": "I", "input": [], "output": "O"},
        {"instruction": "I", "input": "", "output": 2.5}, {"instruction": "I", "output": None, "input": "in"},
        {"instruction": "\\ud800", "output": "O"}, {"instruction": "\ud800", "output": "O"},
        {"instruction": "I", "output": "O", "system": "S", "id": 7}, {"instruction": "I", "output": "O", "system": ""},
        {"instruction": "I", "output": "O", "system_prompt": "S", "input": "in", "history": [["a", "b"], ["c", "d"]]},
        {"instruction": "I", "output": "O", "system_prompt": "S", "system": "T"},
        {"instruction": "I", "output": "O", "history": [["a"]]}, {"instruction": "I", "output": "O", "history": "a"},
        {"instruction": "I", "output": "O", "history": [["a", 1]]}, {"instruction": "I", "output": "O", "history": []},
        {"instruction": "I", "instances": [{"input": "in", "output": "O"}]}, {"instruction": "I", "instances": []},
        {"instruction": "I", "instances": [{"output": "O"}, {"output": "P"}]}, {"instruction": "I", "instances": [1]},
        {"instruction": "I", "instances": [{"output": "O"}], "output": "P"}, {"instruction": "I", "instances": {"a": 1}},
        {"instruction": "I", "output": "O", "label": False}, {"instruction": "I", "output": "O", "label": "True"},
        {"instruction": "I", "output": "O", "label": 1.0}, {"instruction": "I", "output": "O", "weight": 0},
        {"instruction": "I", "output": "O", "weight": "1"}, {"instruction": "I", "output": "O", "tools": [1]},
        {"instruction": "I", "output": "O", "images": ["x"]}, {"instruction": "I", "output": "O", "images": []},
        {"instruction": "I", "output": "O", "chosen": "c", "rejected": "r"}, {"instruction": "I", "output": "O", "kto_tag": True},
        {"text": "T"}, {"text": " \n"}, {"text": 3}, {"text": "T", "instruction": "I", "output": "O"}, {"text": "T", "n": 1},
        {"prompt": "P", "completion": "C"}, {"prompt": "P"}, {"prompt": None, "completion": "C"}, {"prompt": "P", "completion": 1},
        {"prompt": "P", "completion": "C", "system": "S"}, {"prompt": "P", "completion": "C", "tools": [1]},
    ],
    "chats": [
        talk(ASK, SAY), talk({"role": "developer", "content": "S"}, ASK, SAY), talk(ASK), talk(SAY), talk(), talk(ASK, ASK),
        talk(ASK, SAY, SAY), talk(ASK, SAY, {"role": "system", "content": "S"}), talk(ASK, {"role": "robot", "content": ""}),
        talk(ASK, {"role": "assistant"}), talk(ASK, {"content": "A"}), talk(ASK, "A"), {"messages": "no"}, talk(ASK, SAY, system="S"),
        talk({"role": "system", "content": "S"}, ASK, SAY, system="S"), talk(ASK, {**SAY, "weight": 0}, ASK, SAY),
        talk(ASK, {**SAY, "train": False}, ASK, {**SAY, "loss": 1}, system_prompt="S"), talk({**ASK, "weight": 1}, SAY),
        talk({**ASK, "weight": 0}, SAY), talk(ASK, {**SAY, "weight": 0.5}), talk(ASK, {**SAY, "weight": 0, "train": True}),
        talk(ASK, {**SAY, "name": "x", "extra": None}, more=1), talk({**ASK, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, SAY),
        talk({**ASK, "content": [{"type": "image"}]}, SAY), talk({**ASK, "content": [1]}, SAY), talk(ASK, {**SAY, "function_call": {"a": 1}}),
        talk(ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "R", "tool_call_id": "c1", "name": "n"}, SAY, tools=[{"name": "look"}]),
        talk(ASK, {**SAY, "tool_calls": [CALL]}, SAY), talk(ASK, {"role": "tool", "content": "R"}),
        talk(ASK, {**SAY, "tool_calls": [{"name": "look", "arguments": ""}]}, {"role": "tool", "content": "R"}, {"role": "tool", "content": "S"}, SAY, tools='[{"name": "look"}]'),
        talk(ASK, {**SAY, "tool_calls": [{"name": "look", "arguments": "{"}]}), talk(ASK, {**SAY, "tool_calls": [{"arguments": {}}]}),
        talk(ASK, {**SAY, "tool_calls": [{"name": "look", "arguments": [1]}]}), talk(ASK, {**SAY, "tool_calls": ["look"]}), talk(ASK, SAY, tools="{"), talk(ASK, SAY, tools="{}"),
        {"conversations": [SHARE, SHARED]}, {"conversations": [{"from": "system", "value": "S"}, SHARE, SHARED]}, {"conversations": [SHARED]},
        {"conversations": [SHARE, {"from": "function_call", "value": '{"name": "look", "arguments": {}}'}, {"from": "observation", "value": "R"}, SHARED]},
        {"conversations": [SHARE, {"from": "function_call", "value": "look"}]}, {"conversations": [SHARE, SHARED], "messages": [ASK, SAY]},
        {"conversations": [ASK, SAY]}, {"conversations": [SHARE, {"from": "bing", "value": "A"}, SHARE, {"from": "gpt", "value": 1}]},
        {"messages": [ASK, SAY], "instruction": "I"}, {"prompt": [ASK], "completion": [SAY]}, {"prompt": [ASK, SAY, ASK], "completion": [SAY, ASK, SAY], "system": "S"},
        {"prompt": [ASK]}, {"prompt": [ASK], "completion": "A"}, {"prompt": [ASK, SAY], "completion": []}, {"messages": None, "instruction": "I", "output": "O"},
    ],
}  # fmt: skip
WAYS = {"learned": Wanted(True, True), "no tools": Wanted(True, False), "asked": Wanted(False, True)}


def tell_row(value, wanted):
    """Return what a value becomes, in the order of Row's fields, with those that say something."""
    unread = set()
    try:
        row = parse_row(value, "f", wanted, unread)
    except BadRow as bad:
        return f"refused: {bad}"
    parts = {
        name: getattr(row, name)
        for name in ("messages", "instruction", "input", "output", "is_raw", "unlearned", "tools", "more")
    }
    told = " ".join(
        f"{name}={value if name != 'unlearned' else sorted(value)}" for name, value in parts.items() if value
    )
    return told + (f" unread={sorted(unread)}" if unread else "")


@pytest.mark.parametrize("kind", VALUES)
def test_what_a_row_becomes(kind, snapshot):
    lines = []
    for value in VALUES[kind]:
        told = {how: tell_row(value, wanted) for how, wanted in WAYS.items()}
        lines.append(
            json.dumps(value)
            if kind == "instructions"
            else json.dumps(value).replace('"role": ', "").replace('"content": ', "")
        )
        lines.append(f"    {told.pop('learned')}")
        lines += [
            f"    {how}: {text}"
            for how, text in told.items()
            if f"    {text}" != lines[-1] and text != lines[-1].strip()
        ]
    assert "\n".join(lines).replace(TOOLS, "TOOLS") == snapshot


GOOD = '{"instruction": "a", "input": "", "output": "b"}'
FILES = {
    "list.json": f"[{GOOD},\n {GOOD}, {GOOD}\n]", "lines.jsonl": f"{GOOD}\n\n{GOOD}", "lines.json": f"{GOOD}\r\n{GOOD}\r\n",
    "bom.json": f"\ufeff[{GOOD}]", "one.json": GOOD, "wrapped.json": f'{{"data": [{GOOD}]}}', "empty.json": "", "blank.json": " \n",
    "nothing.json": "[]", "cut.json": f"[{GOOD}, {GOOD[:20]}", "comma.json": f"[{GOOD},]", "word.json": "hello", "deep.json": "[" * 200 + "]" * 200,
    "columns.json": '{"instruction": {"0": "a"}, "output": {"0": "b"}}', "twice.json": '[{"instruction": "a", "instruction": "b", "output": "c"}]',
    "mixed.jsonl": f'{GOOD}\n{{"instruction": 1}}\nno\n{GOOD}\n{{"output": "x"}}\n[1]\n{{"instruction": "a"}}\n{GOOD[:-1]}',
    "table.csv": 'instruction,input,output\n"a\nb",,c\nd,e,f\n', "semicolons.csv": "instruction;output\na,b;c\n", "short.csv": "instruction,output\na\nb,c\n",
    "unnamed.csv": ",instruction\n0,a\n", "open.csv": 'instruction,output\n"a,b\n', "headed.csv": "instruction,output\n",
    "pretty.json": json.dumps([json.loads(GOOD)] * 2, indent=2), "keys.json": '[{"question": "a", "answer": "b"}]', "five.jsonl": '{"a": 1}\n' * 5, "six.jsonl": '{"a": 1}\n' * 6,
}  # fmt: skip


def tell_file(path, **how):
    try:
        rows, skipped = read_rows([path], **how)
    except DataError as error:
        return f"refused: {error}"
    told = [f"{row.source} {row.instruction!r} {row.input!r} {row.output!r}" for row in rows]
    return "\n    ".join([*told, *(f"skipped {bad.source}: {bad.reason}" for bad in skipped)])


def test_what_a_file_gives(tmp_path, snapshot):
    lines = []
    for name, text in FILES.items():
        path = tmp_path / name
        path.write_text(text, newline="")
        told = [tell_file(path), tell_file(path, skip_bad_rows=True)]
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(text.encode()))
        assert not text or tell_file(packed).replace(f"{name}.gz", name) == told[0]
        lines += [name, *(f"    {text}" for text in dict.fromkeys(told))]
    (tmp_path / "latin.csv").write_bytes(b"instruction,output\na,\xe9\nb,c\n")
    lines += [tell_file(tmp_path / "latin.csv"), tell_file(tmp_path / "latin.csv", skip_bad_rows=True)]
    assert "\n".join(lines).replace(str(tmp_path), "FOLDER") == snapshot
