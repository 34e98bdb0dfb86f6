"""Tables on a terminal and elsewhere, and what they say."""

import dataclasses
import io
import re
from types import SimpleNamespace

import pytest
import torch

from engine.model.adapter import AdapterConfig
from engine.planning import tables
from engine.planning.cards import CARDS, GIB, PRICES_DATE
from engine.planning.memory import Memory
from engine.planning.setting import Setting
from engine.planning.tables import describe_cost, find_measured_steps, format_duration, memory_rows, print_table


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_on_a_terminal_keep_to_its_width(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    print_table(
        "A title",
        ("GB", "with"),
        [("1.50", "--optimizer-states 8bit --recompute block " * 2), ("12.00", "b")],
        terminal,
    )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert lines[0].strip() == "A title" and max(map(len, lines)) <= width
    assert any(line.startswith("12.00  b") for line in lines) and any(line.startswith(" 1.50  --") for line in lines)
    plain = io.StringIO()
    print_table("A title", ("GB", "with"), [("1.50", "a"), ("12.00", "b")], plain)
    assert plain.getvalue() == "A title\n     GB  with\n   1.50  a\n  12.00  b\n\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7100, "118 min"), (7200, "2.0 h")]
)
def test_a_duration_has_the_unit_that_suits_it(seconds, text):
    assert format_duration(seconds) == text


USED = Memory(
    weights=8 * 10**9, master=5 * 10**9, states=7 * 10**9, gradients=8 * 10**9, gathered=0, activations=4 * 10**9,
    head=2 * 10**9, backward=3 * 10**9, overhead=10**9, host=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "setting, used, kind, text",
    [
        ({}, {}, "weights", "bfloat16"),
        ({"shards": 4}, {}, "weights", "bfloat16, 1/4 of them"),
        ({"adapter": AdapterConfig()}, {"trained": 2 * 10**9}, "weights", "bfloat16, 2.00 GB of them trained"),
        ({"adapter": AdapterConfig(nf4_base=True)}, {}, "weights",
         "matrices in 4 bits; the rest bfloat16, 0.00 GB of them trained"),
        ({}, {}, "fp32 master", "the 16 bits that bf16 lacks"),
        ({"master": "fp32"}, {}, "fp32 master", "in fp32"),
        ({"master": "stochastic"}, {}, "fp32 master", "none: rounded at random"),
        ({"dtype": torch.float32}, {}, "fp32 master", "the weights themselves"),
        ({"states": "8bit"}, {}, "optimizer states", "m and v, 8bit"),
        ({"states": "fp32"}, {"host": 10**9}, "optimizer states",
         "m and v, fp32; 1.00 GB of master and states on the host"),
        ({"states": "fp32", "on_cpu": True}, {"host": 10**9}, "optimizer states", "m and v, fp32; on the host"),
        ({}, {}, "gradients", "bfloat16"),
        ({"adapter": AdapterConfig()}, {"gradients": 1}, "gradients", "bfloat16, of what is trained"),
        ({}, {"gradients": 8 * 10**9 - 1}, "gradients", "bfloat16, those there at once"),
        ({"replicas": 2}, {}, "gradients", "bfloat16"),
        ({"replicas": 2}, {"gradients": 8 * 10**9 + 1}, "gradients", "bfloat16, and fp32 to be summed"),
        ({"replicas": 1}, {"gradients": 8 * 10**9 + 1}, "gradients", "bfloat16"),
        ({"offload": True, "on_cpu": True}, {}, "gradients",
         "bfloat16, those there at once: they leave in backward"),
        ({"shards": 2}, {"gathered": 10**9}, "gathered", "two blocks' weights; a block's and head's gradients"),
        ({"replicas": 2}, {"gathered": 10**9}, "gathered",
         "copies of a block's and head's weights; their gradients"),
        ({}, {}, "activations", "2,000 tokens, 2.00 MB each"),
        ({}, {"activations": 2 * 10**9}, "activations", "2,000 tokens, 1.00 MB each"),
        ({}, {"activations": 2 * 10**9 - 1}, "activations", "2,000 tokens, 1000.0 kB each"),
        ({}, {}, "temporaries", "a layer's backward: the larger of 2.00 and 3.00"),
        ({}, {"head": 3 * 10**9}, "temporaries", "the head's logits: the larger of 3.00 and 3.00"),
        ({}, {}, "total", "of 36.00 (33.53 GiB): fits, 0.00 left"),
        ({}, {"overhead": 10**9 + 10**7}, "total", "of 36.00 (33.53 GiB): does not fit, 0.01 too much"),
        ({}, {"overhead": 0}, "total", "of 36.00 (33.53 GiB): fits, 1.00 left"),
    ],
)  # fmt: skip
def test_what_is_said_of_each_kind_of_memory(setting, used, kind, text):
    rows = memory_rows(dataclasses.replace(USED, **used), 36 * 10**9, 2000, Setting(**setting))
    assert {row[0]: row[2] for row in rows}.get(kind) == text
    assert ("gathered" in dict(row[:2] for row in rows)) == ("gathered" in used)


