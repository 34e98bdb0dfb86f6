"""Repairs of generated tasks: line ends, blanks, labels, and markers that say that there is no input."""

import re

REPAIRS = {
    "line ends": "CRLF and CR became LF",
    "blanks": "blanks around a field were removed",
    "label": "a leading label or number, such as 'Instruction:' or '3.', was removed",
    "no-input marker": "an input, or an end of the instruction, that only says that there is no input was removed",
}
ANY = re.IGNORECASE

EDGES = "\ufeff\u200b\u2060"
BLANKS = EDGES + "".join(chr(code) for code in range(0x3001) if chr(code).isspace())  # there are none above
HEAD, TAIL = r"(?:#{1,6} ?)?\*{0,3}", rf"\*{{0,3}}[\s{EDGES}]*"
LABEL_PATTERNS = {
    "instruction": rf"{HEAD}(?:(?:task|instruction|prompt) ?\d{{0,3}} ?[:.)]|\d{{1,2}}[.)](?=\s)){TAIL}",
    "input": rf"{HEAD}input ?:{TAIL}",
    "output": rf"{HEAD}(?:output|response) ?:{TAIL}",
}
LABELS = {field: re.compile(pattern, ANY) for field, pattern in LABEL_PATTERNS.items()}
NEEDED = "(?:required|needed|necessary|provided|given|available|applicable)"
NO_INPUT = re.compile(
    rf"none(?: {NEEDED})?|n a|no ?input|(?:input )?(?:is )?not {NEEDED}"
    rf"|no (?:(?:additional|further|specific|extra) )?input(?: is)?(?: {NEEDED})?(?: for this \w+)?"
    "|keine(?: eingabe)?|aucune(?: entrée)?|sin entrada|ninguna|sem entrada|nenhuma"
    "|nessun input|geen(?: invoer)?|无|无输入|無|なし|入力なし|없음|нет(?: ввода)?"
)
NO_INPUT_AS_IS = re.compile(r"[<(\[{] ?(?:empty|null|nil|blank|no data|no text) ?[>)\]}]|[-\u2013\u2014]", ANY)
NO_INPUT_END = re.compile(r"`?< ?no[ _-]?input ?>`?\.?\Z|\bnoinput\.?\Z|(?<=[.?!\n])\s{0,9}\(?no input\)?\.?\Z", ANY)


def repair_item(item: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the item with every safe repair made, and the names of the repairs, in the order of REPAIRS.

    A repaired item needs no further repair.
    """
    fields, repairs = {}, set()
    for field, label in LABELS.items():
        text = item[field].replace("\r\n", "\n").replace("\r", "\n")
        bare = strip_edges(text)
        start = 0
        while (found := label.match(bare, start)) and found.end() < len(bare):
            start = found.end()
        fields[field] = bare[start:]
        if text != item[field]:
            repairs.add("line ends")
        if text != bare:
            repairs.add("blanks")
        if start:
            repairs.add("label")
    if is_phrase(fields["input"], NO_INPUT) or NO_INPUT_AS_IS.fullmatch(fields["input"]):
        fields["input"] = ""
        repairs.add("no-input marker")
    text = fields["instruction"]
    end = len(text)
    while (found := NO_INPUT_END.search(text, max(0, end - 40), end)) and found.start():
        end = found.start()
        while end and (text[end - 1].isspace() or text[end - 1] in EDGES):
            end -= 1
        repairs.add("no-input marker")
    fields["instruction"] = text[:end]
    return fields, [repair for repair in REPAIRS if repair in repairs]


def strip_edges(text: str) -> str:
    """Return the text without blanks and invisible characters at its ends."""
    return text.strip(BLANKS)


def is_phrase(text: str, pattern: re.Pattern[str]) -> bool:
    """Return whether the whole text, in lower case and without punctuation, matches the pattern."""
    return len(text) <= 80 and pattern.fullmatch(" ".join(re.findall(r"[^\W_]+", text.lower()))) is not None
