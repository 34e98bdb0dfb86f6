"""Dataset files, good and broken: what was written is read exactly; a fault is named and costs its own row alone."""

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base.errors import DataError
from engine.data.json_files import MAX_NESTING, LineCounter
from engine.data.rows import read_rows
from engine.data.values import MAX_ROW_BYTES, shorten
from engine.text.templates import Row
from tests.helpers.forks import Started
from tests.helpers.own_rows import write_alpaca

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def text_of(row):
    return row.messages or (row.instruction, row.input, row.output)


def as_list(*rows):
    """A JSON list of rows, each an object or bytes as they are."""
    return b"[" + b",\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"]"


def as_lines(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


FORMATS = pytest.mark.parametrize("form", [as_list, as_lines], ids=["list", "lines"])


@pytest.fixture
def write(tmp_path):
    def write(data, name="data.json"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def refusal(*paths, **options):
    with pytest.raises(DataError) as caught:
        read_rows(paths, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


# What is good


@FORMATS
def test_alpaca(form, write):
    rows = [GOOD, {"instruction": "Say hi.", "output": "hi"}, {"instruction": "a", "input": None, "output": ""}]
    extra = b'"id": 7, "tags": [{"a": NaN, "instruction": 1}], "n": ' + b"1" * 5000  # more digits than int() takes
    path = write(form(*rows, b'{"instruction": "", "input": "x", "output": "y", ' + extra + b"}"))
    read, skipped = read_rows([path])
    assert [text_of(row) for row in read] == [
        ("Add.", "1 2", "3"),
        ("Say hi.", "", "hi"),
        ("a", "", ""),
        ("", "x", "y"),
    ]
    assert read[0] == Row(f"{path}:1", None, "Add.", "1 2", "3") and not skipped


@FORMATS
def test_chat(form, write):
    turns = [("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")]
    rows = [{"messages": [{"role": role, "content": content, "name": "x"} for role, content in turns]}, CHAT]
    read, _ = read_rows([write(form(*rows))])
    assert [row.messages for row in read] == [tuple(turns), (("user", "Hi"), ("assistant", "Hello"))]
    assert (read[0].instruction, read[0].input, read[0].output) == ("", "", "")


@FORMATS
def test_byte_order_mark_blanks_and_an_unlike_name(form, write):
    path = write(b"\xef\xbb\xbf \r\n\t" + form(GOOD, CHAT) + b" \n", "data.txt")
    assert [text_of(row) for row in read_rows([path])[0]] == [
        ("Add.", "1 2", "3"),
        (("user", "Hi"), ("assistant", "Hello")),
    ]


def test_blank_lines_are_counted_and_ignored(write):
    path = write(
        b"\n" + as_lines(GOOD) + b" \t\r\n\n" + as_lines(GOOD).replace(b"\n", b"\r\n") + json.dumps(GOOD).encode()
    )
    read, skipped = read_rows([path])
    assert [row.source for row in read] == [f"{path}:{line}" for line in (2, 5, 6)] and not skipped


def test_files_and_rows_keep_their_order(write):
    rows = [GOOD | {"input": str(i)} for i in range(30)]
    paths = [write(as_lines(*rows[20:]), "z"), write(as_list(*rows[:10]), "a"), write(as_lines(*rows[10:20]), "m")]
    assert [int(row.input) for row in read_rows(paths)[0]] == [*range(20, 30), *range(10), *range(10, 20)]


def test_text_that_spells_special_tokens_stays_text(write):
    text = '</s> <s> [PAD] <|im_end|> [INST] \\ " \\" }],{ \u2028 \0 é e\u0301 \U0001f600'
    assert read_rows([write(as_list(GOOD | {"output": text}))])[0][0].output == text


@FORMATS
def test_nesting_up_to_the_limit(form, write):
    deep = b"[" * (MAX_NESTING - 1) + b"]" * (MAX_NESTING - 1)
    good = b'{"instruction": "a", "output": "b", "extra": ' + deep + b"}"
    reason = reject(form, write, good.replace(deep, b"[" + deep + b"]"))
    assert f"deeper than {MAX_NESTING} levels" in reason
    assert len(read_rows([write(form(good))])[0]) == 1


def test_a_file_of_many_rows(tmp_path):
    path = write_alpaca(tmp_path)
    read, skipped = read_rows([path])
    rows = json.loads(path.read_text("utf-8"))
    assert len(rows) == 999 and not skipped
    assert [text_of(row) for row in read] == [(row["instruction"], row["input"], row["output"]) for row in rows]


TRICKY = [
    '"',
    "\\",
    '\\"',
    "}",
    "]",
    "{",
    "[",
    "},\n{",
    '"}],[{"',
    "\n",
    "\r\n",
    "\u2028",
    "\0",
    "\x7f",
    "\ufeff",
    "\U0001f600",
    " ",
]
TEXT = st.lists(st.sampled_from(TRICKY) | st.text(max_size=9), max_size=6).map("".join)
ALPACA = st.fixed_dictionaries({"instruction": TEXT, "input": TEXT, "output": TEXT}).filter(
    lambda row: row["instruction"] or row["input"]
)
TURNS = st.tuples(st.booleans(), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))


def chat_of(turns):
    system, pairs = turns
    messages = [{"role": "system", "content": pairs[0][1]}] * system
    for user, assistant in pairs:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages}


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(ALPACA | TURNS.map(chat_of), min_size=1, max_size=5),
    ascii=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    tight=st.booleans(),
)
def test_what_json_writes_is_read_back(rows, ascii, indent, tight):
    keys = "instruction", "input", "output"
    wanted = [
        tuple((turn["role"], turn["content"]) for turn in row["messages"])
        if "messages" in row
        else tuple(row[key] for key in keys)
        for row in rows
    ]
    style = {"ensure_ascii": ascii, "separators": (",", ":") if tight else None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data")
        for text in (
            json.dumps(rows, indent=indent, **style),
            "".join(json.dumps(row, **style) + "\n" for row in rows),
        ):
            path.write_bytes(text.encode())
            read, skipped = read_rows([path])
            assert [text_of(row) for row in read] == wanted and not skipped


def test_progress_in_bytes(write):
    path, calls = write(as_list(*[GOOD] * 2500)), []
    read_rows([path, path], progress=lambda done, total: calls.append((done, total)))
    size = path.stat().st_size
    assert (
        len(calls) == 6
        and calls == sorted(calls)
        and calls[2] == (size, 2 * size)
        and calls[-1] == (2 * size, 2 * size)
    )


# Bad rows


def reject(form, write, bad):
    """The reason for which the second of three rows is bad: refused by default, else dropped alone."""
    path = write(form(GOOD, bad, CHAT))
    message = refusal(path)
    read, skipped = read_rows([path], skip_bad_rows=True)
    assert [row.source for row in read] == [f"{path}:1", f"{path}:3"]
    assert [text_of(row) for row in read] == [("Add.", "1 2", "3"), (("user", "Hi"), ("assistant", "Hello"))]
    (bad,) = skipped
    assert bad.source == f"{path}:2"
    saved = "save the file as UTF-8 (Excel: CSV UTF-8), or " if "UTF-8" in bad.reason else ""
    remedy = f"{saved}--skip-bad-rows drops them"
    assert message == f"data: got 1 bad of 3 rows, wanted none; {remedy}\n  {bad.source}: {bad.reason}"
    return bad.reason


def messages(*turns):
    return {"messages": [dict(zip(("role", "content"), turn, strict=False)) for turn in turns]}


USER, ASSISTANT, SYSTEM = ("user", "a"), ("assistant", "b"), ("system", "c")
BAD = {
    "garbage in an object": (b'{"instruction" "a"}', "invalid JSON at byte .*delimiter"),
    "a number": (b"-12.5e3", "row: got a number, wanted an object"),
    "a string": (b'"a, ] \\" }"', "row: got a string, wanted an object"),
    "null": (b"null", "row: got null, wanted an object"),
    "a constant": (b"NaN", "row: got a number, wanted an object"),
    "a list": (b'[{"instruction": "a"}]', "row: got a list, wanted an object"),
    "no instruction": (
        {"question": "a", "output": "b"},
        r"instruction: missing, got the keys \['question', 'output'\]",
    ),
    "no output": ({"instruction": "a"}, "output: missing"),
    "empty": ({}, r"instruction: missing, got the keys \[\]"),
    "many keys": ({f"key{i}": 0 for i in range(99)}, r"^instruction: missing, got the keys .{77}\.\.\.$"),
    "a number as text": (GOOD | {"instruction": 5}, "^instruction: got a number, wanted a string$"),
    "null as text": (GOOD | {"output": None}, "^output: got null, wanted a string$"),
    "a boolean as text": (GOOD | {"input": False}, "^input: got a boolean, wanted a string$"),
    "a list as text": (GOOD | {"output": ["a"]}, "^output: got a list, wanted a string$"),
    "an object as text": (GOOD | {"output": {}}, "^output: got an object, wanted a string$"),
    "NaN as text": (GOOD | {"input": float("nan")}, "^input: got a number, wanted a string$"),
    "Infinity as text": (GOOD | {"output": float("-inf")}, "^output: got a number, wanted a string$"),
    "a key twice": (b'{"instruction": "a", "output": "b", "output": "c"}', "got the key 'output' twice"),
    "a key twice inside": (b'{"instruction": "a", "output": "b", "x": [{"k": 1, "k": 1}]}', "got the key 'k' twice"),
    "half a surrogate pair": (
        b'{"instruction": "ab\\ud800c", "output": "b"}',
        r"instruction: .*'\\ud800' at character 2",
    ),
    "the other half": (b'{"instruction": "a", "output": "\\uDE00\\uD83D"}', r"output: .*lone surrogate '\\ude00'"),
    "a surrogate in a chat": (messages(USER, ("assistant", "\udfff")), r"messages\[1\].content: .*lone surrogate"),
    "nothing asked": ({"instruction": "", "input": "", "output": "b"}, "instruction and input both empty"),
    "nothing asked, no input": ({"instruction": "", "output": "b"}, "instruction and input both empty"),
    "both kinds": (GOOD | CHAT, "got both messages and instruction"),
    "too deep for the parser": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 32"),
    "objects too deep": (b'{"a":' * 33 + b"1" + b"}" * 33, "nested deeper than 32"),
    "messages: no list": ({"messages": "a"}, "^messages: got a string, wanted a list$"),
    "messages: none": ({"messages": []}, "^messages: got none as the last role, wanted assistant$"),
    "messages: no object": ({"messages": ["a"]}, r"^messages\[0\]: got a string, wanted an object$"),
    "messages: no role": (
        {"messages": [{"content": "a"}]},
        r"^messages\[0\].role: missing, got the keys \['content'\]$",
    ),
    "messages: no content": (messages(USER, ("assistant",)), r"^messages\[1\].content: missing"),
    "messages: null content": (
        messages(USER, ("assistant", None)),
        r"^messages\[1\].content: got null, wanted a string$",
    ),
    "messages: odd role": (messages(("human", "a"), ASSISTANT), r"^messages\[0\].role: got 'human', wanted 'user' or"),
    "messages: role of a number": (messages((1, "a")), r"^messages\[0\].role: got a number, wanted a string$"),
    "messages: long role": (messages(("x" * 999, "a")), r"^messages\[0\].role: got 'x{76}\.\.\., wanted"),
    "messages: ends with the user": (
        messages(USER, ASSISTANT, USER),
        "^messages: got user as the last role, wanted assist",
    ),
    "messages: system alone": (messages(SYSTEM), "^messages: got system as the last role"),
    "messages: assistant first": (
        messages(ASSISTANT),
        r"^messages\[0\].role: got 'assistant', wanted 'user' or a system",
    ),
    "messages: assistant after system": (
        messages(SYSTEM, ASSISTANT),
        r"^messages\[1\].role: got 'assistant', wanted 'user'$",
    ),
    "messages: user twice": (messages(USER, USER, ASSISTANT), r"^messages\[1\].role: got 'user', wanted 'assistant'$"),
    "messages: late system": (
        messages(USER, SYSTEM, ASSISTANT),
        r"^messages\[1\].role: got 'system', wanted 'assistant'$",
    ),
    "messages: system twice": (
        messages(SYSTEM, SYSTEM, USER, ASSISTANT),
        r"^messages\[1\].role: got 'system', wanted 'user'$",
    ),
}


@FORMATS
@pytest.mark.parametrize("bad, reason", BAD.values(), ids=BAD)
def test_a_bad_row(form, bad, reason, write):
    got = reject(form, write, bad)
    assert re.search(reason, got) and "\n" not in got and len(got) < 200


@FORMATS
def test_invalid_utf8_is_found_to_the_byte(form, write):
    for broken in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f\x98"):  # no such byte; cut; a surrogate; cut
        bad = b'{"instruction": "\xc3\xa9 ' + broken + b'", "output": "b"}'
        reason = reject(form, write, bad)
        position = form(GOOD, bad, CHAT).index(b"\xa9 " + broken) + 2
        assert reason == f"got invalid UTF-8 at byte {position} of the file"


@FORMATS
def test_invalid_json_is_found_to_the_byte(form, write):
    bad = '{"é": "é", \x01}'.encode()
    assert f"byte {form(GOOD, bad, CHAT).index(1)} of the file" in reject(form, write, bad)


@pytest.mark.parametrize("line", ['"input": "x,', '"input": x",', '"input": "x "y",', '"input": "x\ny",'])
def test_in_an_indented_list_a_lost_quote_spoils_its_own_row(line, write):
    rows = [json.dumps(GOOD, indent=2)] * 5
    rows[1] = rows[1].replace('"input": "1 2",', line)
    path = write(f"[{', '.join(rows)}]".encode())
    read, skipped = read_rows([path], skip_bad_rows=True)
    starts = [n for n, line in enumerate(path.read_text().split("\n"), 1) if "{" in line]
    assert [row.source for row in read] == [f"{path}:{starts[n]}" for n in (0, 2, 3, 4)]
    assert skipped[0].source == f"{path}:{starts[1]}" and skipped[0].reason.startswith("row 2: got invalid JSON")


@FORMATS
def test_all_bad_rows_are_counted_and_five_shown(form, write):
    bad = GOOD | {"output": 1}
    first, second = write(form(bad, GOOD, bad, bad), "first"), write(form(bad, bad, bad, GOOD, bad), "second")
    message = refusal(first, second).splitlines()
    assert message[0] == "data: got 7 bad of 9 rows, wanted none; --skip-bad-rows drops them"
    named = [f"{first}:1", f"{first}:3", f"{first}:4", f"{second}:1", f"{second}:2"]
    assert message[1:] == [f"  {row}: output: got a number, wanted a string" for row in named] + ["  and 2 more"]
    read, skipped = read_rows([first, second], skip_bad_rows=True)
    assert [row.source for row in read] == [f"{first}:2", f"{second}:4"] and len(skipped) == 7
    assert [bad.source for bad in skipped[:5]] == named


def test_no_row_left_is_an_error_all_the_same(write):
    path = write(as_list({}, {}))
    message = refusal(path, skip_bad_rows=True)
    assert "got 2 bad of 2 rows" in message and f"{path}:2: instruction: missing" in message
    assert "--skip-bad-rows" not in message and "--skip-bad-rows" not in refusal(path)
    some = refusal(write(as_list(GOOD, {}), "some"), skip_bad_rows=None)
    assert "got 1 bad of 2 rows" in some and "--skip-bad-rows" not in some, "a command without that flag"
    other = write(as_list(GOOD), "other")
    assert len(read_rows([path, other], skip_bad_rows=True)[0]) == 1


# Where a row is


def as_indented(*rows):
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


def as_one_line(*rows):
    return b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False).encode()