def test_each_kind_of_memory_has_its_own_figure():
    used = dataclasses.replace(USED, gathered=9 * 10**9)
    shown = {kind: figure for kind, figure, _ in memory_rows(used, 36 * 10**9, 2000, Setting())}
    kinds = {"fp32 master": "master", "optimizer states": "states"}
    assert shown == {kind: f"{getattr(used, kinds.get(kind, kind)) / 1e9:.2f}" for kind in shown}
    assert len(shown) == 9


def test_where_nothing_fits_the_least_is_told_and_the_cards_that_have_as_much(monkeypatch, capsys):
    setting = Setting(adapter=AdapterConfig())
    estimate = SimpleNamespace(outcome=SimpleNamespace(setting=setting), recipe=SimpleNamespace(max_length=9),
                               alternatives=(), model="a shape")  # fmt: skip
    for name, card in CARDS.items():
        for more in (0, 1):
            least = int(card.memory_gib * GIB) + more
            monkeypatch.setattr(tables, "find_least_bytes", lambda *_, least=least: least)
            tables.print_alternatives(estimate)
            text = " ".join(capsys.readouterr().out.split())
            told = text.partition("These cards have as much: ")[2].split(", ")
            assert f"Nothing fits: {least / 1e9:.2f} GB are the least that any setting takes." in text
            assert [n for n, other in CARDS.items() if other.memory_gib * GIB >= least] == [n for n in told if n]
            assert (name in told) == (more == 0)


MEASURED = {
    "model": "m", "sharing": True, "master": "fp32", "states": "bf16", "recompute": "none", "offload": True,
    "on_cpu": True, "cards": 4, "replicas": 2, "adapter": "lora", "tokens_per_s": 1.0, "tokens": 2, "peak_gib": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_a_measured_step_is_one_of_the_same_model_and_setting(name):
    setting = Setting(master="fp32", states="bf16", recompute="none", offload=True, on_cpu=True, shards=4, replicas=2,
                      adapter=AdapterConfig())  # fmt: skip
    other = {key: value for key, value in MEASURED.items() if key != name}
    changed = MEASURED | {name: not MEASURED[name] if type(MEASURED[name]) is bool else "another"}
    steps = [other, MEASURED, *([changed] if name not in ("tokens_per_s", "tokens", "peak_gib") else [])]
    estimate = SimpleNamespace(
        outcome=SimpleNamespace(setting=setting), recipe=SimpleNamespace(model="m", share_prefix=True),
        rates=SimpleNamespace(steps=steps),
    )  # fmt: skip
    assert find_measured_steps(estimate) == [MEASURED]


@pytest.mark.parametrize(
    ("n_cards", "dollars", "own_price", "text"),
    [
        (1, 12.346, True, "$12.35 at $2.50 an hour"), (1, 12.0, False, f"$12.00 at $2.50 an hour ({PRICES_DATE})"),
        (8, 99.0, True, "$99.00 at 8 x $2.50 an hour"), (8, 0.0, False, f"$0.00 at 8 x $2.50 an hour ({PRICES_DATE})"),
        (8, None, False, "at no known price; pass --price-per-hour"),
    ],
)  # fmt: skip
def test_a_price_of_ours_has_its_date_and_a_users_has_none(n_cards, dollars, own_price, text):
    outcome = SimpleNamespace(projection=SimpleNamespace(dollars=dollars), setting=SimpleNamespace(n_cards=n_cards))
    estimate = SimpleNamespace(outcome=outcome, card=SimpleNamespace(price_per_hour=2.5))
    assert describe_cost(estimate, own_price) == text
