"""README's table of reports and targets."""

import json
from pathlib import Path

import pytest

from scripts.pages import benchmarks, gpu_table
from scripts.pages import kernels as kernels_page
from tests.helpers.run import ROOT

TARGETS = json.loads((ROOT / "benchmarks" / "targets.json").read_text())


def record(op, shape, who="ours", kind="fwd", **figures):
    return {"op": op, "shape": shape, "who": who, "pass": kind, "ms": 1.0, **figures}


@pytest.fixture
def synthetic():
    mix, dense = "Alpaca mix H=32 Dh=128", "dense s=4096 H=32 Dh=128"
    records = [
        record("rms_norm", "a", fraction=0.95), record("rms_norm", "b", kind="bwd", fraction=0.912),
        record("rms_norm", "a", "torch eager", fraction=0.2), record("swiglu", "a", fraction=0.5),
        record("rope", "a", fraction=0.1), record("rope", "a", "ours, in place", fraction=0.97),
        {"op": "grad_norm", "shape": "a", "who": "ours", "wrong": "output 0 is off"},
        record("attention", mix, "ours", times_ours=1.0), record("attention", mix, "torch eager", times_ours=0.5),
        record("attention", mix, "varlen_attn", times_ours=1.5),
        record("attention", mix, "FlexAttention", times_ours=1.25),
        record("attention", mix, "varlen_attn", "bwd", times_ours=0.75),
        record("attention", dense, kind="fwd+bwd", tflops=312.4),
        record("attention", "dense s=512", kind="fwd+bwd", tflops=9.0),
        record("linear_cross_entropy", "a", kind="fwd+bwd", times_gemm=1.1),
        record("linear_cross_entropy", "b", kind="fwd+bwd", times_gemm=1.2),
    ]  # fmt: skip
    tests = {
        "rope": {"passed": 5, "failed": 0, "skipped": 1},
        "adamw": {"passed": 2, "failed": 1, "skipped": 0, "ended": "x"},
    }
    rate = {"tokens_per_s": 22500.0, "mfu": 0.82, "effective_mfu": 0.92, "mfu_formula": "6 x N x t", "peak_gib": 70.06}
    over = {
        "over_plain_min": 1.07, "over_plain_max": 1.09, "pairs": 3, "peak_gib": 74.0, "plain_peak_gib": 71.0,
    }  # fmt: skip
    steps = {
        "step": {
            "records": [
                {"name": "llama-7b", **rate},
                {"name": "llama-7b, no sharing", **rate, "tokens_per_s": 15000.0, "peak_gib": 76.0},
                {"name": "llama-7b, low memory: offload, recompute block", "failed": "TooLarge: out of memory"},
            ],
            "projections": [{
                "what": "Alpaca, projected from the measured step", "of": "llama-7b", "steps": 1221, "minutes": 14.66,
                "dollars": 0.66, "dollars_an_hour": 2.69, "price_of": "March 2026",
            }],
        },
        "profile": {"records": [{
            "name": "llama-7b", "syncs": 0, "launches": 3210,
            "kinds": {kind: {"ms": 10 * x, "share": x} for kind, x in (("norms", 0.1), ("GEMM", 0.9), ("rope", 0.0))},
        }]},
        "peers": {"records": [
            {"name": "llama-7b, transformers", "tokens_per_s": 7500.0, "peak_gib": 71.0, "ours_over_peer": 3.0,
             "ours_without_sharing_over_peer": 2.0},
            {"name": "llama-7b, transformers + liger", "absent": "liger-kernel is not installed"},
        ]},
        "ranks": {"records": [
            {"name": "llama-7b, one rank", **over, "over_plain": 1.08},
            {"name": "tinyllama-1.1b, one rank", **over, "over_plain": 1.02},
            {"name": "llama-7b, saves", "over_unsaved_an_epoch": 1.001},
            {"name": "tinyllama-1.1b, saves", "absent": "the host's memory has 1.0 GB free, wanted 7.0"},
        ]},
    }  # fmt: skip
    return {
        "what": "scripts.gpu_report", "smoke": False, "commit": "0123456789abcdef", "date": "2000-01-02 03:04",
        "left_out": [],
        "parts": {
            **steps,
            "machine": {"device": "Synthetic 9000", "torch": "2.11.0", "driver": "1.2", "triton": "3.6.0"},
            "ceilings": {"copy_gb_per_s": 3000.0, "gemm_tflops": 700.0, "gemm_side": 8192}, "tests": tests,
            "kernels": {"records": records},
        },
    }  # fmt: skip


