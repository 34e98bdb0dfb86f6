"""Recording launches: which entries are read, and which launches are kept."""

import json

from kernels.compiled.launch_cases import Case, all_cases
from kernels.compiled.launches import NotingTable, patched
from kernels.ops import common
from tests.helpers.run import ROOT

RECORDS = ROOT / "benchmarks" / "static.json"


def test_the_entries_read_are_noted():
    read = []
    table = NotingTable(common.launch_table("rms_norm"), lambda path, values: read.append(path), ("rms_norm",))
    with patched(common, launch_table=lambda op: table, chip_override="sm_90"):
        config = common.launch_config("rms_norm", "forward", None, 2048)
    size = next(key for key in common.launch_table("rms_norm")["forward"]["sm_90"] if int(key) >= 2048)
    assert read == [("rms_norm", "forward", "sm_90", size)] and "from" not in config


def test_of_launches_compiled_alike_the_largest_is_recorded():
    records = json.loads(RECORDS.read_text())["records"]  # the gate's, as test_what_ships_passes sees to
    read = {r["case"]: r["bytes_per_element"] for r in records if r["kernel"] == "_partial_kernel"}
    assert read == {"bf16": 2.0, "fp32": 4.0}  # of the last gradient, a small one, the partial sums would be the most


def test_case_labels_are_unique():
    labels = [(case.op, case.label) for case in all_cases()]
    assert len(set(labels)) == len(labels)
    assert all(isinstance(case, Case) for case in all_cases())
