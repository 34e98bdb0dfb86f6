"""Held-out answers beside those that are wanted."""

import json
from types import SimpleNamespace

import pytest

from engine import finetune as command
from engine.base.errors import run_main
from engine.data.dataset import encode_rows
from engine.data.packing import Packing
from engine.text.templates import Row, encode_prompt, find_stop_ids
from engine.text.tokenizer_files import load_tokenizer
from engine.training import scoring
from engine.training.config import FinetuneConfig
from engine.training.scoring import decode, drop_common_lines, find_questions, measure_overlap
from tests.helpers.run import events
from tests.helpers.small_model import small_model, write_tokenizer

CHAT = (("user", "What is it?"), ("assistant", "A jar."), ("user", "And that?"), ("assistant", "Two lids."))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def test_a_question_is_the_prompt_of_generate_and_its_answer_the_row_s(tokenizer):
    stop_ids = find_stop_ids(tokenizer, "alpaca")
    rows = [Row("x:1", None, "Say it", "Two words", "first answer"), Row("x:2", None, "b", "", "c d")]
    held_out = encode_rows(rows, tokenizer).select()
    questions = find_questions(held_out, 2, stop_ids)
    assert [question.prompt for question in questions] == [encode_prompt(row, tokenizer) for row in rows]
    assert [tokenizer.decode(question.reference).strip() for question in questions] == ["first answer", "c d"]
    assert len(find_questions(held_out, 1, stop_ids)) == 1


def test_of_a_chat_the_last_answer_is_asked_for(tokenizer):
    stop_ids = find_stop_ids(tokenizer, "llama2")
    (question,) = find_questions(encode_rows([Row("x:1", CHAT, "")], tokenizer, "llama2").select(), 2, stop_ids)
    assert question.prompt == encode_prompt(Row("", CHAT[:-1], ""), tokenizer, "llama2")
    assert tokenizer.decode(question.reference).strip() == "Two lids."


def test_a_truncated_answer_is_no_reference(tokenizer):
    rows = [Row("x:1", None, "a", "", "one two three four five six"), Row("x:2", None, "a", "", "one")]
    whole = encode_rows(rows, tokenizer)
    short = encode_rows(rows, tokenizer, max_length=int(whole.rows["n_tokens"][0]) - 1)
    stop_ids = find_stop_ids(tokenizer, "alpaca")
    assert (
        len(find_questions(whole.select(), 9, stop_ids)) == 2 and len(find_questions(short.select(), 9, stop_ids)) == 1
    )


def test_rows_that_cannot_be_asked_do_not_count_among_the_first(tokenizer):
    """One that is a text without a prompt, and one that is cut."""
    rows = [
        Row("x:1", None, "", "", "a text", is_raw=True), Row("x:2", None, "a", "", "one two three four five six"),
        Row("x:3", None, "a", "", "one"), Row("x:4", None, "b", "", "two"),
    ]  # fmt: skip
    n_tokens = encode_rows(rows, tokenizer).rows["n_tokens"].tolist()
    held_out, stop_ids = (
        encode_rows(rows, tokenizer, max_length=n_tokens[1] - 1).select(),
        find_stop_ids(tokenizer, "alpaca"),
    )
    assert len(held_out) == 4
    for n in (1, 2, 9):
        asked = [tokenizer.decode(question.reference).strip() for question in find_questions(held_out, n, stop_ids)]
        assert asked == ["one", "two"][:n]


def test_words_are_counted_as_often_as_they_are():
    assert measure_overlap("a b", "a b") == 1 == measure_overlap("", "")
    assert measure_overlap("a a a", "a b") == pytest.approx(2 * 1 / 5) and measure_overlap("x", "a b") == 0


def test_the_template_s_lines_are_dropped():
    assert drop_common_lines(["head\n\nq: one\nmore\ntail", "head\n\nq: two\ntail"]) == ["q: one\nmore", "q: two"]
    assert drop_common_lines(["same", "same"]) == ["same", "same"] and drop_common_lines(["a\nb"]) == ["b"]
    assert drop_common_lines(["head\nq\ntail", "head"]) == ["head\nq\ntail", "head"]  # a line of each stays


