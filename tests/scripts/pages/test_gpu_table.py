"""The tables of a report of a GPU: every line of one, and of the targets while there is none."""

import json

import pytest

from scripts.pages import gpu_table

PARTS = {
    "machine": {"device": "NVIDIA H200", "driver": "1.2", "torch": "2.11", "triton": "3.6"},
    "ceilings": {"copy_gb_per_s": 4321.4, "gemm_tflops": 777.7, "gemm_side": 8192},
    "tests": {
        "rope": {"passed": 5, "failed": 1, "skipped": 2},
        "adamw": {"passed": 2, "failed": 0, "skipped": 0, "ended": "x"},
        "failed": "a word",
    },
    "kernels": {"records": [
        {"op": "rope", "shape": "a", "who": "ours", "pass": "fwd", "fraction": 0.95, "times_ours": 1.0},
        {"op": "rope", "shape": "a", "who": "ours", "pass": "bwd", "fraction": 0.85},
        {"op": "rope", "shape": "b", "who": "ours", "pass": "fwd", "fraction": 0.75},
        {"op": "rope", "shape": "a", "who": "fast", "pass": "fwd", "times_ours": 1.5},
        {"op": "rope", "shape": "a", "who": "faster", "pass": "fwd", "times_ours": 0.8},
        {"op": "rope", "shape": "a", "who": "torch eager", "pass": "fwd", "times_ours": 0.1},
        {"op": "adamw", "shape": "a", "who": "ours", "failed": "x"},
        {"op": "nf4", "shape": "a", "who": "ours", "wrong": "x", "failed": "y"},
    ]},
    "step": {
        "records": [
            {"name": "m", "tokens_per_s": 22222.2, "mfu": 0.4, "effective_mfu": 0.5, "mfu_formula": "f",
             "peak_gib": 70.06},
            {"name": "n", "tokens_per_s": 5.0, "mfu": None}, {"name": "o", "failed": "x"},
        ],
        "projections": [
            {"what": "Alpaca", "of": "m", "steps": 1221, "minutes": 14.66, "dollars": 0.654, "dollars_an_hour": 2.5,
             "price_of": "May"},
            {"what": "Alpaca", "of": "n", "steps": 9, "minutes": 1.0, "dollars": None},
        ],
    },
    "profile": {"records": [
        {"name": "m", "launches": 3210, "kinds": {"a": {"share": 0.25}, "b": {"share": 0.7}, "c": {"share": 0.0009},
                                                  "d": {"share": 0.001}}}, {"name": "x", "failed": "y"},
    ]},
    "peers": {"records": [
        {"name": "m, p", "tokens_per_s": 7500.0, "peak_gib": 71.06, "ours_over_peer": 3.0,
         "ours_without_sharing_over_peer": 2.0},
        {"name": "m, q", "tokens_per_s": 8.0, "peak_gib": None, "ours_over_peer": 1.5}, {"name": "m, r", "absent": "x"},
    ]},
    "ranks": {"records": [
        {"name": "r", "over_plain": 1.08, "over_plain_min": 1.07, "over_plain_max": 1.09, "pairs": 3, "peak_gib": 74.04,
         "plain_peak_gib": 71.0},
        {"name": "s", "over_plain": 1.08, "over_plain_min": 1.07, "over_plain_max": 1.09, "pairs": 3, "peak_gib": None,
         "out_of_memory": "x", "master": "stochastic"},
        {"name": "t", "saves": [], "bytes": 8.44e9, "folder": "/a (b)/c (ext4)", "write_s": 4.04, "gb_per_s": 2.004,
         "held_s": 0.25, "first_held_s": 1.5, "meanwhile_over_unsaved": 1.1, "over_unsaved_at_100": 1.006},
        {"name": "u", "saves": [], "bytes": 8.44e9, "folder": "/a (ext4)", "write_s": 4.04, "gb_per_s": 2.004,
         "held_s": 0.25, "first_held_s": 1.5, "meanwhile_over_unsaved": None, "over_unsaved_at_100": 1.006},
        {"name": "v", "backend": "nccl", "largest_loss_apart": 1e-4}, {"name": "w", "absent": "no room"},
        {"name": "x", "failed": "it broke"}, {"name": "y"},
    ]},
}  # fmt: skip
TARGETS = {
    "cards": ["H100", "H200"],
    "rows": [
        {"what": "worst rope", "op": "rope", "figure": "fraction", "at_least": 0.9},
        {"what": "rope of a", "op": "rope", "shape": "a", "figure": "fraction", "at_most": 0.9},
        {"what": "rope's forward", "op": "rope", "shape": "a", "pass": "fwd", "figure": "fraction", "at_least": 0.9},
        {"what": "rope beside others", "op": "rope", "figure": "best_peer", "at_most": 1.0},
        {"what": "rope beside the faster", "op": "rope", "who": "faster", "figure": "times_ours", "at_least": 0.5},
        {"what": "failed", "op": "adamw", "figure": "fraction", "at_least": 1},
        {"what": "wrong", "op": "nf4", "figure": "fraction", "at_least": 1},
        {"what": "nothing", "op": "swiglu", "figure": "fraction", "at_least": 1},
        {"what": "speed", "part": "step", "name": "m", "figure": "tokens_per_s", "at_least": 22000, "card": "H200"},
        {"what": "memory", "part": "step", "name": "m", "figure": "peak_gib", "at_most": 70},
        {"what": "another card's", "part": "step", "name": "m", "figure": "peak_gib", "at_most": 7, "card": "H100"},
        {"what": "failed step", "part": "step", "name": "o", "figure": "peak_gib", "at_most": 70},
        {"what": "launches", "part": "profile", "name": "m", "figure": "launches", "at_most": 3209},
    ],
}  # fmt: skip


def test_a_report_is_told_whole(snapshot):
    report = {"parts": PARTS, "commit": "0123456789abcdef", "date": "2000-01-02"}
    assert "\n".join(gpu_table.format_report(report, TARGETS)) == snapshot


def test_a_report_of_little_tells_little(snapshot):
    report = {"parts": {"tests": {"a": {"passed": 1, "failed": 0, "skipped": 0}}}, "commit": None}
    assert "\n".join(gpu_table.format_report(report, TARGETS)) == snapshot


def test_targets_stand_by_card(snapshot):
    assert "\n".join(gpu_table.format_targets(TARGETS)) == snapshot


@pytest.mark.parametrize(
    ("device", "card"), [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("RTX", "H100")]
)
def test_a_device_is_held_to_its_cards_targets(device, card):
    assert gpu_table.find_card(device, TARGETS) == card
    assert len(gpu_table.rows_for_card(card, TARGETS)) == 12


def test_reports_are_those_of_gpus_in_the_order_of_their_files(tmp_path):
    of = lambda **more: {"what": "scripts.gpu_report", "smoke": False} | more  # noqa: E731
    files = {"b": of(n=1), "a": of(n=2), "smoke": of(smoke=True), "other": {"what": "x"}}
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    (tmp_path / "c.txt").write_text("no JSON")
    assert [report["n"] for report in gpu_table.read_reports(tmp_path)] == [2, 1]
