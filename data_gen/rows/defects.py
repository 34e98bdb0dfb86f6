"""Defects of generated tasks, each with its reason: the defects of the original 52K data, and a check for each.

A check must be sure of its defect: a task that may be good passes. Checks of English phrases apply only to English
data. Every check takes linear time and sees the first SCAN characters of a field.
"""

import re
from collections import Counter
from typing import TypeAlias

from data_gen.base.files import FIELDS
from data_gen.base.language import guess_language, guess_other_language
from data_gen.rows import defect_patterns as patterns
from data_gen.rows.repairs import is_phrase
from data_gen.rows.tokens import tokenize, tokenize_again

Task: TypeAlias = dict[str, str]  # instruction, input, output

REASONS = {
    "empty instruction": "the instruction holds no word",
    "empty output": "the output is empty",
    "N/A output": "the output only says that there is none",
    "broken characters": "control characters, wrongly decoded text, or LaTeX that lost its backslashes",
    "short instruction": "the instruction has fewer than 2 words",
    "long instruction": "the instruction has more than 150 words",
    "list debris": "the instruction begins with a bullet, or with the end of something else",
    "merged examples": "a field holds another example, or the markup of a chat",
    "placeholder": "instruction or input stand for an attachment, or for a text that was never written",
    "URL": "instruction or input point to the web, which a model of text cannot read",
    "media task": "the task is to see or make an image, sound or video",
    "missing text": "the instruction speaks of a given text, and none is given",
    "copied input": "the output is the input",
    "copied instruction": "input or output is the instruction",
    "refusal": "the output refuses as an AI, or apologises for what it cannot do",
    "no answer": "the output says what an answer should be like, or a field speaks of the prompt",
    "repetition": "the output runs in a loop",
    "wrong language": "the instruction, or an output that nobody asked to translate, is in another language",
}
SCAN = 20_000  # characters of a field that the checks see
SEEN = 120  # characters of a defect that are reported
MIN_TOKENS, MAX_TOKENS = 2, 150
SAMPLE = 500  # characters of an output from which its language is guessed
MIN_OUTPUT = 8  # tokens below which the language of an output is not guessed
SELF_CONTAINED = 120  # an input with this many characters besides a link does not depend on the link

# ---- tasks of any language: a check returns the defective part of a task, or None -----------------------------------


def find_empty_instruction(item: Task) -> str | None:
    """Find an instruction without a word."""
    return None if re.search(r"\w", item["instruction"]) else item["instruction"] or "nothing"


def find_empty_output(item: Task) -> str | None:
    """Find an empty output."""
    return None if item["output"].strip() else "nothing"


def find_no_output(item: Task) -> str | None:
    """Find an output that only says that there is none."""
    output = item["output"].strip()
    return output if is_phrase(output, patterns.NO_OUTPUT) or patterns.NO_OUTPUT_AS_IS.fullmatch(output) else None


def find_broken_characters(item: Task) -> str | None:
    """Find control characters, wrongly decoded text, or LaTeX without its backslashes."""
    # In a line of ASCII that can be printed nothing is broken.
    return find_first(patterns.BROKEN, *[text for text in item.values() if not (text.isascii() and text.isprintable())])


def find_short_instruction(item: Task) -> str | None:
    """Find an instruction of fewer than MIN_TOKENS tokens."""
    return item["instruction"] if len(tokenize_again(item["instruction"])) < MIN_TOKENS else None


def find_long_instruction(item: Task) -> str | None:
    """Find an instruction of more than MAX_TOKENS tokens, or as long as what the checks see."""
    n = len(tokenize_again(item["instruction"]))
    return f"{n} words" if n > MAX_TOKENS or len(item["instruction"]) >= SCAN else None


def find_list_debris(item: Task) -> str | None:
    """Find an instruction that begins with a bullet or with the end of something else."""
    return item["instruction"] if patterns.DEBRIS.match(item["instruction"]) else None


