"""docs/data.md's table of datasets: the seed tasks in every form that rows have, with faults, and what becomes of each.

python -m scripts.pages.datasets            writes the table into the page
python -m scripts.pages.datasets --check    exits 1 if the page has another one
"""

import argparse
import csv
import gzip
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.base.errors import DataError
from engine.data.rows import EMBEDDED, read_rows
from kernels.base.commands import run_command

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
START, END = "<!-- datasets: made by scripts/pages/datasets.py -->\n", "<!-- /datasets -->"
FIELDS = ("instruction", "input", "output")
Rows = list[dict[str, Any]]


def make_chat(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a task as the messages of a chat."""
    asked = "\n\n".join(filter(None, (task["instruction"], task["input"])))
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": task["output"]}]


def make_sharegpt(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a task as ShareGPT's turns."""
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in make_chat(task)]


def write_csv(rows: Rows) -> bytes:
    """Return rows as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def write_lines(rows: Rows) -> bytes:
    """Return rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_list(rows: Rows) -> bytes:
    """Return rows as an indented JSON list."""
    return json.dumps(rows, ensure_ascii=False, indent=2).encode()


def write_parquet(rows: Rows) -> bytes:
    """Return rows as parquet."""
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


CALL = [{"type": "function", "function": {"name": "search", "arguments": {}}}]


def list_files(tasks: Rows) -> list[tuple[str, str, bytes]]:
    """Return (what the file is, its name, its bytes) for every form. The last two rows of most are faulty."""
    alpaca = [{name: task[name] for name in FIELDS} for task in tasks]
    chats: Callable[[], Rows] = lambda: [{"id": task["id"], "messages": make_chat(task)} for task in tasks]  # noqa: E731
    shares: Rows = [{"id": task["id"], "conversations": make_sharegpt(task)} for task in tasks]
    pairs: Rows = [{"prompt": row["instruction"], "completion": " " + row["output"]} for row in alpaca]
    texts: Rows = [{"text": f"{row['instruction']}\n{row['output']}", "url": "x"} for row in alpaca]
    weighted, tools, parts, liked = chats(), chats(), chats(), chats()
    for row in weighted:
        row["messages"] = [*make_chat(tasks[0]), *row["messages"]]
        row["messages"][1]["weight"] = 0
    weighted[-2]["messages"][3]["weight"] = 0.5
    for row in tools[-2:]:
        row["messages"][1] |= {"content": None, "tool_calls": CALL}
    for row in parts:
        row["messages"][0]["content"] = [{"type": "text", "text": row["messages"][0]["content"]}]
    parts[-1]["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": "a.png"}})
    for number, row in enumerate(liked):
        row["label"] = number < len(liked) - 2
    shares[-1]["conversations"].pop()
    piped = [row | {"system": "Be brief.", "history": [["Hi", "Hello."]]} for row in alpaca]
    piped[-1]["history"] = ["Hi"]
    return [
        ("Alpaca, JSON", "alpaca.json", write_list([*alpaca[:-1], {"instruction": "Say hi."}])),
        ("Alpaca, JSONL, a key given twice", "alpaca.jsonl", write_lines(alpaca) + b'{"output": "", "output": ""}\n'),
        ("Alpaca, gzip", "alpaca.json.gz", gzip.compress(write_list(alpaca), mtime=0)),
        ("Alpaca, CSV, a cell too many", "alpaca.csv", write_csv(alpaca) + b"a,b,c,d\n"),
        ("Alpaca, parquet", "alpaca.parquet", write_parquet(alpaca)),
        ("Alpaca with system and history", "history.json", write_list(piped)),
        ("Alpaca, images", "images.json", write_list([*alpaca[:-1], alpaca[-1] | {"images": ["a.jpg"]}])),
        ("chats", "chats.jsonl", write_lines(chats())),
        ("chats, answers of weight 0 and 0.5", "weighted.jsonl", write_lines(weighted)),
        ("chats, calls of tools (chatml)", "tools.jsonl", write_lines(tools)),
        ("chats, parts of text, a picture", "parts.jsonl", write_lines(parts)),
        ("chats, KTO's label", "kto.jsonl", write_lines(liked)),
        ("ShareGPT, the last without an answer", "sharegpt.jsonl", write_lines(shares)),
        ("prompt and completion", "pairs.jsonl", write_lines(pairs)),
        ("preferences", "dpo.jsonl", write_lines([{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(alpaca))),
        ("text", "text.parquet", write_parquet(texts)),
        ("rows under a key", "wrapped.json", json.dumps({"version": 1, "data": alpaca}).encode()),
        ("an object over several lines", "pretty.json", json.dumps(alpaca[0], indent=2).encode()),
        ("a git-lfs pointer", "pointer.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ]


def make_table() -> str:
    """Return the table: rows read, rows refused and the first reason, keys counted, for each file."""
    tasks = [json.loads(line) for line in EMBEDDED["seed-tasks"].read_text().splitlines()]
    lines = ["| file | read | refused | counted, not read |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for what, name, content in list_files(tasks):
            path, unread = Path(folder, name), Counter[str]()
            path.write_bytes(content)
            read, refused = "0", ""
            try:
                rows, skipped = read_rows([path], skip_bad_rows=True, unread=unread)
                read = str(len(rows))
                refused = f"{len(skipped)}: {skipped[0].reason}" if skipped else "0"
            except DataError as error:
                told = str(error).replace(f"{path}:", "").splitlines()
                refused = f"all: {told[min(1, len(told) - 1)].strip()}"
            refused = refused.replace(folder + "/", "").replace("|", "\\|").replace("<", "&lt;")
            counted = ", ".join(f"{key} ({n})" for key, n in unread.most_common())
            lines.append(f"| {what} | {read} | {refused} | {counted} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table into the page, or compare it with the page's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text()
    before, rest = page.split(START)
    new = before + START + make_table() + END + rest.split(END, 1)[1]
    if not args.check:
        PAGE.write_text(new)
    elif new != page:
        raise SystemExit("docs/data.md has another table; run python -m scripts.pages.datasets")


if __name__ == "__main__":
    run_command(main)
