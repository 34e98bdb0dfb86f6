"""Figures of measured steps: speed, MFU, projection, the card."""

import pytest
import torch

from engine.model.config import MODELS
from engine.planning.cards import CARDS
from scripts.step import figures

H100 = CARDS["H100"]


def test_mfu_and_speed():
    n = MODELS["llama-7b"].n_parameters
    found = figures.summarize_speed(n, [16000, 17000], [12000, 12500], [1.0, 0.5], H100)
    assert found["tokens_per_s_mean"] == 22000 and found["computed_tokens_per_s"] == pytest.approx(24500 / 1.5)
    assert found["mfu"] == pytest.approx(6 * 6.738e9 * 18500 / 989e12, rel=1e-3), "of what is computed"
    assert found["effective_mfu"] == pytest.approx(6 * 6.738e9 * 25000 / 989e12, rel=1e-3)
    assert found["mfu_formula"] == "6 x 6.738e+09 x computed tokens/s / 9.89e+14 (dense bf16 peak of H100)"
    line = figures.format_record(found | {"name": "step", "peak_gib": None})
    assert "MFU 75.6% (102.2% effective)" in line
    assert (found["step_s_median"], found["step_s_min"], found["step_s_max"]) == (0.75, 0.5, 1.0)
    assert found["computed_over_logical"] == 24500 / 33000 and found["steps"] == 2
    assert figures.mfu(n, 1e4, 2e4, None)["mfu"] is None


def test_padding_is_no_work():
    found = figures.summarize_speed(10**9, [16000] * 2, [20000] * 2, [1.0] * 2, H100)
    assert found["mfu"] == found["effective_mfu"] == pytest.approx(6e9 * 16000 / 989e12)
    assert "effective" not in figures.format_record(found | {"name": "step", "peak_gib": None})


def test_the_headline_is_the_median_of_steps():
    """One step that waits, for a compiler or a save, does not lower it."""
    found = figures.summarize_speed(1, [16000] * 5, [12000] * 5, [0.8, 0.8, 0.8, 0.8, 8.0], None)
    assert found["tokens_per_s"] == 20000 and found["tokens_per_s_mean"] < 8000


def test_the_whole_run_is_projected_from_the_step():
    found = figures.project_finetune({"name": "x", "tokens_per_s": 22000.0}, H100)
    assert found["steps"] == 1221 and found["tokens"] == pytest.approx(19.8e6, rel=0.01)
    assert found["minutes"] == pytest.approx(19.8e6 / 22000 / 60, rel=0.01)
    assert found["dollars"] == pytest.approx(found["minutes"] / 60 * H100.price_per_hour)
    assert "projected from the measured step" in found["what"] and found["price_of"]
    assert figures.project_finetune({"name": "x", "tokens_per_s": 1.0}, None)["dollars"] is None


