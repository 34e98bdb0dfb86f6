"""Tasks that give away an evaluation prompt are found in every form of file, and no others."""

import json

import pytest

from data_gen.base.cli import DataError
from data_gen.rows.contamination import N_GRAM, Decontaminator, read_prompts
from data_gen.rows.rouge import is_duplicate
from data_gen.rows.tokens import tokenize
from tests.helpers.own_rows import EVALUATION, alpaca_rows, write_evaluation
from tests.helpers.run import ROOT

PROMPT = "Suggest a better and more professional rephrasing of the following sentence."
INPUT = "If you have any questions about my rate or find it necessary to change the scope, please let me know."
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def task(instruction, input="", output="Fine."):
    return {"instruction": instruction, "input": input, "output": output}


@pytest.fixture
def knowing(tmp_path):
    """Return a function that makes a Decontaminator of files {name: text or rows}."""

    def knowing(**files):
        paths = []
        for name, content in files.items():
            paths.append(tmp_path / name.replace("_", "."))
            lines = isinstance(content, list) and name.endswith("jsonl")
            text = content if isinstance(content, str) else json.dumps(content)
            paths[-1].write_text("\n".join(map(json.dumps, content)) if lines else text, encoding="utf-8")
        return Decontaminator(paths)

    return knowing


FORMS = {
    "instruction and input": [{"instruction": PROMPT, "input": INPUT}],
    "instances": [{"id": 1, "instruction": PROMPT, "instances": [{"input": "Other."}, {"input": INPUT}]}],
    "prompt": [{"prompt": f"{PROMPT}\n\n{INPUT}"}],
    "MT-bench": [{"question_id": 81, "turns": [f"{PROMPT}\n\n{INPUT}", "Rewrite it."], "reference": ["Be brief."]}],
    "a list of prompts": [{"prompt": ["Rewrite it.", f"{PROMPT}\n\n{INPUT}"], "prompt_id": 1}],
    "both": [{"prompt": "Below is an instruction.", "instruction": PROMPT, "input": INPUT}],
    "messages": [{"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "Which one?"}, {"role": "user", "content": INPUT},
    ]}],
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_prompts_are_read_from_every_form_of_row(knowing, rows, suffix):
    known = knowing(**{f"eval_{suffix}": [{"instruction": "Name a colour.", "input": None}, *rows]})
    assert tokenize(known.find_match(task(PROMPT, INPUT))) == tokenize(f"{PROMPT} {INPUT}")
    assert known.find_match(task("Name a colour")) == "Name a colour."
    assert known.find_match(task("Below is an instruction.")) is None and known.find_match(task("Be brief.")) is None


def test_a_text_file_has_a_prompt_on_each_line(knowing):
    known = knowing(eval_txt=f"\ufeffName a colour.\r\n\n  {PROMPT} {INPUT}  \n???\n")
    assert known.prompts == ["Name a colour.", f"{PROMPT} {INPUT}", "???"]
    assert known.find_match(task(PROMPT, INPUT)) == f"{PROMPT} {INPUT}"


def test_all_files_are_known(knowing):
    known = knowing(a_txt="Name a colour.", b_json=[{"prompt": "Count to three."}])
    assert (
        known.find_match(task("Name a colour"))
        and known.find_match(task("Count to three"))
        and not known.find_match(task("Sing"))
    )


# The rule


def test_equal_but_for_case_punctuation_and_blanks(knowing):
    known = knowing(eval_txt="What IS it?\n??\n请解释重力。")
    assert (
        known.find_match(task("what is", "IT")) == "What IS it?"
        and known.find_match(task("请解释", "重力")) == "请解释重力。"
    )
    assert (
        known.find_match(task(" ?? ")) == "??"
        and known.find_match(task("!!")) is None
        and known.find_match(task("")) is None
    )


@pytest.mark.parametrize("n_changed", range(11))
def test_the_bound_is_that_of_duplicates(knowing, n_changed):
    """Of 10 words, 7 equal ones are just enough."""
    words = LONG.split()[:10]
    known, replaced = knowing(eval_txt=" ".join(words)), [1, 4, 8, 0, 2, 3, 5, 6, 7, 9][:n_changed]
    changed = [f"x{i}" if i in replaced else word for i, word in enumerate(words)]
    assert bool(known.find_match(task(" ".join(changed)))) == (n_changed <= 3) == is_duplicate(10 - n_changed, 10, 10)


def test_every_duplicate_counts_also_of_prompts_that_are_alike(knowing):
    """B is a duplicate of A and of C, but C is no duplicate of A."""
    a, b, c = "p q r s t u v w x y", "p q r s t u v w 1 2", "p q r s t u 3 4 1 2"
    known = knowing(eval_txt="\n".join([a, b, c]))
    assert known.find_match(task("5 q r s t u 3 4 1 2")) == c  # F with b is 0.7 - 0.1
    assert known.find_match(task("5 6 q r s t u 3 4 1 2")) == c
    assert known.find_match(task("p q r s t u v w 1 9")) in (a, b)
    assert known.find_match(task("5 6 r s t u v w 1 2")) == b  # 8 of 10 words are b's, 6 a's and 6 c's


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_a_run_of_tokens_in_any_field(knowing, field):
    known = knowing(eval_txt="Read this: " + LONG)
    words = LONG.split()
    filler = " ".join(f"w{i}" for i in range(60))
    for n, expected in ((12, None), (13, "Read this: " + LONG)):
        for start in (0, 1, 15 - n):
            text = f"{filler} {', '.join(words[start : start + n])}! {filler}"
            item = task("Say it again.", "Some words.", "Fine.") | {field: text}
            assert known.find_match(item) == expected


