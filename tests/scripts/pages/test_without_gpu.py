"""The sections about kernels without a GPU: lines, sums over records, and launches before and now."""

from scripts.pages import without_gpu
from scripts.pages.without_gpu import paragraph


def test_a_paragraph_has_lines_of_118_columns_and_keeps_words_whole():
    assert paragraph("a" * 58 + " " + "b" * 59 + " c") == "a" * 58 + " " + "b" * 59 + "\nc"
    assert paragraph("x" * 130 + " a-b") == "x" * 130 + "\na-b"
    assert paragraph("a" * 115 + " b-cd") == "a" * 115 + "\nb-cd"


def test_chips_stand_by_their_number():
    records = [{"chip": chip, "triton": triton, "spills": n} for chip, triton, n in
               (("sm_100", "3.6", 1), ("sm_80", "3.7", 2), ("sm_90", "3.6", 4))]  # fmt: skip
    assert without_gpu.static({"records": records})[1:] == [
        "", "| | |", "|---|---|", "| chips | sm_80, sm_90, sm_100 |", "| Triton | 3.6, 3.7 |", "| compilations | 3 |",
        "| spills | 7 |",
    ]  # fmt: skip


def test_each_op_is_told_by_its_worst_case():
    record = lambda op, ratio, **more: {  # noqa: E731
        "op": op, "ratio": ratio, "chip": "sm_90", "wrong": [], "n_findings": 0, "error": ratio / 8,
        "torch_error": 0.125, "worst": "dx", "case": f"case {ratio}", "dtype": "bf16",
    } | more  # fmt: skip
    records = [record("rope", 1.5, wrong=["a"]), record("rope", 0.5, n_findings=3), record("adamw", 0.25, chip="sm_80")]
    lines = without_gpu.simulated({"records": records, "versions": {"3.7": 0, "3.6": 0}})
    assert lines[4:] == [
        "| chips | sm_80, sm_90 |", "| Triton | 3.6, 3.7 |", "| executed cases, each twice | 3 |",
        "| results beyond that | 1 |", "| findings: races, missing waits, accesses out of bounds | 3 |", "",
        "| op | cases | largest error beside torch's: ours | torch | of |", "|---|---|---|---|---|",
        "| adamw | 1 | 0.031 | 0.12 | dx of case 0.25, bf16 |", "| rope | 2 | 0.19 | 0.12 | dx of case 1.5, bf16 |",
    ]  # fmt: skip


def test_launches_stand_beside_those_of_before_by_bytes():
    count = lambda n, gb, g=0.0: {"launches": n, "bytes": gb * 1e9, "instructions": g * 1e9}  # noqa: E731
    before = {"kinds": {"a": count(1, 2), "b": count(3, 4, 0.5), "gone": count(9, 1)}, "all": count(13, 7, 0.5)}
    now = {"kinds": {"a": count(2, 3), "b": count(4, 1, 0.25), "new": count(7, 7)}, "all": count(13, 11, 0.25),
           "variant": {"model": "m"}, "chip": "sm_90"}  # fmt: skip
    lines = without_gpu.step_launches({"records": {"before": before, "now": now, "other": {}}})
    assert lines[0].startswith("One step of m on sm_90: ") and lines[4:] == [
        "| b | 3 | 4 | 4.0 | 1.0 | 0.50 | 0.25 |", "| a | 1 | 2 | 2.0 | 3.0 | - | - |",
        "| gone | 9 | 0 | 1.0 | 0.0 | - | - |", "| all | 13 | 13 | 7.0 | 11.0 | 0.50 | 0.25 |",
    ]  # fmt: skip
