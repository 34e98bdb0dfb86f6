"""Rows that a template cannot say."""

import json
from types import SimpleNamespace

import pytest

from engine.base.errors import DataError
from engine.base.terminal import Progress
from engine.text.tokenizer_files import load_tokenizer
from engine.training import datasets
from engine.training.config import FinetuneConfig
from engine.training.datasets import read_datasets, read_tables
from tests.helpers.chat_tokenizers import CHATML, write_byte_level

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
)


def test_rows_that_the_template_refuses_are_named_or_dropped_and_counted(tmp_path):
    turns = [("system", "s"), ("user", "u"), ("assistant", "a")]
    chats = [[{"role": role, "content": text} for role, text in turns[begin:]] for begin in (1, 0, 1)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", CHATML, chat_template=NO_SYSTEM))

    def read(path, skip):
        config = FinetuneConfig(
            model="x", data=(str(path),), prompt_style="template", token_cache="off", skip_bad_rows=skip
        )
        return read_tables(config, tokenizer, print, show_progress=False)[0][0]

    with pytest.raises(DataError, match=r"rows.jsonl:2: .* fails on this row: no system; .* --skip-bad-rows"):
        read(path, False)
    table, skipped, _ = read(path, True)
    assert table.rows["number"].tolist() == [1, 3] and [bad.source for bad in skipped] == [f"{path}:2"]
    assert skipped[0].reason.startswith("the checkpoint's chat template fails on this row: no system")
    for order in ((1, 0), (0, 1), (1, 1, 0)):
        path.write_text("".join(json.dumps({"messages": chats[i]}) + "\n" for i in order))
        table, skipped, _ = read(path, True)
        assert (len(table.rows), len(skipped)) == (1, len(order) - 1)
    path.write_text(json.dumps({"messages": chats[1]}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: .* no system"):
        read(path, True)


def test_skipped_rows_beyond_the_named_ones_are_counted(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' + "{}\n" * 8)
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", CHATML))
    for n_bad, more in ((8, "skipped 3 more\n"), (5, "")):
        path.write_text('{"instruction": "a", "output": "b"}\n' + "{}\n" * n_bad)
        config = FinetuneConfig(model="x", data=(str(path),), token_cache="off", skip_bad_rows=True)
        train, held_out = read_datasets(config, tokenizer, alone(), print)
        assert train.counts["skipped"] == n_bad and held_out is None
        told = capsys.readouterr().out
        assert told.count("rows.jsonl:") == 5 and (more or "data: ") in told and (" more" in told) == bool(more)


def test_held_out_rows_that_are_not_measured_are_told(tmp_path, capsys):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", CHATML))
    good = '{"instruction": "a", "output": "b"}\n'
    (tmp_path / "rows.jsonl").write_text(good + "{}\n")
    files = {"data": (str(tmp_path / "rows.jsonl"),), "eval_data": (str(tmp_path / "held.jsonl"),)}
    config = FinetuneConfig(model="x", **files, token_cache="off", max_length=300, skip_bad_rows=True)
    long = json.dumps({"instruction": "word " * 300, "output": "b"}) + "\n"
    for held, told in (
        (good * 2, "1 bad rows skipped; held out: 2 examples\n"),
        (good + long, "skipped; held out: 1 example, 1 dropped without a response token, 0 bad rows skipped\n"),
        (
            good + "{}\n" * 3,
            "1 bad rows skipped; held out: 1 example, 0 dropped without a response token, 3 bad rows skipped\n",
        ),
        (good + "{}\n" * 7, "skipped 3 more\n"),
    ):
        (tmp_path / "held.jsonl").write_text(held)
        read_datasets(config, tokenizer, alone(), print)
        out = capsys.readouterr().out
        assert told in out and out.count("held.jsonl:") == min(held.count("{}"), 4) and "rows.jsonl:2: " in out


def test_held_out_examples_that_are_trained_on_are_told(tmp_path, capsys):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", CHATML))

    def told(texts, held_out, **settings):
        for name, names in (("rows.jsonl", texts), ("held.jsonl", held_out)):
            rows = [{"instruction": f"Name {x[0]}", "output": x} for x in names]
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = settings or {"eval_data": (str(tmp_path / "held.jsonl"),)}
        config = FinetuneConfig(model="x", data=(str(tmp_path / "rows.jsonl"),), token_cache="off", **settings)
        read_datasets(config, tokenizer, alone(), print)
        return capsys.readouterr().out.partition("warning: ")[2].partition(" in the training data too")[0]

    assert told(["ab", "ac", "ad"], ["ae", "bb"]) == ""  # the question alone, or a text of equal length
    assert told(["ab", "ac", "ad"], ["ae", "ac"]) == "1 of 2 held-out examples is"
    assert told(["ab", "ab", "ac"], ["ab", "ab", "ac", "x"]) == "3 of 4 held-out examples are"
    assert told(["ab"] * 4, ["-"], eval_fraction=0.5) == "2 of 2 held-out examples are"
    assert told(["ab", "cd", "ef", "gh"], ["-"], eval_fraction=0.5) == ""


def test_the_seed_chooses_the_rows_that_are_held_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": str(i), "output": "b"}) + "\n" for i in range(40)))
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", CHATML))

    def hold_out(seed):
        config = FinetuneConfig(model="x", data=(str(path),), token_cache="off", eval_fraction=0.25, seed=seed)
        train, held_out = read_datasets(config, tokenizer, alone(), lambda line: None)
        places = [{place.number for place in part.sources} for part in (train, held_out)]
        assert len(places[1]) == 10 and not places[0] & places[1] and len(places[0] | places[1]) == 40
        return places[1]

    assert hold_out(1) == hold_out(1) != hold_out(0) != hold_out(2)


def test_empty_answers_and_dropped_rows_are_told(tmp_path, capsys):
    """Also from the cache, and of each kind of rows; an answer that is not learned is none."""

    def chat(*answers):
        turns = [[("user", f"Say {i}."), ("assistant", text)] for i, text in enumerate(answers)]
        return {"messages": [{"role": role, "content": text} for turn in turns for role, text in turn]}

    quiet = {"role": "assistant", "content": "", "weight": 0}
    unlearned = chat("x", "y")["messages"]
    unlearned[1] = quiet
    rows = [{"instruction": "a", "output": text} for text in ("b", "", " \n")]
    rows += [{"prompt": "p", "completion": ""}, chat("x"), chat("", "y"), chat("x", ""), {"messages": unlearned}]
    rows += [{"instruction": "hidden " * 99, "output": ""}]  # dropped, so that it teaches no end
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", CHATML))
    config = FinetuneConfig(model="x", data=(str(path),), prompt_style="chatml", max_length=64,
                            token_cache=str(tmp_path / "cache"))  # fmt: skip
    for cached in ("data: ", "data (cached): "):
        train, _ = read_datasets(config, tokenizer, alone(), print)
        told = capsys.readouterr().out
        assert cached in told and train.counts["empty"] == 5
        assert "note: 5 rows have an empty answer: the model learns to end there at once\n" in told
        assert "note: 1 row is dropped, whose answer begins after 64 tokens" in told and "larger --max-length" in told


def test_keys_that_are_not_read_are_told_of_held_out_rows_too_and_other_notes_of_the_training_rows(tmp_path, capsys):
    """A cache that holds the tokens of one of both files alone is not told to hold them all."""
    row, empty = {"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}
    held = [row | {"source": 1}, row | {"source": 2}, empty, empty]
    for name, rows in (("rows.jsonl", [row | {"source": "x"}, row, empty]), ("held.jsonl", held)):
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", CHATML))

    def told(*eval_data):
        config = FinetuneConfig(
            model="x", data=(str(tmp_path / "rows.jsonl"),), eval_data=eval_data, token_cache=str(tmp_path / "cache")
        )
        read_datasets(config, tokenizer, alone(), print)
        return capsys.readouterr().out

    assert "not read: source (1 row)\n" in told() and "data (cached): 3 rows" in told()
    for begin in ("data: 3 rows", "data (cached): 3 rows"):
        said = told(str(tmp_path / "held.jsonl"))
        assert begin in said and "not read: source (3 rows)\n" in said and "note: 1 row has an empty answer" in said


def test_a_tool_is_bad_data_under_a_style_that_cannot_say_it(tmp_path):
    """Told of all rows before any is tokenised."""
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "base", CHATML))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": chat, "tools": [{"name": "f"}]}) + "\n") * 2)
    config = FinetuneConfig(model="x", data=(str(tmp_path / "rows.jsonl"),), prompt_style="chatml", token_cache="off")
    with pytest.raises(DataError, match="got 2 bad of 2 rows"):
        read_tables(config, tokenizer, print, show_progress=False)


def test_the_bar_of_large_files_ends_where_they_do(tmp_path, monkeypatch):
    seen = []

    class Bar(Progress):
        def advance(self, n=1):
            super().advance(n)
            seen.append((self.done, self.total))

    monkeypatch.setattr(datasets, "Progress", Bar)
    monkeypatch.setattr(datasets, "SILENT_BYTES", 10)
    monkeypatch.setattr(
        datasets, "read_rows", lambda paths, skip, progress, **_: [progress(n * 10**6, 9 * 10**6) for n in (2, 5, 9)]
    )
    (tmp_path / "rows.jsonl").write_text("x" * 20)
    datasets.read_files([tmp_path / "rows.jsonl"], FinetuneConfig(model="x", data=("y",)))
    assert seen == [(2, 9), (5, 9), (9, 9)]


@pytest.mark.parametrize(("silent_bytes", "is_shown", "bars"), [(40, True, 1), (41, True, 0), (40, False, 0)])
def test_files_that_are_small_together_or_another_ranks_have_no_bar(
    silent_bytes, is_shown, bars, tmp_path, monkeypatch, capsys
):
    given = []
    monkeypatch.setattr(datasets, "SILENT_BYTES", silent_bytes)
    monkeypatch.setattr(datasets, "read_rows", lambda paths, skip, progress, **_: given.append(progress) or ([], []))
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text("x" * 20)
    datasets.read_files(paths, FinetuneConfig(model="x", data=("y",)), is_shown)
    assert sum(progress is not None for progress in given) == bars and len(given) == 1


def alone():
    return SimpleNamespace(is_main=False, run_on_main_first=lambda read: read())