def test_a_run_may_stand_anywhere_in_a_prompt(knowing):
    known = knowing(eval_json=[{"prompt": f"w{i} {LONG} v{i}"} for i in range(3)] + [{"prompt": "end " * 12 + "now"}])
    assert known.find_match(task("Explain.", output="first second " + LONG)) == f"w0 {LONG} v0"
    assert known.find_match(task("Explain.", output="the " + "end " * 12 + "now or never")) is not None


def test_runs_of_equal_hash_are_compared(knowing, monkeypatch):
    known = knowing(eval_txt=LONG)
    known._runs = {hash(tuple(f"w{i}" for i in range(N_GRAM))): 0}
    assert known.find_match(task("Go on.", output=" ".join(f"w{i}" for i in range(N_GRAM)))) is None


def test_an_output_alone_is_no_prompt(knowing):
    assert knowing(eval_txt="Name a colour.").find_match(task("Say something.", output="Name a colour.")) is None


def test_what_is_not_alike(knowing):
    known = knowing(eval_json=FORMS["instruction and input"])
    assert known.find_match(task("Suggest a name for a cat.", "It is grey.")) is None
    assert known.find_match(task("Rephrase the sentence.", "He was late because of the rain.")) is None


# Files that are none


@pytest.mark.parametrize("text, words", [
    ("", ["no prompts"]),
    ("[]", ["no prompts"]),
    ('[{"instruction": " ", "input": ""}]', ["no prompts"]),
    ('{"instruction": "a"}\n{"input": "b"}', [":2: ", "the keys input,", "instruction"]),
    ('[{"prompt": "a"}, {"prompt": 5}]', [":1:19: row 2", "the keys prompt,"]),
    ('[{"instruction": ["a"]}]', [":1: "]),
    ('[{"instruction": "a", "instances": ["b"]}]', [":1: "]),
    ('[{"messages": "a"}]', [":1: "]),
    ('[{"messages": [{"role": "user"}]}]', [":1: "]),
    ("[{}]", [":1: ", "the keys none,"]),
    ("[3]", [":1: "]),
    ('{"prompt": "a"}\n{"prompt"', [":2", "not JSON"]),
])  # fmt: skip
def test_a_bad_file_is_named(tmp_path, text, words):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(DataError) as caught:
        Decontaminator([tmp_path / "eval.json"])
    for word in ["eval.json", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.TXT"])
def test_lines_of_a_text_are_prompts(name, tmp_path):
    (tmp_path / name).write_text("\ufeffName a colour.\n  Name a bird. \n\n")
    assert [text for text in read_prompts(tmp_path / name) if text] == ["Name a colour.", "Name a bird."]


def test_a_file_without_prompts_beside_others(knowing):
    with pytest.raises(DataError, match=r"b\.txt: got no prompts"):
        knowing(a_txt="Name a colour.", b_txt="\n \n")


@pytest.mark.parametrize("name", ["none.json", "none.txt", "folder.txt"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        Decontaminator([tmp_path / name])


def test_text_that_is_not_utf_8(tmp_path):
    (tmp_path / "eval.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"eval\.txt cannot be read"):
        Decontaminator([tmp_path / "eval.txt"])


# Instructions that people wrote


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    return Decontaminator([write_evaluation(tmp_path_factory.mktemp("evaluation"))])


def test_other_rows_and_seed_tasks_are_clean(evaluation):
    assert len(evaluation.prompts) == len(EVALUATION)
    rows = alpaca_rows()
    rows += [json.loads(line) for line in (ROOT / "data_gen" / "seed_tasks.jsonl").read_text().splitlines()]
    assert [row["instruction"] for row in rows if evaluation.find_match(row)] == []


def test_every_prompt_is_found_again(evaluation):
    found = []
    for _, instruction, given, _ in EVALUATION:
        assert evaluation.find_match(task(instruction.upper(), given))
        quoting = task("Answer.", output=f"You asked: {instruction} {given}")
        found.append(bool(evaluation.find_match(quoting)))
        assert found[-1] == (len(tokenize(quoting["output"])) >= N_GRAM + 2)
    assert 5 < sum(found) < len(found)


def test_of_prompts_that_are_equal_the_first_is_named_and_all_are_counted(knowing):
    known = knowing(
        a_json=[{"instruction": "Name a fruit.", "output": "x"}, {"instruction": "name a FRUIT", "output": "x"}]
    )
    assert len(known.prompts) == 2 and known.find_match(task("Name a fruit!")) == "Name a fruit."
