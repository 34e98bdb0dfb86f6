"""The time that data takes: rows, starts with and without a cache, packing."""

import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.speed import data
from tests.helpers.calls import Calls
from tests.helpers.clocks import Ticks


def test_rows_are_repeated_to_as_many_as_are_wanted_and_no_more():
    rows = [SimpleNamespace(instruction=f"Q{i}", input="", output=f"One {i}. Two {i}. Three.") for i in range(4)]
    for n in (3, 4, 9):
        made = data.recombine_rows(rows, n)
        assert len(made) == n and len({row["instruction"] for row in made}) == n
        assert [row["output"] for row in made[:4]] == [row.output for row in rows[: min(4, n)]]
        assert made == data.recombine_rows(rows, n)


@pytest.mark.parametrize("most", [50, 512])
def test_random_rows_have_the_lengths_of_alpaca_and_each_keeps_a_response(most, monkeypatch):
    monkeypatch.setattr(data, "MAX_LENGTH", most)
    rows = data.random_rows_like_alpaca(400)
    assert 100 < len(rows) <= 400 and min(rows.loss_tokens()) > 0 and max(rows.lengths()) <= most


def test_a_first_start_finds_no_cache_and_later_ones_do(monkeypatch, tmp_path):
    starts = []
    dataset = SimpleNamespace(counts={"tokens": 8}, sha256=lambda: "x")

    class Table(list):
        def select(self):
            return dataset

    def read_tables(config, tokenizer, message):
        is_cached = Path(config.token_cache).exists()
        Path(config.token_cache).mkdir(exist_ok=True)
        starts.append(is_cached)
        return [(Table([1, 2]), [])], is_cached

    monkeypatch.setattr(data, "read_tables", read_tables)
    monkeypatch.setattr(data, "read_rows", lambda files: ([], []))
    monkeypatch.setattr(data.data, "encode_rows", lambda *_: None)
    (tmp_path / "rows.json").write_text("[]")
    found, figures = data.measure_starts(tmp_path / "rows.json", None, 4)
    assert starts == [False] * 3 + [True] * 4 and found is dataset and figures["tokens_a_row"] == 4


def test_an_epoch_is_packed_to_its_own_budget_and_padding_is_what_is_no_token():
    rows = data.random_rows_like_alpaca(300)
    small, large = data.pack_epoch(rows, 1024), data.pack_epoch(rows, 8192)
    assert small["micro_batches_a_step"] > 2 * large["micro_batches_a_step"] and small["steps"] == 3
    assert 0 < large["padding"] < 0.05 and small["max_tokens"] == 1024 and large["computed_over_logical"] < 1.05


def test_wall_and_cpu_seconds_are_told_in_this_order(monkeypatch):
    walls, cpus = iter([1.0, 4.0]), iter([10.0, 10.5])
    times = SimpleNamespace(perf_counter=lambda: next(walls), process_time=lambda: next(cpus))
    monkeypatch.setattr(data, "time", times)
    assert data.time_call(lambda a: a, 7) == (7, 3.0, 0.5)


def test_the_whole_measurement(monkeypatch, tell, snapshot, tmp_path):
    """With a tokenizer whose tokens are words."""
    Ticks(monkeypatch, data)
    calls, row = Calls(), {"instruction": "Name {}.", "input": "", "output": "One. Two three! Four {}"}
    rows = [{name: text.format(i) for name, text in row.items()} for i in range(3)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    (tmp_path / "cl").mkdir()
    packed, alpaca = data.random_rows_like_alpaca(3), data.random_rows_like_alpaca(2)
    packed.counts["tokens"] = 21

    class Table(list):
        def select(self):
            return packed

    def read_tables(config, tokenizer, tell):
        cache = Path(config.token_cache)
        is_cached = cache.exists()
        cache.mkdir(exist_ok=True)
        (cache / "entry").write_bytes(bytes(77))
        return [(Table(range(6)), ["x"])], is_cached

    named = lambda config, *rest: read_tables(config, *rest)  # noqa: E731
    label = property(lambda c: f"{c.model} {c.data} {c.max_length} {c.random_init} {Path(c.token_cache).name}")
    monkeypatch.setattr(data.FinetuneConfig, "label", label, raising=False)
    monkeypatch.setattr(data, "read_tables", calls.stand_in("read_tables", named))
    monkeypatch.setattr(data, "load_tokenizer", calls.stand_in("load_tokenizer", "the tokenizer"))
    monkeypatch.setattr(data.data, "encode_rows", calls.stand_in("encode_rows"))
    monkeypatch.setattr(data, "pack_epoch", calls.stand_in("pack_epoch", lambda rows, budget: {"packed to": budget}))
    monkeypatch.setattr(data, "random_rows_like_alpaca", calls.stand_in("random_rows_like_alpaca", alpaca))
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path))
    flags = ("--rows", tmp_path / "mine.json", "--tokenizer", tmp_path / "cl", "--n", 5, "--repeats", 4)
    text = tell(data, *flags)
    assert re.sub("/tmp[a-z0-9_]+", "/TEMPORARY", text) == snapshot
    log = calls.text().replace(str(tmp_path), "FOLDER")
    assert re.sub("/tmp[a-z0-9_]+", "/TEMPORARY", log) == snapshot(name="calls")