def as_pairs(*rows):
    """Two rows a line, and the lines end as on Windows."""
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    return ("[" + ",\r\n".join(map(", ".join, zip(texts[::2], texts[1::2], strict=True))) + "]").encode()


@pytest.mark.parametrize("form", [as_list, as_lines, as_indented, as_one_line, as_pairs])
def test_a_row_is_named_so_that_an_editor_jumps_to_it(form, write):
    """The place is FILE:LINE, or FILE:LINE:COLUMN where rows share a line; a bad row's is as a good one's."""
    rows = [GOOD | {"input": "é\U0001f600" * n, "output": 3 if n % 4 == 2 else "x\ny"} for n in range(8)]
    path = write(form(*rows), "a:3.json")
    read, skipped = read_rows([path], skip_bad_rows=True)
    lines = path.read_text("utf-8-sig").split("\n")
    for row in [*read, *skipped]:
        number, *column = map(int, row.source.removeprefix(f"{path}:").split(":"))
        line = lines[number - 1]
        assert bool(column) == (line.count('"instruction"') > 1)
        begin = column[0] - 1 if column else line.index("{")
        assert line[begin] == "{"
        if isinstance(row, Row):
            assert json.dumps(row.input)[1:-1] in line[begin:] or row.input in line[begin:] or form is as_indented
    places = [row.source for row in [*read, *skipped]]
    assert len(set(places)) == 8
    told = [bad.reason for bad in skipped]
    named = [] if form in (as_list, as_lines) else ["row 3: ", "row 7: "]  # there a row's number is its line
    assert [reason.partition("output")[0] for reason in told] == (named or ["", ""])