def test_the_table_holds_measured_beside_target(synthetic, tmp_path):
    (tmp_path / "synthetic_9000.json").write_text(json.dumps(synthetic))
    text = benchmarks.rendered_page(tmp_path)
    rows = {
        line.split(" | ")[0].strip("| "): [c.strip() for c in line.strip("|").split("|")[1:]]
        for line in text.splitlines()
        if line
    }
    assert (
        "GPU" not in rows
        and "Synthetic 9000, driver 1.2, torch 2.11.0, triton 3.6.0, commit 0123456789ab, 2000-01-02 03:04" in rows
    )
    assert rows["device copy; bf16 GEMM of 8192 cubed"] == ["3,000 GB/s, 700 TFLOP/s", ""]
    assert rows["kernel tests on the device"][0] == "7 passed, 1 failed, 1 skipped; 1 files did not finish"
    wanted = gpu_table.rows_for_card("H100", TARGETS)  # of a card that has no rows of its own
    found = {row["what"]: rows[row["what"]] for row in wanted}
    values = [cells[0] for cells in found.values()]
    assert values[:6] == ["15,000", "**22,500**", "**70.06**", "76.00", "failed", "**0**"]
    assert values[6:10] == ["1.08", "**1.02**", "**1.00**", "not measured"]
    assert values[10:] == [
        "**0.91**", "**0.97**", "0.50", "wrong result", "not measured", "not measured", "**1.25**", "0.75", "**312**",
        "not measured", "not measured", "1.20",
    ]  # fmt: skip
    assert [cells[1] for cells in found.values()][-1] == "≤ 1.15" and found[wanted[10]["what"]][1] == "≥ 0.9"
    assert [cells[1] for cells in found.values()][:6] == ["≥ 16,000", "≥ 22,000", "≤ 75", "≤ 75", "≤ 40", "≤ 0"]
    assert [cells[1] for cells in found.values()][6:10] == ["≤ 1.03", "≤ 1.03", "≤ 1.02", "≤ 1.02"]
    assert rows["FSDP2 over the plain step, llama-7b, one rank: 3 pairs of blocks"][0] == (
        "1.080x (1.070 to 1.090); 74.0 GiB, plain 71.0 GiB"
    )
    assert rows["step, llama-7b: MFU = 6 x N x t"][0] == "22,500 tokens/s, 82.0% (92.0% effective), 70.1 GiB"
    run = rows["Alpaca, projected from the measured step (llama-7b): 1,221 steps"]
    assert run[0] == "14.7 minutes, $0.66 at $2.69 an hour (March 2026)"
    assert rows["where a step of llama-7b goes: 3,210 launches"][0] == "GEMM 90.0%, norms 10.0%"
    peer = rows["llama-7b, transformers"][0]
    assert peer == "7,500 tokens/s, 71.0 GiB; ours is 3.00x, 2.00x without sharing"
    assert "llama-7b, transformers + liger" not in rows


def test_without_a_report_of_a_gpu_nothing_is_claimed(synthetic, tmp_path):
    (tmp_path / "targets.json").write_text(json.dumps(TARGETS))
    (tmp_path / "smoke.json").write_text(json.dumps({**synthetic, "smoke": True}))
    assert "Not measured yet" in benchmarks.rendered_page(tmp_path)
    assert "Synthetic" not in benchmarks.rendered_page(tmp_path)
    assert "| target on one | H100 | H200 |" in benchmarks.rendered_page(tmp_path)


def test_an_h200_is_held_to_its_own_targets(synthetic, tmp_path):
    synthetic["parts"]["machine"]["device"] = "NVIDIA H200"
    synthetic["parts"]["step"]["records"].append(
        {"name": "llama-7b, fp32 states", "tokens_per_s": 22600.0, "peak_gib": 131.0}
    )
    (tmp_path / "h200.json").write_text(json.dumps(synthetic))
    text = benchmarks.rendered_page(tmp_path)
    assert "| measured | target on one H200 |" in text
    assert "| the same with prefix sharing, fp32 states | **22,600** | ≥ 22,000 |" in text
    assert "s=8192, forward: TFLOP/s (cuDNN on an H200) | not measured | ≥ 644 |" in text
    assert "FlashAttention-3 on an H100" not in text and "| its peak memory, GiB | " not in text


def test_targets_name_what_is_measured():
    """A row that selects nothing would read "not measured" for ever."""
    from kernels.measure import cases as bench_cases
    from scripts.step import bench, breakdown, ranks

    names = {"step": bench.VARIANTS, "profile": breakdown.PROFILED, "ranks": ranks.VARIANTS}
    cases = list(bench_cases.full_cases())
    for row in TARGETS["rows"]:
        if "part" in row:
            assert row["name"] in names[row["part"]], row
            continue
        assert row.get("card", "H200") in TARGETS["cards"]
        chosen = [c for c in cases if c.op == row["op"] and c.shape == row.get("shape", c.shape)]
        assert chosen and all(row.get("pass", c.passes[0]) in c.passes for c in chosen), row


@pytest.mark.parametrize("wrong", [None, "README", "PAGE"])
def test_figures_that_are_not_those_of_the_files_are_told(wrong, tmp_path, monkeypatch, call_main):
    """And left as they are."""
    for name in ("README", "PAGE"):
        monkeypatch.setattr(benchmarks, name, tmp_path / name)
    (tmp_path / "README").write_text(f"a\n{benchmarks.START}old{benchmarks.END}b\n")
    monkeypatch.setattr(benchmarks, "rendered_table", lambda: "table\n")
    monkeypatch.setattr(benchmarks, "rendered_page", lambda: "page\n")
    call_main(benchmarks)
    assert (tmp_path / "README").read_text() == f"a\n{benchmarks.START}table\n{benchmarks.END}b\n"
    if wrong:
        path = tmp_path / wrong
        path.write_text(path.read_text().replace("table\n", "other\n").replace("page\n", "other\n"))
    before = {name: (tmp_path / name).read_text() for name in ("README", "PAGE")}
    found = call_main(benchmarks, "--check")
    assert bool(found) == bool(wrong) and (not wrong or wrong in found)
    assert before == {name: (tmp_path / name).read_text() for name in before}


