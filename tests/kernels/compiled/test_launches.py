"""Recording launches: which entries are read, and which launches are kept."""

import json
import subprocess
import sys

from kernels.compiled.launch_cases import Case, all_cases
from kernels.compiled.launches import NotingTable, patched
from kernels.ops import common
from tests.helpers.run import ROOT, environment

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
    assert read == {
        "bf16": 2.0,
        "fp32": 4.0,
        "bf16, one gradient's sums": 2.0,
    }  # of the last gradient, a small one, the partial sums would be the most


def test_case_labels_are_unique():
    labels = [(case.op, case.label) for case in all_cases()]
    assert len(set(labels)) == len(labels)
    assert all(isinstance(case, Case) for case in all_cases())


def test_nothing_is_forked_after_cuda_has_begun():
    """CUDA's locks and threads do not survive a fork. Compiles in a process without Triton's interpreter."""
    code = """
import os, torch
from kernels.compiled import launch_cases, launches
def refuse():
    raise AssertionError("forked")
os.fork, torch.cuda.is_initialized = refuse, lambda: True
cases = launch_cases.all_cases(["grad_norm"])[:1]
facts = launches.compile_all(launches.record_launches(cases[0], "sm_90")[:1], workers=1)
print([found.registers > 0 for found in facts])
"""
    env = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.stdout == "[True]\n", done.stderr[-2000:]