def test_no_blanks_stand_around_a_text():
    assert decode(SimpleNamespace(decode=lambda ids: f" \n{ids} \n"), (1, 2)) == "[1, 2]"


def test_answers_end_where_the_positions_do(tokenizer, monkeypatch):
    """With room for 100 tokens half as many again as are wanted, and 8; with room for 5 no more than these."""
    held_out = encode_rows([Row("x:1", None, "Say it", "", "one two three")], tokenizer).select()
    (question,) = find_questions(held_out, 1, find_stop_ids(tokenizer, "alpaca"))
    asked, written = [], []
    answer = question.reference[:-1]
    monkeypatch.setattr(
        scoring, "answer", lambda model, most, prompts, stop_ids, n: asked.append((most, n)) or [answer]
    )
    ignore = SimpleNamespace(write=lambda event, **line: written.append(line), print_message=lambda _: None)
    for room in (100, 5):
        plan = SimpleNamespace(
            held_out=held_out, tokenizer=tokenizer, total_steps=1,
            config=SimpleNamespace(score_answers=4, prompt_style="alpaca"),  # more than there are
            model_config=SimpleNamespace(max_positions=len(question.prompt) + room),
        )  # fmt: skip
        halved = SimpleNamespace(batches=SimpleNamespace(packing=Packing(77)))
        scoring.score_answers(plan, SimpleNamespace(progress=ignore, metrics=ignore), halved, None, 0)
    n = len(question.reference)
    assert asked == [(77, n + n // 2 + 8), (77, 5)]
    overlap = measure_overlap(tokenizer.decode(answer), "one two three")
    assert 0 < overlap < 1 and [line["overlap"] for line in written if "overlap" in line] == [overlap, overlap]


def test_score_answers_wants_held_out_rows():
    with pytest.raises(ValueError, match="--score-answers wants held-out rows"):
        FinetuneConfig(model="tiny", random_init=True, data=("x",), score_answers=3)
    with pytest.raises(ValueError, match="--train-on-prompt exclude"):
        FinetuneConfig(
            model="tiny", random_init=True, data=("x",), eval_data=("y",), score_answers=3, train_on_prompt=True
        )


def test_a_run_counts_the_answers_that_are_as_wanted(tmp_path, monkeypatch, capsys):
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in ("one", "two", "three", "four")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    asked = []

    def find(*args):
        asked.append(find_questions(*args))
        return asked[-1]

    def answer(
        model, max_tokens, prompts, stop_ids, n
    ):  # nothing before training; after it all but the second are right
        right, is_before = [question.reference for question in asked[-1]], len(asked) == 2  # prepare() asked too
        assert prompts == [question.prompt for question in asked[-1]] and n > max(map(len, right)) + 8
        return [[] for _ in right] if is_before else [right[0], right[0], right[2]]

    monkeypatch.setattr(scoring, "find_questions", find)
    monkeypatch.setattr(scoring, "answer", answer)
    out = tmp_path / "out"
    flags = [
        "--model", small_model(), "--data", tmp_path / "rows.json", "--eval-data", tmp_path / "rows.json", "--out", out,
        "--max-steps", 2, "--global-batch-size", 4, "--eval-every", "end", "--score-answers", 3,
    ]  # fmt: skip
    assert run_main(command.main, list(map(str, flags))) == 0
    before, after = events(out, "score")
    assert (before["step"], before["equal"], before["answers"], before["overlap"]) == (0, 0, 3, 0)
    assert (after["step"], after["equal"]) == (2, 2) and after["overlap"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    answers = events(out, "answer")
    assert [line["wanted"] for line in answers] == 2 * [row["output"] for row in rows[:3]]
    assert [line["text"] for line in answers[3:]] == ["It is one.", "It is one.", "It is three."]
    said = capsys.readouterr().out
    assert "held-out answers as wanted: 0 -> 2 of 3\nask it: " in said and "--prompt 'Say one.'" in said
    assert "held-out answers as wanted: 0 → 2 of 3" in (out / "report.html").read_text()
