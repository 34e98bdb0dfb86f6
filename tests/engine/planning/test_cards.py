"""Cards by their names, the rates that reports measured, and the links between several."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from engine.base.errors import DataError
from engine.planning.cards import (
    CARDS,
    GIB,
    PRICES_DATE,
    change_card,
    detect_card,
    find_card,
    find_card_by_device_name,
    find_rates,
    find_reports,
)


@pytest.mark.parametrize("name", ["rtx 4090", "RTX4090", "4090", "a100-80", "A100 40", "h100"])
def test_cards_are_found_by_the_names_people_give_them(name):
    assert find_card(name).name in CARDS


@pytest.mark.parametrize(
    ("device_name", "found"),
    [
        *((f"NVIDIA {card.device.removeprefix('NVIDIA ')}", card.name) for card in CARDS.values()),
        *((f"NVIDIA GeForce {name}", None) for name in (
            "RTX 3060 Ti", "RTX 3090 Ti", "RTX 4060 Ti", "RTX 4080 SUPER", "RTX 4090 Laptop GPU", "RTX 5080",
        )),
        ("NVIDIA H100 NVL", None), ("NVIDIA H200 NVL", None), ("NVIDIA H100 PCIe", None), ("NVIDIA GB10", None),
    ],
)  # fmt: skip
def test_a_kind_of_another_size_or_clock_is_not_taken_for_the_card_whose_name_it_has(device_name, found):
    card = find_card_by_device_name(device_name)
    assert (card and card.name) == found


def test_another_card_is_described_by_its_figures():
    card = CARDS["H100"]
    assert change_card(card, None, None, None, None) == card
    assert change_card(card, None, None, None, 1.5).price_per_hour == 1.5
    other = change_card(card, 48, None, None, None)
    assert (other.memory_gib, other.name, other.device, other.price_per_hour) == (48, "like H100", "none", None)


PRICES = {  # dollars an hour, of March 2026
    "A100-40": 1.48, "A100-80": 1.39, "H100": 2.69, "H200": 3.59, "B200": 5.98, "L40S": 0.79, "RTX-3060": None,
    "RTX-3090": 0.22, "RTX-4060": None, "RTX-4080": None, "RTX-4090": 0.34, "RTX-5090": 0.69,
}  # fmt: skip


def test_prices_are_those_of_their_date():
    assert ({name: card.price_per_hour for name, card in CARDS.items()}, PRICES_DATE) == (PRICES, "March 2026")


MACHINE = {"machine": {"device": "NVIDIA H100 80GB HBM3"}}
CEILINGS = {"ceilings": {"gemm_tflops": 700.0, "copy_gb_per_s": 2900.0}}
STEP = {"name": "main"}


def write_report(path, parts, **facts):
    report = {"what": "scripts.gpu_report", "smoke": False, "date": "2026-01-01", "parts": parts} | facts
    path.write_text(json.dumps(report))


def test_a_report_of_the_card_replaces_what_is_projected(tmp_path):
    card = CARDS["H100"]
    assert find_rates(card, tmp_path).source == "projected"
    write_report(tmp_path / "smoke.json", MACHINE | CEILINGS, smoke=True)
    write_report(tmp_path / "other.json", {"machine": {"device": "NVIDIA H200"}} | CEILINGS)
    write_report(tmp_path / "without.json", MACHINE)
    write_report(tmp_path / "half.json", MACHINE | {"ceilings": {"gemm_tflops": 1.0}})
    assert find_rates(card, tmp_path).source == "projected"
    write_report(tmp_path / "old.json", MACHINE | {"ceilings": {"gemm_tflops": 1.0, "copy_gb_per_s": 1.0}})
    write_report(tmp_path / "new.json", MACHINE | CEILINGS | {"step": {"records": [STEP]}}, date="2026-02-01")
    speed = find_rates(card, tmp_path)
    assert (speed.gemm_flops_per_s, speed.copy_bytes_per_s, speed.report) == (7e14, 2.9e12, "new.json")
    assert speed.steps == (STEP,)


def test_shards_use_nvlink_pcie_or_ports():
    """GPUs with NVLink use it and others use PCIe. More than 8 GPUs use the ports of their machines."""
    reach = {name: [card.bus_bytes_per_s(n) / 1e9 for n in (2, 8, 16)] for name, card in CARDS.items()}
    assert reach["A100-80"] == reach["A100-40"] == [240, 240, 240]
    assert reach["H100"] == reach["H200"] == [360, 360, 320] and reach["B200"] == [720, 720, 320]
    assert reach["L40S"] == reach["RTX-4090"] == [20, 20, 20] and reach["RTX-5090"] == [40, 40, 40]


def test_replicas_use_the_ports_of_their_machines():
    """A replica within a machine uses no port. Sums over machines use the ports of the GPUs that hold a shard."""
    card = CARDS["H100"]
    assert [card.bus_bytes_per_s(s, r) / 1e9 for s, r in ((8, 8), (2, 32), (1, 64), (16, 4))] == [360, 360, 360, 320]
    assert [card.sum_bytes_per_s(s, r) / 1e9 for s, r in ((8, 8), (4, 4), (2, 8), (1, 64), (16, 4))] == [
        40, 80, 160, 320, 40
    ]  # fmt: skip
    assert [card.sum_bytes_per_s(s, 8 // s) / 1e9 for s in (1, 2, 4)] == [360, 360, 360]
    assert card.bus_bytes_per_s(12) == 0.8 * 200e9 and card.bus_bytes_per_s(6, 2) == 0.8 * 100e9  # four, two a machine


def test_the_card_of_a_device_has_the_memory_that_it_really_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=79 * GIB))
    for name, card in (("NVIDIA H100 80GB HBM3", CARDS["H100"]), ("Some card", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = detect_card(torch.device("cuda"))
        assert found == (card and dataclasses.replace(card, memory_gib=79.0)), name
    assert detect_card(torch.device("cpu")) is None


PER_CYCLE = {  # FLOP in bf16, summed in fp32, of an SM: by the data sheets
    "A100": 2048, "H100": 4096, "H200": 4096, "B200": 8192, "L40S": 1024, "RTX": 512
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_peak_clock_and_processors_agree(name):
    card = CARDS[name]
    per_cycle = PER_CYCLE[name.partition("-")[0]]
    assert 1e-3 * card.sms * card.clock_ghz * per_cycle == pytest.approx(card.peak_tflops, rel=0.015)


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"what": '])
def test_a_damaged_report_is_named(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json: is damaged"):
        find_reports(CARDS["H100"], tmp_path)