def test_the_lines_of_a_file_are_counted_once():
    """Else a list of 52,000 rows on one line would take hours."""

    class Watched(bytes):
        n_bytes = 0

        def __getitem__(self, part):
            Watched.n_bytes += part.stop - part.start
            return super().__getitem__(part)

    rows = "".join(f'"é{n}",\n' if n % 3 == 0 else f'"é{n}", ' for n in range(1000))
    data = Watched(rows.encode())
    lines, found = LineCounter(data, 0), []
    positions = [match.start() for match in re.finditer(rb'"\xc3', data)]
    for position in positions:
        found.append(lines.move_to(position))
    assert Watched.n_bytes == positions[-1]
    assert found[:5] == [(1, 1), (2, 1), (2, 7), (2, 13), (3, 1)] and found[-1] == (334, 17)


# Broken lists

ROW = json.dumps(GOOD).encode()
BROKEN = {  # what it is, at which row, from which byte, and what is wanted there
    "no closing bracket": (b"[" + ROW, 1, len(ROW) + 1, "',' or ']' after this row"),
    "no closing bracket after a comma": (b"[" + ROW + b", ", 2, len(ROW) + 3, "a complete row"),
    "an opening bracket alone": (b"[", 1, 1, "a complete row"),
    "a comma too many": (b"[" + ROW + b",]", 2, len(ROW) + 2, "a complete row"),
    "two commas": (b"[" + ROW + b",," + ROW + b"]", 2, len(ROW) + 2, "a complete row"),
    "no comma": (b"[" + ROW + ROW + b"]", 1, len(ROW) + 1, "',' or ']' after this row"),
    "garbage after a row": (b"[" + ROW + b" x, " + ROW + b"]", 1, len(ROW) + 2, "',' or ']' after this row"),
    "garbage for a row": (b"[" + ROW + b", xyz, " + ROW + b"]", 2, len(ROW) + 3, "a complete row"),
    "garbage at the end": (b"[" + ROW + b", xyz", 2, len(ROW) + 3, "a complete row"),
    "a brace too many": (b"[" + ROW + b"}, " + ROW + b"]", 1, len(ROW) + 1, "',' or ']' after this row"),
    "text after the list": (b"[" + ROW + b"]\n" + b"[" + ROW + b"]", 1, len(ROW) + 3, "nothing after the list"),
    "text after an empty list": (b"[ ] x", 1, 4, "nothing after the list"),
    "a lost quote": (
        b"[" + ROW + b"," + ROW.replace(b'.",', b".,") + (b"," + ROW) * 9 + b"]",
        2,
        len(ROW) + 2,
        "a complete",
    ),
    "half a scalar": (b"[" + ROW + b", nul", 2, len(ROW) + 3, "a complete row"),
}


