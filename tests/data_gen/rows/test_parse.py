"""Answers as models write them, whole and broken: every whole task is read, and a broken one costs no other."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.rows import parse
from data_gen.rows.parse import EXCERPT, KINDS, MAX_DEPTH, MAX_PROBLEMS, parse_answer, parse_plain
from tests.helpers.linear import assert_linear_time

A = {"instruction": "Name a colour.", "input": "", "output": "Red"}
B = {"instruction": 'Quote "him" and {"a": 1}.', "input": "x\ty\n\\", "output": "{"}
C = {"instruction": "明日の朝", "input": "[1, 2]", "output": "a \U0001f600 }"}
THREE = [A, B, C]
WRAPPED = json.dumps({"tasks": THREE})
CHARACTERS = st.sampled_from('ab"\\{}[]:, \n\u00e9\U0001f600') | st.characters(exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS, max_size=30)
TASKS = st.lists(st.fixed_dictionaries({"instruction": TEXTS, "input": TEXTS, "output": TEXTS}), min_size=1, max_size=5)


def kinds(text, truncated=False):
    return [kind for kind, _ in parse_answer(text, truncated)[1]]


def items(text, truncated=False):
    return parse_answer(text, truncated)[0]


def only_items(text, truncated=False):
    """Return the items of an answer and check that it has no problem."""
    found, problems = parse_answer(text, truncated)
    assert not problems
    return found


# Answers as they were asked for, which one call reads

KEYS = st.sampled_from(["instruction", "input", "output", "tasks", "Input", "other"])
VALUES = TEXTS | st.sampled_from(["\ud83d", "\x00", "\u00e9\ud800x", None, 1, [], {}]) | TASKS
NEARLY = st.dictionaries(
    st.sampled_from(["tasks", "tasks", "Tasks", "x"]), TASKS | st.lists(st.dictionaries(KEYS, VALUES))
)


def read_the_long_way(text):
    """Return what parse_answer returns without parse_plain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parse, "parse_plain", lambda text: [])
        return parse_answer(text, False)


@settings(max_examples=200)
@given(st.fixed_dictionaries({"tasks": TASKS}) | NEARLY, st.booleans(), st.sampled_from([None, 1]), st.randoms())
def test_the_short_way_reads_what_the_long_one_reads(answer, ascii, indent, draw):
    text = json.dumps(answer, ensure_ascii=ascii, indent=indent)
    assert parse_answer(text, False) == read_the_long_way(text)
    cut = draw.randrange(len(text))
    text = (
        text[:cut]
        + draw.choice(['"', "\\", "{", "}", " ", "\x1f", "\ufeff", '"x": 1,'])
        + text[cut + draw.randrange(2) :]
    )
    assert parse_answer(text, False) == read_the_long_way(text)


def test_what_the_short_way_reads():
    text = json.dumps({"tasks": THREE})
    turned = json.dumps({"tasks": [dict(reversed(row.items())) for row in THREE]})
    assert [[*map(list, row.items())] for row in parse_plain(turned)] == [[*map(list, row.items())] for row in THREE]
    assert parse_plain(text) == THREE
    halves = json.dumps({"tasks": [A | {"output": "\ud83d\ude00 \ud83d"}]}, ensure_ascii=False)
    assert parse_plain(halves) == [A | {"output": "\U0001f600 \ufffd"}] == parse_plain(json.dumps(json.loads(halves)))
    for another in (
        text.replace("instruction", "instr\\u0075ction"),
        text.replace("input", "INPUT"),
        text.replace('"input": ""', '"input": null'),
        text.replace('"input": ""', '"output": ""'),
        text.replace('"input": ""', '"input": "", "input": "x"'),
        json.dumps(THREE),
        json.dumps({"tasks": THREE, "n": 3}),
        json.dumps({"tasks": [{"tasks": THREE}]}),
        f"{text} .",
        "[" * 99_999,
        '{"tasks": []}',
        '{"tasks": "x"}',
        "1",
    ):
        assert parse_plain(another) == [], another


# What models put around tasks