def find_merged_examples(item: Task) -> str | None:
    """Find another example, or the markup of a chat, inside a field."""
    return find_first(patterns.MERGED, *item.values())


def find_placeholder(item: Task) -> str | None:
    """Find a stand-in for an attachment or for a text that was never written."""
    whole = patterns.STANDS_FOR.fullmatch(item["input"]) or patterns.MEDIA_FILE.fullmatch(item["input"])
    if whole and not patterns.ABOUT_FILES.search(item["instruction"]):
        return whole[0]
    return find_first(patterns.INSERT, item["instruction"], item["input"]) or find_first(
        patterns.ATTACHED, item["instruction"]
    )


def find_url(item: Task) -> str | None:
    """Find a link that the task depends on. Reserved domains, tasks about URLs and long inputs pass."""
    asked = item["instruction"] + item["input"]
    if asked.isascii() and not ("http" in (lower := asked.lower()) or "www." in lower):
        return None
    if patterns.ABOUT_URLS.search(patterns.URL.sub("", item["instruction"])):
        return None
    for field in ("instruction", "input"):
        for found in patterns.URL.finditer(item[field]):
            mentioned = field == "input" and len(item[field]) - len(found[0]) >= SELF_CONTAINED
            if not mentioned and not patterns.RESERVED.fullmatch(found[1].rstrip(".-")):
                return found[0]
    return None


def find_copied_input(item: Task) -> str | None:
    """Find an output equal to the input, unless the instruction allows that."""
    text = item["input"].strip()
    return (
        text if text and text == item["output"].strip() and not patterns.MAY_STAY.search(item["instruction"]) else None
    )


def find_copied_instruction(item: Task) -> str | None:
    """Find an input or output with the tokens of the instruction."""
    words = tokenize_again(item["instruction"])
    for field in ("input", "output"):
        if len(item[field]) <= 2 * len(item["instruction"]) and tokenize_again(item[field]) == words:
            return f"{field}: {item[field]}"
    return None


def find_repetition(item: Task) -> str | None:
    """Find a loop in the output.

    A loop is a character 50 times in a row, a line of over 12 characters at least 5 times and in most lines, or at
    least 60 words with few different runs of 4.
    """
    found = find_loop(item["output"])
    return None if found is None or patterns.AGAIN.search(item["instruction"]) else found


def find_loop(output: str) -> str | None:
    """Find what find_repetition finds, whatever the instruction is."""
    # A character 50 times in a row fills one of the stretches of 25.
    if any([output[at] * 25 == output[at : at + 25] for at in range(0, len(output), 25)]):
        found = patterns.CHARACTER_LOOP.search(output)
        if found:
            return found[0]
    lines = [line for line in map(str.strip, output.split("\n")) if len(line) > 12]
    if len(lines) >= 5:
        line, n = Counter(lines).most_common(1)[0]
        if n >= 5 and n > len(lines) / 2:
            return line
    if len(output) < 2 * 60 - 1 and output.isascii():  # tokens of one letter and blanks
        return None
    words = tokenize(output)
    if len(words) < 60 or len(set(words[:-3])) >= 0.4 * (len(words) - 3):  # each begins a run that no other begins
        return None
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return " ".join(Counter(runs).most_common(1)[0][0]) if len(set(runs)) < 0.4 * len(runs) else None


def find_wrong_language(item: Task, language: str) -> str | None:
    """Find an instruction, or an output that nobody asked to translate, in another language."""
    asked = item["instruction"]
    has_quotes = not asked.isascii() or any([mark in asked for mark in "\"'`"])
    found = guess_other_language(patterns.QUOTED.sub(" ", asked) if has_quotes else asked, language)
    if found:
        return f"{found}: {item['instruction']}"
    if language != "en":
        return None
    output = item["output"][:SAMPLE]
    found = guess_other_language(output, language)
    if not found or patterns.ABOUT_LANGUAGE.search(item["instruction"]):
        return None
    if found == guess_language(item["input"]) or len(tokenize(output)) < MIN_OUTPUT:
        return None
    return f"{found}: {output}"