@pytest.mark.parametrize("data, row, position, wanted", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_a_broken_list_is_never_excused(data, row, position, wanted, skip_bad_rows, write):
    path = write(data)
    message = refusal(path, skip_bad_rows=skip_bad_rows)
    got = repr(data[position : position + 1]) if position < len(data) else "the end of the file"
    is_after = wanted.startswith("nothing")  # the list, and not within a row, which is then what is named
    begin = position if is_after or wanted.startswith("a complete") else 1
    line, column = data[:begin].count(b"\n") + 1, begin - data[:begin].rfind(b"\n")
    number = "" if data[:3] == b"[ ]" else f"row {row}: "
    assert message.startswith(f"{path}:{line}:{column}: {number}got {got} at byte {position}, wanted {wanted}")
    assert "\n" not in message


def test_a_lost_brace_is_no_cut_off(write):
    """It makes one row of all that follow, and these must not vanish as if they were one."""
    for end in (b"]", b""):
        path = write(b"[" + ROW + b"," + ROW[:-1] + (b"," + ROW) * 9 + end)
        assert refusal(path, skip_bad_rows=True).startswith(f"{path}:1:{len(ROW) + 3}: row 2: got ")


def test_a_list_cut_off_at_any_byte_of_its_last_row(write):
    """The rows before it stay usable, and the cut one is counted."""
    last = {"instruction": 'é \\ " \U0001f600 {[', "id": -12, "ok": True, "x": [float("-inf")], "output": "\U0001f600"}
    texts = {json.dumps(last, ensure_ascii=ascii, indent=indent).encode() for ascii in (0, 1) for indent in (None, 2)}
    for last in texts:
        for cut in range(1, len(last)):
            path = write(b"[" + ROW + b",\n" + ROW + b",\n" + last[:cut])
            assert "got 1 bad of 3 rows" in refusal(path)
            read, skipped = read_rows([path], skip_bad_rows=True)
            assert len(read) == 2
            assert [(bad.source, bad.reason[:15]) for bad in skipped] == [(f"{path}:3", "the file is cut")]


# Broken files


@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "got an empty file"),
        (b"\xef\xbb\xbf", "got blanks alone"),
        (b" \n\n", "got blanks alone"),
        (b"instruction,output\n", "got the byte b'i', wanted '['"),
        ('[{"a": 1}]'.encode("utf-16"), "got UTF-16, not UTF-8; save it as UTF-8"),
        (b"\xfe\xff\0[\0]", "got UTF-16, not UTF-8"),
        (b"[]", "got no rows"),
        (b" [ \n ] ", "got no rows"),
    ],
)
def test_a_file_without_rows(data, reason, skip_bad_rows, write):
    path, good = write(data), write(as_list(GOOD), "good")
    message = refusal(good, path, skip_bad_rows=skip_bad_rows)
    assert message.startswith(f"{path}: {reason}") and "\n" not in message


