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