# ---- English tasks ---------------------------------------------------------------------------------------------------


def find_media_task(item: Task) -> str | None:
    """Find a task to make an image, sound or video."""
    text = item["instruction"]
    found = patterns.MADE.search(text) or patterns.DRAWN.match(text)
    return found[0] if found and not patterns.BY_TEXT.search(text) else None


def find_missing_text(item: Task) -> str | None:
    """Find an instruction about a given text where none is given."""
    text = item["instruction"].rstrip()
    if item["input"].strip():
        return None
    for pattern in (patterns.FOLLOWING, patterns.DONE_TO, patterns.GIVEN):
        found = pattern.search(text)
        if not found or (pattern is patterns.GIVEN and patterns.ABOUT_CODE.search(text)):
            continue
        if not patterns.QUOTED.search(text) and not patterns.IN_PLACE.search(text, found.end()):
            return found[0]
    return None


def find_refusal(item: Task) -> str | None:
    """Find an output that refuses as an AI, or apologises for what it cannot do."""
    asked, output = item["instruction"] + "\n" + item["input"], item["output"]
    found = patterns.AS_AI.search(output)
    if found and not patterns.ABOUT_AI.search(asked):
        return found[0]
    found = patterns.UNABLE.match(output)
    return found[0] if found and not patterns.ABOUT_LETTERS.search(asked) else None


def find_no_answer(item: Task) -> str | None:
    """Find an output that describes what an answer should be, or a field that speaks of the prompt."""
    found = patterns.SHOULD.match(item["output"])
    if found and not patterns.ABOUT_OUTPUTS.search(item["instruction"]):
        return found[0]
    return find_first(patterns.LEAKED, item["instruction"], item["output"][:400])


# ---- all of them ----------------------------------------------------------------------------------------------------

CHECKS = {
    "empty instruction": find_empty_instruction,
    "empty output": find_empty_output,
    "N/A output": find_no_output,
    "broken characters": find_broken_characters,
    "short instruction": find_short_instruction,
    "long instruction": find_long_instruction,
    "list debris": find_list_debris,
    "merged examples": find_merged_examples,
    "placeholder": find_placeholder,
    "URL": find_url,
    "media task": find_media_task,
    "missing text": find_missing_text,
    "copied input": find_copied_input,
    "copied instruction": find_copied_instruction,
    "refusal": find_refusal,
    "no answer": find_no_answer,
    "repetition": find_repetition,
}
ENGLISH = {"media task", "missing text", "refusal", "no answer"}
CHECKS_OF_ENGLISH = tuple(CHECKS.items())
CHECKS_OF_ANY = tuple((reason, check) for reason, check in CHECKS_OF_ENGLISH if reason not in ENGLISH)


def find_defect(item: Task, language: str = "en") -> tuple[str, str] | None:
    """Return (reason, what was seen) for the first defect of an item, in the order of REASONS, or None."""
    short = {field: item[field][:SCAN] for field in FIELDS}
    for reason, check in CHECKS_OF_ENGLISH if language == "en" else CHECKS_OF_ANY:
        seen = check(short)
        if seen is not None:
            return reason, make_snippet(seen)
    seen = find_wrong_language(short, language)
    return ("wrong language", make_snippet(seen)) if seen else None


def find_first(pattern: re.Pattern[str] | patterns.Sought, *texts: str) -> str | None:
    """Return the pattern's match in the first of the texts that has one, or None."""
    for text in texts:
        if found := pattern.search(text):
            return found[0]
    return None


def make_snippet(seen: str) -> str:
    """Return a defective part on one line, as UTF-8 can hold it, cut to SEEN characters."""
    return " ".join(seen.encode("utf-8", "backslashreplace").decode().split())[:SEEN]