def test_the_card_at_hand(monkeypatch):
    monkeypatch.setattr(figures, "GPU", True)
    for name, known in (
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA H100 NVL", None), ("NVIDIA H200 NVL", None), ("Synthetic 9000", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        found = figures.card_here()
        assert (found and found.name) == known


def test_memory_is_that_of_tensors_and_that_which_is_reserved(monkeypatch):
    assert figures.peak_memory() == {"peak_gib": None, "peak_reserved_gib": None} or torch.cuda.is_available()
    monkeypatch.setattr(figures, "GPU", True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5 * 2**30)
    assert figures.peak_memory() == {"peak_gib": 3.0, "peak_reserved_gib": 5.0}


@pytest.mark.parametrize("finite", [None, True, False])
def test_a_loss_that_is_no_number_is_told_and_only_that(finite):
    record = {"name": "a", "tokens_per_s": 1.0, "step_s_median": 1.0, "mfu": None, "peak_gib": None}
    record |= {} if finite is None else {"all_finite": finite}
    assert ("NOT FINITE" in figures.format_record(record)) == (finite is False)


STEP = {"name": "m", "tokens_per_s": 12345.6, "step_s_median": 1.23456, "mfu": None, "peak_gib": None}
LINES = {
    "  m" + " " * 61 + "   12,346 tokens/s    1.235 s a step": {},
    "  m" + " " * 61 + "   12,346 tokens/s    1.235 s a step  MFU 40.0% (50.0% effective)   61.3 GiB (98.8% of the "
    "estimate)  NOT FINITE  ours is 1.50x  out of memory at [8, 4]": {
        "mfu": 0.4, "effective_mfu": 0.5, "peak_gib": 61.3, "peak_over_estimate": 0.9876, "all_finite": False,
        "ours_over_peer": 1.5, "out_of_memory_at": [8, 4],
    },
    "  m" + " " * 61 + "   12,346 tokens/s    1.235 s a step  MFU 40.0%    6.0 GiB": {"mfu": 0.4, "peak_gib": 6.0},
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_record_is_a_line(line):
    assert figures.format_record(STEP | LINES[line]) == line


@pytest.mark.parametrize(
    ("record", "line"),
    [({"name": "m"}, "  m"), ({"name": "m", "failed": "x"}, f"  m{' ' * 61}failed: x"),
     ({"name": "m", "absent": "y"}, f"  m{' ' * 61}absent: y")],
)  # fmt: skip
def test_what_has_no_speed_is_told_with_its_reason(record, line):
    assert figures.format_record(record) == line


def test_a_summary_of_steps_is_told_whole():
    n, card = 10**9, H100
    found = figures.summarize_speed(n, [100, 300, 500], [80, 400, 300], [1.0, 2.0, 4.0], card)
    peak = card.peak_tflops * 1e12
    assert found == {
        "tokens_per_s": 125.0, "tokens_per_s_mean": 900 / 7, "computed_tokens_per_s": 780 / 7,
        "computed_over_logical": 780 / 900, "tokens_a_step": 300.0, "mfu": 6e9 * 80 / peak,
        "effective_mfu": 6e9 * 125 / peak, "steps": 3, "step_s_median": 2.0, "step_s_min": 1.0, "step_s_max": 4.0,
        "mfu_formula": "6 x 1e+09 x computed tokens/s / 9.89e+14 (dense bf16 peak of H100)",
    }  # fmt: skip
    unknown = figures.mfu(n, 1.0, 2.0, None)
    formula = "6 x N x computed tokens/s / dense bf16 peak, which is not known here"
    assert unknown == {"mfu": None, "effective_mfu": None, "mfu_formula": formula}


def test_a_projection_is_told_whole():
    """52,002 rows in three epochs; rows are cut at 512 tokens."""
    alpaca = figures.alpaca_lengths()
    tokens = 52002 * 3 * sum(min(512, a + b) for a, b in zip(alpaca.prompt, alpaca.response, strict=True)) / len(alpaca)
    seconds = tokens / 20_000
    assert figures.project_finetune({"name": "x", "tokens_per_s": 20_000.0}, H100) == {
        "what": "Alpaca: 52002 rows x 3 epochs, projected from the measured step", "of": "x", "steps": 3 * 407,
        "tokens": round(tokens), "minutes": pytest.approx(seconds / 60), "dollars_an_hour": H100.price_per_hour,
        "dollars": pytest.approx(H100.price_per_hour * seconds / 3600), "price_of": figures.PRICES_DATE,
    }  # fmt: skip
    unknown = figures.project_finetune({"name": "x", "tokens_per_s": 20_000.0}, None)
    assert unknown["dollars"] is unknown["dollars_an_hour"] is unknown["price_of"] is None


def test_peaks_are_of_what_follows_a_reset(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    for gpu in (False, True):
        monkeypatch.setattr(figures, "GPU", gpu)
        figures.reset_peak_memory()
    assert resets == [1]


@pytest.mark.parametrize("n", [(2, 3, 3), (3, 2, 3), (3, 3, 2)])
def test_each_step_has_its_tokens_and_its_seconds(n):
    tokens, computed, seconds = ([1.0] * length for length in n)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        figures.summarize_speed(1, tokens, computed, seconds, None)
