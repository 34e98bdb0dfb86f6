"""Rows for tests that want many: made ones in Alpaca's form, and evaluation instructions as people write them."""

import json

from tests.helpers import task_pool

N_ROWS = 999

EVALUATION = [  # (what it is for, instruction, input, output)
    ("mail", "Make this sentence shorter without losing a fact.",
     "Due to the fact that the ferry had been cancelled on account of fog, we were in a position of having to "
     "wait until the morning.", "The ferry was cancelled because of fog, so we had to wait until morning."),
    ("mail", "Tell the reader's mood from the reply below and answer in one word.",
     "Third time asking: where are the invoices for March?", "Impatient"),
    ("mail", "Write a note to a neighbour whose dog barks at night. Stay friendly and offer to talk.", "",
     "Hello, we hear Bruno most nights after eleven. Could we talk about it over a coffee this week?"),
    ("shop", "Give the stars, from one to five, that the writer of this opinion would give.",
     "The kettle boils fast and the lid fits badly. For the price I would take it again.", "4"),
    ("shop", "Name a shop that repairs bicycles and sells bread. Play with both trades.", "", "Spokes and Loaves"),
    ("kitchen", "What can I cook with these in half an hour?", "two leeks, a tin of chickpeas, lemon, rice",
     "Soften the leeks, add the chickpeas and the lemon's juice, and serve with the rice."),
    ("kitchen", "How do I keep basil on a windowsill alive through January?", "",
     "Give it the brightest window, water from below when the top is dry, and pinch the tips."),
    ("sheets", "Give a formula for the share of column C that is over the limit in F1.", "",
     "=COUNTIF(C:C,\">\"&F1)/COUNT(C:C)"),
    ("sheets", "Turn the lines into a table of name, room and hour.",
     "Ada, hall 2, at nine; Bo in the library at ten; Cem, hall 1, half past ten",
     "name | room | hour\nAda | hall 2 | 9:00\nBo | library | 10:00\nCem | hall 1 | 10:30"),
    ("code", "Say what this function returns for an empty list, and why.",
     "def spread(xs):\n    return max(xs, default=0) - min(xs, default=0)", "0: both defaults are 0."),
    ("code", "Write a shell command that counts the distinct words of a text file.", "",
     "tr -cs '[:alpha:]' '\\n' < file | sort -u | wc -l"),
    ("code", "Find the mistake in the query and correct it.",
     "SELECT town, COUNT(*) FROM visits WHERE COUNT(*) > 3 GROUP BY town",
     "SELECT town, COUNT(*) FROM visits GROUP BY town HAVING COUNT(*) > 3"),
    ("travel", "Plan a rainy Sunday in a harbour town with a child of six.", "",
     "The maritime museum until noon, soup at the fish hall, then the indoor pool or the model ships."),
    ("travel", "Translate what is on the sign and say whether we may park here.",
     "Stationnement interdit sauf riverains",
     "No parking except for residents. We may not, unless we live here."),
    ("news", "Which of the sentences is an opinion?",
     "1. The bridge opened in 1931.\n2. The bridge is the finest in the county.\n3. It carries two tracks.", "2"),
    ("news", "Put a headline of at most six words over this report.",
     "After eleven years of work the last stretch of the coastal path was opened on Monday by three walkers.",
     "Coastal path complete after eleven years"),
    ("music", "Suggest three chords that go well after A minor and F in a slow waltz.", "", "C, G and E."),
    ("health", "Explain to a grandmother what a resting pulse is.", "",
     "It is how often your heart beats in a minute while you sit quietly, often between sixty and eighty."),
    ("school", "Ask two questions that check whether somebody understood the text.",
     "A lever trades distance for force: the longer arm moves farther and pushes less.",
     "Which arm moves farther? Why does a longer arm need less force?"),
    ("school", "Why does ice float? Two sentences, for a class of ten-year-olds.", "",
     "Water takes more room when it freezes. So ice is lighter than the water it pushes aside."),
    ("diary", "Continue the entry with one sentence in the same voice.",
     "Day 4. The goats have found the biscuits.", "We have agreed to call it a donation."),
    ("law", "List whoever signs the contract below and by when.",
     "The tenant, M. Okoro, and the owner, Linden Homes, sign no later than 3 May.",
     "M. Okoro and Linden Homes, by 3 May"),
    ("sport", "Rank the teams by points and then by goals.", "Reds 7 (+3), Blues 9 (-1), Greens 7 (+5)",
     "Blues, Greens, Reds"),
    ("poetry", "Write a couplet about a lamp post in fog.", "",
     "It holds a coin of light out to the street\nand pays the fog for every pair of feet."),
]  # fmt: skip


def alpaca_rows(n: int = N_ROWS, defects: float = 0.0) -> list[dict[str, str]]:
    """Return n rows {"instruction", "input", "output"}, some nearly the same; `defects` is the share that has one."""
    return task_pool.answer(5, "rows", n, defects)


def write_alpaca(folder, n: int = N_ROWS, defects: float = 0.0):
    """Write the rows as a JSON list to a file, and return it."""
    path = folder / "alpaca.json"
    path.write_text(json.dumps(alpaca_rows(n, defects), indent=2, ensure_ascii=False))
    return path


def write_evaluation(folder):
    """Write the evaluation instructions as self-instruct's user_oriented_instructions.jsonl is, and return the file."""
    path = folder / "evaluation.jsonl"
    rows = [
        {"id": f"task_{i}", "motivation_app": app, "instruction": ask, "instances": [{"input": given, "output": told}]}
        for i, (app, ask, given, told) in enumerate(EVALUATION)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
