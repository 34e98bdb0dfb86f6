"""README's command for LLaMA-7B on GPUs that are not here: what it plans to train with, and that this fits."""

import re
from types import SimpleNamespace

import pytest
import torch

from engine import finetune
from engine.base.errors import UsageError
from engine.model.config import MODELS
from engine.planning.fitting import GOOD_TOKENS
from engine.planning.memory import CONTEXT_BYTES, BatchShape, memory
from engine.planning.setting import Setting
from engine.training import micro_batch_size
from tests.helpers.own_rows import write_alpaca
from tests.helpers.small_model import small_model

GB = 10**9
CARDS = {  # by name: (name that CUDA gives it, compute capability, bytes in all, bytes that are free)
    "24": ("NVIDIA GeForce RTX 4090", (8, 9), int(25.3 * GB), int(24.8 * GB)),
    "80": ("NVIDIA H100 80GB HBM3", (9, 0), int(85.0 * GB), int(84.3 * GB)),
    "141": ("NVIDIA H200", (9, 0), int(150.1 * GB), int(149.4 * GB)),
}


@pytest.fixture
def plan_on(monkeypatch, tmp_path, capsys):
    """Return what the command prints with --dry-run on a card; only the model is a shape instead of a folder."""
    rows = write_alpaca(tmp_path)

    def plan_on(card, *flags):
        name, capability, total, free = CARDS[card]
        properties = SimpleNamespace(total_memory=total, name=name, major=capability[0], minor=capability[1])
        for function, value in (
            ("is_available", True), ("mem_get_info", (free, total)), ("get_device_name", name),
            ("get_device_capability", capability), ("get_device_properties", properties), ("is_bf16_supported", True),
            ("device_count", 1), ("current_device", 0),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, function, lambda *_, value=value, **__: value)
        monkeypatch.setattr(micro_batch_size, "read_free_bytes", lambda: 128 * GB)
        model = ["--model", "llama-7b", "--random-init", "--tokenizer", str(small_model())]
        finetune.main([*model, "--data", str(rows), "--out", str(tmp_path / "out"), "--dry-run", *flags])
        return capsys.readouterr().out

    return plan_on


SAID = {"fp32": "states in fp32", "bf16": "states in bf16", "8bit": "states in 8 bits"}


@pytest.mark.parametrize(("card", "states"), [("80", "8bit"), ("141", "fp32")])
def test_the_states_fit_the_card_and_are_told(card, states, plan_on):
    told = plan_on(card)
    assert SAID[states] in told
    assert ("note: --optimizer-states auto is 8bit: exact ones (fp32) do not fit" in told) == (states == "8bit")
    tokens = int(re.search(r"micro-batches of at most (\d+) tokens", told)[1])
    setting = Setting(torch.bfloat16, states=states)
    used = memory(MODELS["llama-7b"], setting, BatchShape(tokens, tokens)).total
    _, _, total, free = CARDS[card]
    assert tokens >= GOOD_TOKENS and 0.9 * free < used <= free + CONTEXT_BYTES <= total


def test_a_card_of_24_gb_is_told_what_trains_a_7b_there(plan_on):
    """All that is on the GPU without it, weights and gradients in bf16, takes 27 GB."""
    with pytest.raises(UsageError, match=r"do not fit the 25\.\d GB that are free; pass --offload-optimizer \("):
        plan_on("24")
    told = plan_on("24", "--offload-optimizer")
    assert "states in fp32" in told and "master and states in the host's memory" in told


@pytest.mark.parametrize(("card", "states"), [("80", "bf16"), ("141", "8bit"), ("141", "bf16")])
def test_a_flag_insists(card, states, plan_on):
    told = plan_on(card, "--optimizer-states", states)
    assert SAID[states] in told and "auto" not in told


def test_a_flag_insists_on_what_does_not_fit(plan_on):
    with pytest.raises(UsageError, match=r"do not fit the 8\d\.\d GB that are free; pass --optimizer-states 8bit"):
        plan_on("80", "--optimizer-states", "fp32")