FORMS = {
    "asked for": WRAPPED,
    "indented": json.dumps({"tasks": THREE}, indent=2, ensure_ascii=False),
    "bare list": json.dumps(THREE),
    "lines": "\n".join(map(json.dumps, THREE)),
    "lines with commas": ",\n".join(map(json.dumps, THREE)),
    "another key": json.dumps({"count": 3, "Data": THREE, "done": True, "next": None}),
    "two keys": json.dumps({"easy": [A], "hard": [B, C]}),
    "an object of tasks": json.dumps({"task_1": A, "task_2": B, "3": C}),
    "tasks under a field's name": json.dumps({"output": {"tasks": THREE}}),
    "tasks beside an instruction": json.dumps({"instruction": "Here are the tasks", "tasks": THREE}),
    "lists of lists": json.dumps([[A], [[B], [C]]]),
    "fence": f"```json\n{WRAPPED}\n```",
    "a fence each": "\n\n".join(f'{i}. Task "{i}":\n```json\n{json.dumps(row)}\n```' for i, row in enumerate(THREE)),
    "prose": f'Here is the 3" list of {{tasks}} [you] asked for:\n\n{WRAPPED}\n\nLet me know if {{"a": 1}} helps.',
    "thought": f'<think>\nMaybe {json.dumps(A)}? Or {{"instruction": "x</think>\n\n{WRAPPED}',
    "Thinking": f"\n<Thinking>{json.dumps(A)}</Thinking>{WRAPPED}",
    "thought without its opening tag": f"Okay, for instance {json.dumps(A)}.\n</think>\n{WRAPPED}",
    "two thoughts without their opening tags": f"{A['output']}?</think>\nOr {json.dumps(B)}.\n</think>\n{WRAPPED}",
    "trailing commas": WRAPPED.replace('"}', '",}').replace("]}", ",]}"),
    "no commas": WRAPPED.replace('", "', '" "').replace("}, {", "} {"),
    "keys in other cases": WRAPPED.replace('"instruction"', '" Instruction "').replace('"output"', '"OUTPUT"'),
    "other keys": WRAPPED.replace('{"i', '{"id": -1.5e3, "tags": [{"x": [null]}, "y"], "ok": true, "i'),
    "keys in another order": json.dumps([{key: row[key] for key in reversed(row)} for row in THREE]),
    "smart spacing": "\ufeff" + json.dumps({"tasks": THREE}, separators=("\u200b,\u2060", "\u00a0:\u3000")),
    "full-width punctuation": json.dumps({"tasks": THREE}, separators=("\uff0c", "\uff1a")),
    "raw line ends": WRAPPED.replace("\\n", "\n").replace("\\t", "\t"),
    "no end of the list": WRAPPED[:-2],
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_tasks_are_read_from_every_form(text):
    assert only_items(text) == THREE


def test_a_task_has_its_three_fields_in_order_and_texts_alone():
    (item,) = only_items('{"output": "b", "id": 7, "instruction": "a"}')
    assert list(item.items()) == [("instruction", "a"), ("input", ""), ("output", "b")]


def test_no_input_and_null_are_an_empty_one():
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}]
    assert only_items(json.dumps(rows)) == [{"instruction": "a", "input": "", "output": "b"}] * 2


def test_empty_texts_are_texts():
    assert only_items('{"instruction": "", "input": "", "output": ""}') == [dict.fromkeys(A, "")]


@given(TASKS, st.sampled_from([None, 1]), st.booleans())
def test_what_was_written_is_read(rows, indent, ascii):
    assert only_items(json.dumps({"tasks": rows}, indent=indent, ensure_ascii=ascii)) == rows


@given(TASKS)
def test_a_task_quoted_inside_a_task_is_text(rows):
    outer = {"instruction": json.dumps(rows), "input": json.dumps(json.dumps(rows)), "output": json.dumps({"t": rows})}
    assert only_items(json.dumps([outer, A])) == [outer, A]


# What is wrong with a task costs that one alone


