"""LoRA on a CPU, beside all weights and beside PEFT: contenders, peaks, ratios."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.scripts.speed.summaries import summary_of


@pytest.mark.parametrize("name", ["all weights", "lora", "peft"])
def test_a_contender_trains_what_its_name_says(name, load_beside_stand_in, monkeypatch):
    adapter = load_beside_stand_in("scripts.speed.cpu_adapter")
    contest, lengths = adapter.Contest("", 9, "folder"), SimpleNamespace(lengths=lambda: np.array([2]))
    contest.__dict__ |= {"rows": [], "dataset": lengths}
    monkeypatch.setattr(adapter, "encode_rows", lambda *_: [([1, 2], [1, 2])])
    monkeypatch.setattr(adapter, "find_embedded_gguf", lambda: "gguf")
    monkeypatch.setattr(adapter, "open_source", lambda path: "source")
    monkeypatch.setattr(adapter, "Ours", lambda source, dataset, dtype, impl, config=None: ("ours", dtype, config))
    monkeypatch.setattr(adapter, "Peft", lambda folder, examples, dtype: ("peft", dtype))
    wanted = {
        "all weights": ("ours", torch.float32, None), "lora": ("ours", torch.float32, adapter.ADAPTER),
        "peft": ("peft", torch.float32),
    }  # fmt: skip
    assert contest.make(name, torch.float32) == wanted[name]


def test_a_peak_is_what_the_steps_add_and_a_ratio_that_of_lora(load_beside_stand_in, monkeypatch, tmp_path, call_main):
    adapter = load_beside_stand_in("scripts.speed.cpu_adapter")
    peaks = iter([100, 175])
    stepper = SimpleNamespace(step=lambda examples, micro: None)
    contest = SimpleNamespace(dataset=None, make=lambda name, dtype: stepper)
    monkeypatch.setattr(adapter, "read_peak", lambda: next(peaks))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert adapter.measure_peak(contest, "lora", {"threads": 1, "dtype": "fp32", "micro": 1}, [[0]]) == 75
    status = tmp_path / "status"
    status.write_text("VmPeak:\t 9 kB\nVmHWM:\t  7 kB\nVmRSS:\t 5 kB\n")
    monkeypatch.undo()
    monkeypatch.setattr(adapter, "Path", lambda _: status)
    assert adapter.read_peak() == 7 * 1024


def test_lora_is_over_all_weights_and_over_peft(load_beside_stand_in, call_main, monkeypatch, tmp_path):
    adapter = load_beside_stand_in("scripts.speed.cpu_adapter")

    def setup(dataset):
        monkeypatch.setattr(adapter, "Contest", lambda *_: SimpleNamespace(dataset=dataset))
        monkeypatch.setattr(adapter, "measure_peaks", lambda contest, settings, steps: dict.fromkeys(settings, 1e9))
        monkeypatch.setattr(adapter.importlib.metadata, "version", lambda _: "1")

    rates = {"all weights": [2.0], "lora": [6.0], "peft": [3.0]}
    found = summary_of(adapter, call_main, monkeypatch, tmp_path, rates, setup)
    assert {name: ratio["median"] for name, ratio in found["ratio"].items()} == {"all weights": 3.0, "peft": 2.0}
