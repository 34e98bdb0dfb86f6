"""docs/cards.md: what is estimated for each row, and its words."""

from types import SimpleNamespace

import pytest

from scripts.pages import cards
from tests.helpers.calls import Calls


def setting(**more):
    usual = {"adapter": None, "states": "fp32", "recompute": "cheap", "master": "split", "in_backward": False,
             "offload": False}  # fmt: skip
    return SimpleNamespace(**usual | more)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({}, ""), ({"states": "8bit"}, "`--optimizer-states 8bit`"), ({"states": "8bit", "adapter": 1}, ""),
     ({"recompute": "block"}, "`--recompute block`"), ({"master": "stochastic"}, "`--master-weights stochastic`"),
     ({"in_backward": True}, "`--optimizer-in-backward --grad-clip 0`"),
     ({"offload": True}, "`--offload-optimizer`, 12 GB on the host"),
     ({"states": "bf16", "recompute": "block", "master": "stochastic", "in_backward": True, "offload": True},
      "`--optimizer-states bf16 --recompute block --master-weights stochastic --optimizer-in-backward --grad-clip 0 "
      "--offload-optimizer`, 12 GB on the host")],
)  # fmt: skip
def test_flags_of_a_setting(changes, told):
    outcome = SimpleNamespace(setting=setting(**changes), memory=SimpleNamespace(host=12.4e9))
    assert cards.describe_setting(outcome) == told


@pytest.mark.parametrize("dollars", [1.234, None])
def test_a_row(dollars, monkeypatch):
    outcome = SimpleNamespace(
        setting=setting(), memory=SimpleNamespace(host=0, total=7.26e9),
        cut=SimpleNamespace(largest=SimpleNamespace(tokens=8320)),
        projection=SimpleNamespace(dollars=dollars, tokens_per_s=1234.5, total_s=7260.0),
    )  # fmt: skip
    calls = Calls()
    monkeypatch.setattr(cards, "take_fastest", calls.stand_in("take_fastest", outcome))
    price = "$1.23" if dollars else ""
    told = f"| llama-7b | LoRA | 7.3 | 8,320 | 1,234 | {cards.format_duration(7260.0)} | {price} |  |"
    assert cards.row("card", "llama-7b", "lora") == told
    assert calls.lines == ["take_fastest('card', 'llama-7b', 'lora')"]
    monkeypatch.setattr(cards, "take_fastest", lambda *_: None)
    assert cards.row("card", "llama-7b", "qlora") == "| llama-7b | QLoRA | does not fit | | | | | |"


def test_the_page_has_a_table_for_each_size(monkeypatch, snapshot):
    monkeypatch.setattr(cards, "row", lambda card, model, adapter: f"| {card.name}: {model}, {adapter} |")
    text = cards.page()
    assert text.replace(cards.PRICES_DATE, "A MONTH") == snapshot
    lines = [line for line in cards.DOC.read_text().splitlines() if not line.startswith("| ") or " trained " in line]
    assert [line for line in text.splitlines() if not line.startswith("| ") or " trained " in line] == lines


def test_both_ways_of_computing_again_are_estimated(monkeypatch):
    asked = []
    nothing = SimpleNamespace(fits=False, alternatives=[])

    def estimate(config, card, mix, recipe, setting):
        asked.append((config, card, setting.recompute, setting.adapter is not None, setting.dtype))
        return nothing

    monkeypatch.setattr(cards, "estimate_run", estimate)
    assert cards.take_fastest("card", "llama-7b", "lora") is None
    bf16 = cards.torch.bfloat16
    assert asked == [(cards.MODELS["llama-7b"], "card", way, True, bf16) for way in ("cheap", "block")]