@pytest.mark.parametrize("broken, kind", [
    ('{"instruction": "Say "hi" to me", "input": "", "output": "hi"}', "malformed"),
    ('{"instruction": "a", "input": "", "output": "b}', "malformed"),
    ('{"instruction": "a", "input": "", "output": b"}', "malformed"),
    ('{"instruction: "a", "input": "", "output": "b"}', "malformed"),
    ('{"instruction": "a", "input": "", "output": "b"', "malformed"),
    ('"instruction": "a", "input": "", "output": "b"}', "malformed"),
    ('{"instruction" "a", "input": "", "output": "b"}', "malformed"),
    ('{"instruction": "a", "input": "", "output": }', "malformed"),
    ('{"instruction": "a", "input": ["x", "output": "b"}', "malformed"),
    ('{"instruction": "a", "output": "b", "instruction": "c", "output": "d"}', "malformed"),
    ('{"instruction": "a", "input": "", "output": "x = {"a": 1}; y"}', "malformed"),
    ('{"instruction": "a", "meta": {"level": hard}, "input": "", "output": "b"}', "malformed"),
    ('{"instruction": "a", "input": ""}', "missing field"),
    ('{"input": "a", "output": "b"}', "missing field"),
    ('{"instruction": "a", "input": "", "output": null}', "missing field"),
    ('{"instruction": "a", "input": "", "response": "b"}', "missing field"),
    ('{"instruction": "a", "input": "", "output": 42}', "wrong type"),
    ('{"instruction": "a", "input": 3.5, "output": "b"}', "wrong type"),
    ('{"instruction": ["a"], "input": "", "output": "b"}', "wrong type"),
    ('{"instruction": "a", "output": {"instruction": "b", "output": "c"}}', "wrong type"),
    ('{"instruction": "a", "output": true, "tags": [{"instruction": "b", "output": "c"}]}', "wrong type"),
])  # fmt: skip
@pytest.mark.parametrize("form", ['{"tasks": [%s]}', "[%s]"], ids=["wrapped", "bare"])
def test_a_broken_task_is_named_and_its_neighbours_stay(broken, kind, form):
    found, problems = parse_answer(
        form % ", ".join([json.dumps(A), broken, json.dumps(B), broken, json.dumps(C)]), False
    )
    assert found == THREE
    assert [name for name, _ in problems] == [kind] * 2
    assert all(shown.lstrip(", ").startswith(broken[:12]) for _, shown in problems)


@pytest.mark.parametrize("change", ["", '"', "\\", "{", "}", "x"])
def test_no_change_to_a_character_of_a_task_costs_another(change):
    before, middle, after = (json.dumps(row) for row in (A, B, C))
    for place in range(len(middle)):
        text = f'{{"tasks": [{before}, {middle[:place]}{change}{middle[place + 1 :]}, {after}]}}'
        found, problems = parse_answer(text, False)
        assert found[0] == A and found[-1] == C and len(found) + len(problems) >= 3, text
        assert len(found) <= 3 and len(problems) <= 2, text


def test_lines_between_tasks_that_are_no_json_cost_nothing():
    rows = [json.dumps(row) for row in THREE]
    assert items(f'{{"tasks": [{rows[0]}, ..., {rows[1]},\n// the last one\n{rows[2]}]}}') == THREE


@pytest.mark.parametrize("written, read", [
    (r"\d+\.\w \( \frac", "\\d+\\.\\w \\( \frac"),
    (r"it\'s", "it's"),
    (r"\u00e9\ud83d\ude00", "\u00e9\U0001f600"),
    (r"\uZZZZ", "\\uZZZZ"),
    (r"a\ud83d!", "a\ufffd!"),
    (r"\ude00\ud83d", "\ufffd\ufffd"),
    ("\ud83d", "\ufffd"),
    (r"\\u0041 \\n \"", '\\u0041 \\n "'),
])  # fmt: skip
def test_escapes_are_read_as_models_mean_them(written, read):
    (item,) = only_items(f'[{{"instruction": "{written}", "output": "{written}"}}]')
    assert item["instruction"] == item["output"] == read
    item["output"].encode()


# The end


def test_every_cut_keeps_the_whole_tasks_and_names_the_cut_one():
    ends = [WRAPPED.index(json.dumps(row)) + len(json.dumps(row)) for row in THREE]
    for cut in range(len('{"tasks": [{'), len(WRAPPED)):
        found, problems = parse_answer(WRAPPED[:cut], True)
        assert found == [row for row, end in zip(THREE, ends, strict=True) if end <= cut]
        between = WRAPPED[:cut].rstrip(", ]") in [WRAPPED[:end] for end in ends]
        assert [kind for kind, _ in problems] == ["truncated"] * (not between), WRAPPED[:cut]


def test_an_end_inside_a_task_of_an_answer_that_was_not_cut_off_is_broken():
    assert parse_answer(WRAPPED[:-9], False)[0] == THREE[:2]
    assert kinds(WRAPPED[:-9], False) == ["malformed"]