def test_each_section_says_on_what_and_when_it_was_measured(tmp_path, monkeypatch):
    figures = {"date": "2000-01-02", "cpu": "a chip", "cores": 3, "torch": "9.9"}
    measurement = benchmarks.Measurement("x", "A title", "the command", lambda found: ["about"])
    monkeypatch.setattr(benchmarks, "MEASUREMENTS", (measurement,))
    (tmp_path / "x.json").write_text(json.dumps(figures))
    page = benchmarks.rendered_page(tmp_path)
    assert "## A title\n\nabout\n" in page and "the command" in page
    assert "Measured on 2000-01-02: cpu a chip, cores 3, torch 9.9." in page


def test_our_speed_stands_beside_the_peers_once_a_gpu_is_measured(synthetic, tmp_path):
    assert "not yet measured" in benchmarks.rendered_table(tmp_path)
    (tmp_path / "gpu.json").write_text(json.dumps(synthetic))
    table = benchmarks.rendered_table(tmp_path)
    assert "| 22,500 | 7,500 | 3.00 |" in table and "not yet measured" not in table


def test_the_worst_loss_of_any_micro_batch_counts():
    found = {"worst_relative_difference": {"1": {"loss": 1e-7}, "2": {"loss": 3e-7}, "4": {"loss": 2e-7}}}
    assert benchmarks.worst_loss(found) == 3e-7


@pytest.mark.parametrize(
    ("value", "told"),
    [(99.99, "**99.99**"), (100.0, "**100**"), (99, "**99**"), (1234.5, "**1,234**"), (7.0, "**7.00**"), (6.99, "6.99"),
     ("failed", "failed"), (None, "not measured"), (0, "0")],
)  # fmt: skip
def test_a_figure_is_bold_where_its_target_is_reached_and_whole_from_100_on(value, told, monkeypatch):
    monkeypatch.setattr(gpu_table, "find_figure", lambda parts, row: value)
    assert gpu_table.format_target({}, {"what": "speed", "at_least": 7}) == f"| speed | {told} | ≥ 7 |"
    if isinstance(value, float):
        is_met = value <= 7
        plain = told.strip("*")
        assert gpu_table.format_target({}, {"what": "s", "at_most": 7}) == (
            f"| s | {f'**{plain}**' if is_met else plain} | ≤ 7 |"
        )


def test_an_op_without_a_formula_or_a_bound_has_no_block_for_it(monkeypatch):
    record = {"op": "rope", "kernel": "k", "case": "c", "tile": {"A": 1}, "triton": "3.10", "chip": "sm_90"}
    data = {"versions": {"3.9": {"a": "1"}, "3.10": {"a": "2", "b": "3"}}, "records": [record]}
    for formula, bound in ((None, ""), ("    y = x", "Bound by memory.")):
        monkeypatch.setattr(kernels_page, "read_docstring", lambda op, f=formula, b=bound: ("First.", f, b))
        monkeypatch.setattr(kernels_page, "format_row", lambda group, versions: f"| row of {versions} |")
        monkeypatch.setattr(kernels_page, "render_simulated", lambda op, simulated: [f"executed {op}"])
        page = kernels_page.render(data, {"versions": {"3.10": {}, "3.9": {}}})
        body = page.partition("## rope\n")[2]
        blocks = [f"```text\n{formula}\n```\n\n{bound}\n"] if formula else []
        assert body.startswith("\n".join(["", "First.\n", *blocks, "| kernel | case"])) and "None" not in body
        assert body.endswith("| row of ['3.9', '3.10'] |\nexecuted rope\n")
        assert "Triton 3.9 (ptxas 1); Triton 3.10 (ptxas 2, 3)." in page and "by Triton 3.9, 3.10." in page


FIGURES = json.loads(
    Path(__file__).with_name("figures.json").read_text()
)  # of each measurement, small and all different
SECTIONS = [m for m in benchmarks.MEASUREMENTS if m.figures in FIGURES]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.figures)
def test_a_section_and_a_row_say_which_figure_is_which(section, snapshot):
    figures = FIGURES[section.figures]
    row = " | ".join(section.row(figures)) if section.row else ""
    lines = [f"# {section.title} #{section.anchor}", section.command, row, *section.about(figures)]
    assert "\n".join([*lines, *benchmarks.machine(figures)]) == snapshot


def test_every_kind_of_section_has_figures():
    without = {m.figures for m in benchmarks.MEASUREMENTS} - set(FIGURES)
    assert without == {"cpu_speed_amx", "cpu_speed_fp32"}  # as cpu_speed