def test_paths_that_are_no_readable_file(tmp_path, write):
    good = write(as_list(GOOD))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    cases = {"": "a folder", "missing": "No such file", "pipe": "no regular file", "data.json/x": "Not a directory"}
    for name, reason in (cases | {"loop": "Too many levels"}).items():
        message = refusal(good, tmp_path / name)
        assert message.startswith(f"{tmp_path / name}: got ") and reason in message and "\n" not in message
    assert "got no files" in refusal()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(write):
    path = write(as_list(GOOD))
    path.chmod(0)
    assert refusal(path).startswith(f"{path}: got 'Permission denied'")


# Huge rows


@FORMATS
def test_the_size_limit_to_the_byte(form, write):
    row = b'{"instruction": "a", "output": "' + b"x" * (MAX_ROW_BYTES - 34) + b'"}'
    assert len(row) == MAX_ROW_BYTES and len(read_rows([write(form(row))])[0]) == 1
    reason = reject(form, write, row.replace(b'"a"', b'"aa"'))
    assert reason == f"got {MAX_ROW_BYTES + 1} bytes, wanted at most {MAX_ROW_BYTES} (MAX_ROW_BYTES)"


HUGE = 20_000_000  # more than twice MAX_ROW_BYTES, and 20 times what may be allocated
PEAK = """
import json, sys, tracemalloc
from pathlib import Path
from engine.data.rows import read_rows
tracemalloc.start()
rows, skipped = read_rows([Path(sys.argv[1])], skip_bad_rows=True)
dropped = [[bad.source, bad.reason] for bad in skipped]
print(json.dumps([[row.source for row in rows], dropped, tracemalloc.get_traced_memory()[1]]))
"""


@FORMATS
@pytest.mark.parametrize("fill", [b"x", rb"\n" + b"}{][" + b"x" * 494], ids=["text", "tokens"])
def test_a_huge_row_is_dropped_alone_in_little_memory(form, fill, write):
    path = write(b"")
    before, after = form(GOOD, b"@", CHAT).split(b"@")
    with open(path, "wb") as file:
        file.write(before + b'{"instruction": "a", "output": "')
        for _ in range(100):
            file.write(fill * (HUGE // 100 // len(fill)))
        file.write(b'"}' + after)
    process = Started(PEAK, path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    read, skipped, peak_bytes = json.loads(out)
    assert read == [f"{path}:1", f"{path}:3"]
    assert skipped == [[f"{path}:2", f"got {HUGE + 34} bytes, wanted at most {MAX_ROW_BYTES} (MAX_ROW_BYTES)"]]
    assert peak_bytes < 1 << 20
    path.unlink()  # pytest keeps its temporary folders


@pytest.mark.parametrize(("length", "told"), [(78, "'" + "x" * 78 + "'"), (79, "'" + "x" * 76 + "...")])
def test_a_value_is_told_in_80_characters_at_most(length, told):
    assert shorten("x" * length) == told and len(told) == 80
