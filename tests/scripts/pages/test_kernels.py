"""docs/kernels.md: cells of chips that differ or lack a record, counters, and the section of CUDA C++."""

import pytest

from scripts.pages import kernels

RECORD = {
    "kernel": "_rotate_kernel", "case": "c", "tile": {"A": 1, "B": 2}, "num_warps": 4, "num_stages": 2,
    "instructions": 100, "alu": 40, "registers": 32, "shared_bytes": 1536, "programs_per_sm": 3, "matrix": ["HMMA"],
    "wide": 3, "narrow": 1, "bytes_per_element": 2.04, "from": "static, by x", "spills": 0,
}  # fmt: skip


def test_a_row_has_a_number_for_each_chip_where_they_differ():
    """And a dash for a chip or a version that has none."""
    newer = {"sm_90": RECORD | {"registers": 40, "spills": 5}}
    older = {
        "sm_80": RECORD, "sm_90": RECORD | {"num_warps": 8, "matrix": [], "wide": 0, "narrow": 0, "shared_bytes": 0},
        "sm_100": RECORD | {"num_warps": 8, "matrix": ["A", "B"], "registers": 33, "tile": {"A": 7}},
    }  # fmt: skip
    assert kernels.format_row({"1.0": older, "3.0": newer}, ["1.0", "2.0", "3.0"]) == (
        "| `rotate` | c | A=1 B=2 / A=1 B=2 / A=7 | 4 / 8 / 8 | 2 | 100 (40) | 32 / 32 / 33 | - | - / 40 / - | 5 | "
        "2 / 0 / 2 | 3 | HMMA / - / A+B | 75% / 0% / 75% | 2.0 | static |"
    )


def simulated(chip, triton, **more):
    counted = {"kernel": "k", "instructions": 1000, "load_bytes": 64, "load_sectors": 4, "store_bytes": 32,
               "store_sectors": 1, "shared_cycles": 8, "shared_ideal_cycles": 6}  # fmt: skip
    usual = {"dtype": "bf16", "error": 0.0123, "torch_error": 0.0456, "ratio": 0.27, "n_findings": 1, "op": "rope",
             "case": "a", "kernels": [counted, counted | {"instructions": 500}]}  # fmt: skip
    return {"chip": chip, "triton": triton, **usual, **more}


def test_counters_are_of_the_newest_version_and_errors_of_all():
    records = [simulated("sm_80", "3.9"), simulated("sm_90", "3.10", ratio=0.5, error=0.5),
               simulated("sm_80", "3.10", n_findings=4)]  # fmt: skip
    assert kernels.format_simulated_row("name", records, "3.10") == (
        "| name | bf16 | 0.5 / 0.046 | 6 | 2 | 60% | 75% |"
    )  # fmt: skip
    assert kernels.format_simulated_row("name", records[:1], "3.9") == (
        "| name, sm_80 alone | bf16 | 0.012 / 0.046 | 1 | 2 | 60% | 75% |"
    )  # fmt: skip


def test_all_ops_of_a_file_are_in_its_table():
    records = [simulated("sm_80", "3.9", op=op, case=case) for op, case in
               (("swiglu_linear", "b"), ("swiglu", "a"), ("rope", "x"), ("swiglu", "c"))]  # fmt: skip
    found = {"versions": {"3.9": {}}, "records": records}
    names = [line.split(" | ")[0] for line in kernels.render_simulated("swiglu", found)]
    assert names == ["", "| executed", "|---|---|---|---|---|---|---|", "| a, sm_80 alone", "| c, sm_80 alone",
                     "| swiglu_linear b, sm_80 alone"]  # fmt: skip
    assert kernels.render_simulated("rope", found)[-1].startswith("| x, sm_80 alone |")


@pytest.mark.parametrize(("version", "numbers"), [("3.10", [3, 10]), ("3.9.1", [3, 9, 1])])
def test_versions_are_ordered_by_their_numbers(version, numbers):
    assert kernels.order_of_version(version) == numbers


def test_the_section_of_cuda(monkeypatch, snapshot):
    monkeypatch.setattr(kernels, "read_docstring", lambda op: (f"First of {op}.", "    y = x", "Bound by memory."))
    record = {"source": "a.cu", "kernel": "k", "instructions": 10, "registers": 20, "spills": 0, "blocks_per_sm": 2,
              "matrix": [], "wide": 3, "narrow": 4}  # fmt: skip
    records = [
        record | {"chip": "sm_90", "instructions": 11, "matrix": ["A", "B"]}, record | {"chip": "sm_80"},
        record | {"chip": "sm_100", "wide": 0}, record | {"chip": "sm_90", "kernel": "other", "source": "b.cu"},
    ]  # fmt: skip
    simulated_too = {"versions": {"3.9": {}}, "records": [simulated("sm_90", "3.9", op="decode_attention")]}
    assert kernels.render_cuda({"compiler": "nvcc 12", "records": records}, simulated_too) == snapshot


@pytest.mark.parametrize(
    ("doc", "found"),
    [('"""First.\n\n    y = x\n\n    z\n\nMore.\n\nBound by memory.\n\nBound by x\n"""',
      ("First.", "    y = x", "Bound by memory.\n\nBound by x")),
     ('"""First.\n\nNo formula."""', ("First.", None, "")),
     ('"""First.\n\nBound by this:\n\n    a table\n\nMore."""',
      ("First.", "    a table", "Bound by this:\n\n```text\n    a table\n```"))],
)  # fmt: skip
def test_an_ops_docstring_is_read_by_its_paragraphs(doc, found, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "ROOT", tmp_path)
    (tmp_path / "kernels" / "ops").mkdir(parents=True)
    (tmp_path / "kernels" / "ops" / "rope.py").write_text(doc + "\nx = 1\n")
    assert kernels.read_docstring("rope") == found