def test_starts_take_three_at_most_without_a_cache(monkeypatch, tmp_path):
    rows, starts = tmp_path / "rows.json", []
    rows.write_text("[]")

    def read_tables(config, *_):
        is_cached = Path(config.token_cache).exists()
        Path(config.token_cache).mkdir(exist_ok=True)
        starts.append(is_cached)
        table = SimpleNamespace(select=lambda: SimpleNamespace(counts={"tokens": 1}, sha256=lambda: ""))
        return [(type("Table", (list,), {"select": lambda self: table.select()})([1]), 0)], is_cached

    monkeypatch.setattr(data, "read_tables", read_tables)
    monkeypatch.setattr(data, "read_rows", lambda files: ([], []))
    monkeypatch.setattr(data.data, "encode_rows", lambda *_: None)
    data.measure_starts(rows, None, 2)
    assert starts == [False] * 2 + [True] * 2


def test_copies_differ_in_half_of_their_sentences_and_in_a_number():
    """The others are of the row that is copied, in their places; inputs are its own."""
    texts = ["A. B. C. D. E.", "Q! R! S! T!", "Only one"]
    rows = [SimpleNamespace(instruction=f"Q{i}", input=f"in {i}", output=text) for i, text in enumerate(texts)]
    made = data.recombine_rows(rows, 60)
    pool = {sentence for text in texts for sentence in data.SENTENCE.findall(text)}
    assert pool == {*["A. ", "B. ", "C. ", "D. ", "E.", "Q! ", "R! ", "S! ", "T!", "Only one"]}
    for i in range(3, 60):
        of = rows[i % 3]
        own, found = data.SENTENCE.findall(of.output), made[i]["output"]
        assert made[i]["instruction"] == f"{of.instruction} ({i})" and made[i]["input"] == of.input
        kept = len(own) // 2  # of an odd number, the larger part is drawn
        assert any(
            re.fullmatch("".join(re.escape(x) if at in places else f"({'|'.join(map(re.escape, pool))})"
                                 for at, x in enumerate(own)), found)
            for places in itertools.combinations(range(len(own)), kept)
        ), found  # fmt: skip
    assert len({row["output"] for row in made[::3]}) > 10


def test_a_packed_epoch_is_told_whole(monkeypatch, snapshot):
    """Five rows, three a step, in a shuffled order; the clock goes on by itself."""
    Ticks(monkeypatch, data)
    monkeypatch.setattr(data, "BATCH", 3)
    rows = data.random_rows_like_alpaca(5)
    found = data.pack_epoch(rows, 256)
    order = [data.Order(5, 3, seed=42).examples_of(step) for step in (1, 2)]
    assert found["tokens"] == rows.lengths().sum() and found["steps"] == 2
    batches = [data.make_micro_batches(rows.get_examples(of), data.Packing(256, multiple=64)) for of in order]
    sizes = [len(batch.tokens) for of in batches for batch in of]
    assert found["computed_tokens"] == sum(sizes) and not any(size % 64 for size in sizes)
    assert (
        found["micro_batches_a_step"] == len(sizes) / 2
        and found["computed_over_logical"] == sum(sizes) / found["tokens"]
    )
    real = sum(int(b.documents[-1, 1]) for of in batches for b in of)
    assert found["padding"] == pytest.approx(1 - real / sum(sizes)) and found["padding"] > 0
    seconds = {name: found[name] for name in ("max_tokens", "seconds", "cpu_seconds", "step_s", "rows_per_s")}
    assert json.dumps(seconds, indent=1) == snapshot


def test_a_tokenizer_of_sentencepiece_is_read_in_a_folder(monkeypatch, tmp_path):
    (tmp_path / "any.model").write_bytes(b"pieces")
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "input": "", "output": "b"}]')
    found = []

    def load(folder):
        found.append((sorted(path.name for path in folder.iterdir()), (folder / "tokenizer.model").read_bytes()))
        raise InterruptedError

    monkeypatch.setattr(data, "load_tokenizer", load)
    flags = ("--json", "x", "--rows", tmp_path / "rows.json", "--tokenizer", tmp_path / "any.model")
    monkeypatch.setattr(sys, "argv", ["data", *map(str, flags)])
    with pytest.raises(InterruptedError):
        data.main()
    assert found == [(["tokenizer.model"], b"pieces")]


def test_files_that_are_not_there_are_told_before_anything_is_measured(monkeypatch, capsys, call_main, tmp_path):
    for flag in ("--rows", "--tokenizer"):
        assert call_main(data, "--json", "x", flag, tmp_path / "none") == 2
        assert f"{tmp_path / 'none'} is not there; leave --rows and --tokenizer out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["data", "--json", "x"])
    assert vars(data.parse_arguments()) == {
        "json": "x", "rows": str(data.SEED_TASKS), "tokenizer": "", "n": 52002, "repeats": 9
    }  # fmt: skip


def test_random_rows_begin_with_the_stem_of_their_template_and_have_alpacas_lengths():
    rows, alpaca = data.random_rows_like_alpaca(200), data.alpaca_lengths()
    starts = {}
    for i in range(len(rows)):
        of = int(rows.sources[i])
        kind, n = alpaca.has_input[of], min(512, alpaca.prompt[of] + alpaca.response[of])
        assert len(rows.tokens_of(i)) == n and rows.tokens_of(i).min() >= 3 and rows.tokens_of(i).max() < 32_000
        starts.setdefault(kind, set()).add(tuple(rows.tokens_of(i)[: alpaca.shared_prefix[kind]]))
    assert [len(starts[kind]) for kind in sorted(starts)] == [1, 1]