def test_a_break_before_the_cut_is_no_cut():
    text = WRAPPED.replace('"Red"', "Red")[:-9]
    assert parse_answer(text, True)[0] == [B] and kinds(text, True) == ["malformed", "truncated"]


@pytest.mark.parametrize("end", ["nul", "tr", "-", "Non", ""])
def test_a_cut_inside_a_value(end):
    assert kinds('[{"instruction": "a", "output": "b", "input": ' + end, True) == ["truncated"]


def test_an_excerpt_fits_into_utf_8():
    for text in ("\ud800", '{"instruction": "\ude00\ud83d \ud83d\ude00'):
        [(_, shown)] = parse_answer(text, True)[1]
        assert "\ufffd" in shown and shown.encode()


def test_the_excerpt_begins_at_the_task():
    _, [(kind, shown)] = parse_answer('{"tasks": [{"instruction": "Tell\n me.",  "output": "' + "long " * 999, True)
    assert kind == "truncated" and len(shown) == EXCERPT
    assert shown.startswith('{"instruction": "Tell me.", "output": "long long')


@pytest.mark.parametrize("text", [
    "", " \n", "I'm sorry, but I can't help with that.", '{"tasks": []}', "[]", "null", '{"tasks": ["Do x", "Do y"]}',
    "1. Instruction: Name a colour.\nOutput: Red", "<think>I could write " + json.dumps(A), '{"error": {"code": 3}}',
    "```json\n{}\n```", "{tasks}",
])  # fmt: skip
def test_an_answer_without_tasks(text):
    assert parse_answer(text, False) == ([], [("no items", " ".join(text.split())[:EXCERPT])])


def test_an_answer_cut_off_before_its_first_task_ends():
    assert kinds('{"tasks": [{"instruc', True) == ["truncated"]
    assert kinds("<think>Let me see", True) == ["no items"]


def test_problems_are_in_order():
    text = '[{"instruction": 1, "output": "b"}, {"instruction": "a"}, {"instruction": oops}, {"instruction": "'
    assert kinds(text, True) == ["wrong type", "missing field", "malformed", "truncated"]
    assert set(kinds(text, True)) < set(KINDS)


# Text that is made to hurt

N = 16_000
HOSTILE = {
    "braces": "{" * N,
    "quoted braces": '{"' * N,
    "nested objects": '{"a":' * N,
    "nested lists": '{"a":' + "[" * N,
    "nested both": '{"a":[' * N,
    "nested with neighbours": '{"a":[{"b":1},' * N,
    "never closed": '{"instruction":"x",' * N,
    "never quoted": '{"instruction":"' * N,
    "flipped quotes": '{"instruction":"a","output":"b},' * N,
    "escaped quotes": '{"output":"' + '\\"' * N,
    "escaped backslashes": '{"output":"' + "\\" * N + '"',
    "broken after all": '{"t":[' + '{"a":1},' * N + " oops",
    "broken fields": '{"output":[' + '{"a":oops},' * N,
    "blanks": '{"a":' + " " * N,
    "blanks and braces": ("{" + " " * 1000) * (N // 100),
    "blanks and keys": ('{"a"' + " " * 1000) * (N // 100),
    "closing tags": "</think>" * N,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_takes_linear_time(text):
    assert_linear_time(lambda part: parse_answer(part, True), text[: len(text) // 4], text)


def test_a_string_of_100_mb_that_never_ends():
    found, problems = parse_answer(json.dumps(A) + '{"instruction": "' + "x" * 100_000_000, True)
    assert found == [A] and [kind for kind, _ in problems] == ["truncated"]


def test_problems_are_bounded():
    assert kinds('{"instruction": "x", ' * 3000) == ["malformed"] * MAX_PROBLEMS


def test_a_task_deeper_than_any_answer_is_no_task():
    deep = '{"a":' * (MAX_DEPTH // 2)
    assert items(deep + json.dumps(A)) == [A]
    assert items('{"instruction": "x", "output": "y", "z": ' + "[" * 99_999 + "]" * 99_999 + "}" + json.dumps(B)) == [B]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(['{"', '"', "\\", "{", "}", "[", "]", ":", ",", "instruction", "output", " ", "1"])))
def test_any_text_is_read_without_a_crash(parts):
    found, problems = parse_answer("".join(parts), True)
    assert found or problems
    assert all(list(item) == list(A) and all(isinstance(value, str) for value in item.values()) for item in found)
    assert {kind for kind, _ in problems} <= set(KINDS)
