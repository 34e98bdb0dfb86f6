"""Repairs: markers of no input, labels, line ends and blanks, and texts that look like them and stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.rows.repairs import REPAIRS, repair_item
from tests.helpers.linear import assert_linear_time


def task(instruction="Name three primary colours.", input="", output="Red, yellow and blue."):
    return {"instruction": instruction, "input": input, "output": output}


@pytest.mark.parametrize("input", [
    "<noinput>", "<No Input>", "noinput", "No input", "No input.", "NO INPUT REQUIRED", "(no input required)", "N/A",
    "n/a",
    "[N/A]", "None", "none.", "None required", "No input needed", "No additional input is required.", "Not applicable",
    "[no input]", "- none -", "<empty>", "[null]", "-", "—", "No input provided for this task", "Input not required",
    " <noinput>\n", "Input: N/A", "Keine Eingabe", "Aucune entrée", "无", "なし",
])  # fmt: skip
def test_a_marker_is_no_input(input):
    fields, repairs = repair_item(task(input=input))
    assert fields == task() and "no-input marker" in repairs


def test_a_marker_is_at_most_80_characters_long():
    marker = "No additional input is required."
    assert repair_item(task(input=marker + "." * (80 - len(marker))))[0] == task()
    long = marker + "." * (81 - len(marker))
    assert repair_item(task(input=long)) == (task(input=long), [])


@pytest.mark.parametrize("input", [
    "no", "Na", "null", "empty", "blank", "Nonetheless", "None of the guests came.", "No input devices were found.",
    "...",
    "nothing", "0", "N", "A", "--", "+", "No entry", "{}", "[]", "<p>none</p>", "x = None",
])  # fmt: skip
def test_a_text_is_no_marker(input):
    assert repair_item(task(input=input)) == (task(input=input), [])


@pytest.mark.parametrize("written, read", [
    ("Name five companies < noinput >", "Name five companies"),
    ("Who is the CEO of Google? No input", "Who is the CEO of Google?"),
    ("Generate a recipe. `<noinput>`", "Generate a recipe."),
    ("Give an idea. noinput", "Give an idea."),
    ("Describe a use case. (No input)", "Describe a use case."),
    ("Describe it.\nNo input. No input.", "Describe it."),
    ("Explain what happens when there is no input", None),
    ("Say what the tag <noinput> means", None),
    ("No input", None),
])  # fmt: skip
def test_a_marker_at_the_end_of_an_instruction(written, read):
    assert repair_item(task(written)) == ((task(read), ["no-input marker"]) if read else (task(written), []))


@pytest.mark.parametrize("field, written, read", [
    ("instruction", "Instruction: Name a colour.", "Name a colour."),
    ("instruction", "3. Name a colour.", "Name a colour."),
    ("instruction", "12) Name a colour.", "Name a colour."),
    ("instruction", "Task 7: Name a colour.", "Name a colour."),
    ("instruction", "### Instruction:\nName a colour.", "Name a colour."),
    ("instruction", "**Instruction:** Name a colour.", "Name a colour."),
    ("instruction", "4. Instruction: Name a colour.", "Name a colour."),
    ("input", "Input: 1 2", "1 2"),
    ("output", "Output: 3", "3"),
    ("output", "### Response:\n3", "3"),
    ("output", "**Output:** 3", "3"),
    ("instruction", "3.5 times what is 7?", None),
    ("instruction", "1984 is a novel by whom?", None),
    ("instruction", "Taskbar icons are gone, why?", None),
    ("instruction", "Task:", None),
    ("input", "Inputs: 3, outputs: 4", None),
    ("output", "1. Red\n2. Blue", None),
    ("output", "Outputs: 3", None),
    ("output", "Answer: 3\nReason: 1 + 2", None),
])  # fmt: skip
def test_a_leading_label_is_removed(field, written, read):
    fields, repairs = repair_item(task() | {field: written})
    assert fields[field] == (read or written) and repairs == (["label"] if read else [])


def test_line_ends_and_blanks_are_repaired():
    fields, repairs = repair_item(task(" Name\r\na colour.\u200b\n", "\ufeff a\rb ", "\tRed\u3000"))
    assert fields == task("Name\na colour.", "a\nb", "Red") and repairs == ["line ends", "blanks"]


def test_repairs_are_named_in_order_and_once():
    _, repairs = repair_item(task(" 1. Instruction: a b. No input", " N/A\r\n", "Output: x"))
    assert repairs == list(REPAIRS)


PARTS = st.lists(
    st.sampled_from(["Instruction:", "3.", "Task 7", ":", "No input", "<noinput>", " ", "\r\n", ".", "a", "**", "N/A"])
)


@given(PARTS, PARTS, PARTS)
def test_what_was_repaired_stays(instruction, input, output):
    once, _ = repair_item(task("".join(instruction), "".join(input), "".join(output)))
    assert repair_item(once) == (once, [])


HOSTILE = ["a ", "no input ", "<noinput>", "Instruction:", "3. ", "#", "*", "\n", " ", "\t", "\u200b", ".", "`", "n/a"]


@pytest.mark.parametrize("part", HOSTILE)
def test_hostile_text_takes_linear_time(part):
    def repair(text):
        for item in (task(text), task("Do it now.", text), task("Do it now.", "a", text), task(text, text, text)):
            repair_item(item)

    n = 60_000 // len(part)
    assert_linear_time(repair, part * n, part * (4 * n))
