"""The static gate passes what ships, under the installed Triton and the GPU machines' 3.6, and can refuse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from kernels import static
from kernels.compiled import machine_code as sass
from kernels.compiled.launch_cases import Case, all_cases
from kernels.ops import common

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "static.json"
OTHER = Path(sys.prefix) / "triton-3.6"  # put there by `make test`


def start(*command, path=()):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def gates():
    """The gate under both Tritons at once, one core each."""
    command = ("kernels.static", "--check", str(RECORDS), "--workers", "1")
    running = {"installed": start(*command)}
    if OTHER.exists():
        running["3.6"] = start(*command, path=[OTHER])
    yield running
    for process in running.values():
        process.kill()


@pytest.fixture(scope="module")
def refused():
    """What the gate says of tests/helpers/gate_kernels.py."""
    out, err = start("tests.gate_kernels").communicate(timeout=250)
    assert out, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_what_ships_passes(gates, version):
    if version not in gates:
        pytest.skip(f"needs Triton 3.6 in {OTHER}: pip install --no-deps --target {OTHER} triton==3.6.0")
    out, err = gates[version].communicate(timeout=280)
    assert gates[version].returncode == 0, err[-4000:]
    if version == "3.6":
        assert "Triton 3.6.0" in out


# ---- it can refuse --------------------------------------------------------------------------------------------------

CHIPS = ("sm_80", "sm_90", "sm_100")
REFUSALS = {
    "copy, unaligned pointer": {("wide", chip) for chip in CHIPS},
    "copy, every other element": {("wide", chip) for chip in CHIPS},
    "sum, few registers": {("stack", chip) for chip in CHIPS},
    "matmul in fp32": {("matrix", chip) for chip in CHIPS},
    "matmul, 16 rows": {("matrix", "sm_90"), ("matrix", "sm_100")},  # too few for HGMMA: HMMA, as on sm_80
    "matmul, many stages": {("shared", chip) for chip in CHIPS},
    "matmul, refused": {("compiles", chip) for chip in CHIPS},
}


def test_a_bad_kernel_is_refused_by_its_rule_and_a_good_one_is_not(refused):
    found = {}
    for violation in refused["violations"]:
        found.setdefault(violation["case"], set()).add((violation["rule"], violation["chip"]))
    found["matmul, many stages"].discard(("stack", "sm_80"))  # it may spill as well
    assert found == REFUSALS
    good = {record["case"] for record in refused["records"]} - set(REFUSALS)
    assert good == {"copy", "sum", "matmul"}


def test_a_violation_names_kernel_chip_rule_and_numbers(refused):
    shared = next(v for v in refused["violations"] if v["rule"] == "shared" and v["chip"] == "sm_90")
    text = str(static.Violation(**shared))
    assert text == "gate matmul sm_90 matmul, many stages: shared: got 393216 bytes; wanted at most 232448"


def test_records_hold_what_the_code_shows(refused):
    records = {(r["case"], r["chip"]): r for r in refused["records"]}
    copy = records["copy", "sm_90"]
    assert copy["bytes_per_element"] == 4.01 and copy["spills"] == 0 and (copy["wide"], copy["narrow"]) == (4, 1)
    assert copy["tile"] == {"BLOCK": 2048} and copy["num_warps"] == 4 and copy["from"] == "fixed"
    kinds = [set(records["matmul", chip]["matrix"]) for chip in CHIPS]
    assert kinds == [{"HMMA"}, {"HGMMA"}, {"UTCHMMA"}]
    spilled = records["sum, few registers", "sm_90"]
    said = next(v for v in refused["violations"] if v["case"] == spilled["case"] and v["chip"] == "sm_90")["got"]
    stack, instructions, in_loops = map(int, re.findall(r"\d+", said))
    assert (stack, instructions) == (spilled["stack_bytes"], spilled["spills"]) and 0 < in_loops < instructions


def test_a_launch_table_entry_that_no_case_launches_is_reported():
    table = {
        "forward": {"sm_90": {"64": {"num_warps": 4, "from": "static"}, "128": {"num_warps": 8, "from": "static"}}}
    }
    found = static.unused({("op", "forward", "sm_90", "64")}, {"op": table}, ("sm_80", "sm_90"))
    assert [str(v).split(":")[0] for v in found] == ["op forward sm_90 size 128"]


def test_an_operator_that_no_case_launches_is_reported():
    cases = [case for case in all_cases() if "backward" not in case.label]
    found = [violation.op for violation in static.unplayed(cases, static.operators())]
    assert "cria::rms_norm_backward" in found and "cria::rms_norm_forward" not in found
    assert static.unplayed(all_cases(), static.operators()) == []


def test_it_does_not_run_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "kernels.static"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1 and "TRITON_INTERPRET is set" in done.stderr


# ---- reading --------------------------------------------------------------------------------------------------------


def test_programs_per_sm():
    def programs(registers, warps, shared_kb, chip, columns=0):
        return sass.programs_per_sm(sass.Facts(registers, 0, shared_kb * 1024, warps, columns), chip)

    assert programs(32, 4, 0, "sm_90") == 16  # 64 warps
    assert programs(16, 1, 0, "sm_90") == 32  # 32 blocks
    assert programs(128, 8, 0, "sm_90") == 2  # registers
    assert programs(104, 1, 0, "sm_80") == 16  # 19 but for the 4 partitions
    assert programs(33, 2, 0, "sm_80") == 24  # registers come in eights
    assert [programs(32, 4, 100, chip) for chip in CHIPS] == [1, 2, 2]  # shared memory
    assert programs(32, 4, 113, "sm_90") == 2 and programs(32, 4, 114, "sm_90") == 1  # and the KB reserved
    assert programs(32, 4, 0, "sm_100", columns=256) == 2


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/                   LDL R2, [R1] ;
.L_x_0:
        /*0020*/              @!P2 LDG.E.128 R20, desc[UR20][R2.64] ;
        /*0030*/                   STL.64 [R1], R2 ;
        /*0040*/              @P0  BRA `(.L_x_1) ;
        /*0050*/              @!UP0 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   STG.E.U16 desc[UR20][R2.64], R5 ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""


def test_loops_are_what_lies_between_a_backward_branch_and_its_target():
    code = sass.instructions(SASS)
    assert [op for op, looped in code if looped] == ["LDG.E.128", "STL.64", "BRA", "BRA"]
    assert [op for op, looped in code if not looped] == ["LDC", "LDL", "STG.E.U16", "EXIT", "BRA"]


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [
        ("LDG.E.128", 128), ("LDG.E.128.CONSTANT", 128), ("LDG.E", 32), ("LDG.E.64", 64), ("LDG.E.U16", 16),
        ("LDG.E.LTC128B", 32), ("STG.E.U8", 8), ("LDGSTS.E.BYPASS.128", 128), ("LDGSTS.E", 32), ("UTMALDG.2D", 128),
        ("LDG.E.ENL2.256", 256),
    ],
)  # fmt: skip
def test_the_width_of_an_access(opcode, bits):
    assert sass.bits(opcode) == bits


PTX = """
	.loc	1 86 9
	// begin inline asm
	.loc	1 86 9
	mov.u32 %r1, 0x0;
	.loc	1 87 9
	mov.u32 %r2, 0x0;
	@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
	// end inline asm
	// begin inline asm
	cp.async.cg.shared.global [ %r9 + 0 ], [ %rd1 + 0 ], 0x10, %r8;
	// end inline asm
	.loc	2 7 5, $L__info_string0, inlined_at 1 90 4
	st.global.v4.b32 	[%rd7], {%r25, %r26, %r27, %r28};
	@%p1 st.global.L1::evict_last.b16 [ %rd7 + 0 ], { %rs1 };
	.file	1 "/a.py"
	.file	2 "/b.py"
"""


def test_an_access_belongs_to_the_line_where_its_assembly_begins():
    assert list(sass.accesses(PTX)) == [
        (("a.py", 86), False, 64),
        (("a.py", 86), False, 128),
        (("b.py", 7), True, 128),
        (("b.py", 7), True, 16),
    ]


TTGIR = """
#loc = loc("/a.py":80:0)
#loc2 = loc("/elsewhere/a.py":86:9)
#loc3 = loc("x"(#loc2))
#loc4 = loc(callsite(#loc5 at #loc2))
#loc5 = loc("/b.py":7:5)
#loc6 = loc("/b.py":9:5)
    %x_16 = tt.load %x_15, %mask_4, %cst : tensor<32x64x!tt.ptr<bf16>, #blocked> loc(#loc3)
    %rstd_21 = tt.load %rstd : !tt.ptr<f32> loc(#loc3)
    tt.store %10, %11, %mask_4 : tensor<4096x!tt.ptr<f32>, #blocked> loc(#loc4)
    tt.store %12, %11 : tensor<16x!tt.ptr<i8>, #blocked> loc(#loc6)
"""


def test_a_stream_is_as_narrow_as_its_narrowest_access():
    assert sass.streams(TTGIR, PTX) == [
        sass.Stream(86, False, 2048, 2, 64),
        sass.Stream(7, True, 4096, 4, 16),
        sass.Stream(9, True, 16, 1, 0),  # of which PTX shows nothing
    ]


# ---- launch tables and records --------------------------------------------------------------------------------------


def test_the_entries_read_are_noted():
    read = []
    table = static.ReadTable(common.launch_table("rms_norm"), lambda path, values: read.append(path), ("rms_norm",))
    with static.patched(common, launch_table=lambda op: table, chip_override="sm_90"):
        config = common.launch_config("rms_norm", "forward", None, 2048)
    size = next(key for key in common.launch_table("rms_norm")["forward"]["sm_90"] if int(key) >= 2048)
    assert read == [("rms_norm", "forward", "sm_90", size)] and "from" not in config


def test_records_of_other_versions_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "static.json"
    monkeypatch.setattr(static, "ptxas_versions", lambda: {"ptxas": "1.2"})

    def record(case, registers):
        fields = {"op": "o", "kernel": "k", "case": case, "chip": "sm_90", "triton": triton.__version__, "tile": {}}
        return fields | {"registers": registers}

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    static.save(path, [record("b", 1), record("a", 2)])
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert static.stale(path, []) == []
    static.save(path, [record("a", 3)])
    once = path.read_text()
    static.save(path, [record("a", 3)])
    assert path.read_text() == once
    data = json.loads(once)
    assert [(r["case"], r["triton"], r["registers"]) for r in data["records"]] == [
        ("a", "3.6.0", 2),
        ("a", "3.9.0", 3),
        ("b", "3.6.0", 1),
    ]
    assert set(data["versions"]) == {"3.6.0", "3.9.0"}
    assert static.stale(path, [record("a", 3)]) == []
    assert [line[0] for line in static.stale(path, [record("a", 4)])] == ["-", "+"]


def test_a_triton_without_records_is_judged_and_not_compared(tmp_path):
    path = tmp_path / "static.json"
    path.write_text('{"versions": {"1.0": {}}, "records": []}')
    command = ("kernels.static", "--op", "rope", "--chip", "sm_90", "--workers", "1", "--check", str(path))
    process = start(*command)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and f"holds no records of Triton {triton.__version__}" in out, err
    path.write_text(f'{{"versions": {{"{triton.__version__}": {{}}}}, "records": []}}')
    process = start(*command)
    assert "is stale" in process.communicate(timeout=120)[1] and process.returncode == 1


def test_of_launches_compiled_alike_the_largest_is_recorded():
    records = json.loads(RECORDS.read_text())["records"]  # the gate's, as test_what_ships_passes sees to
    read = {r["case"]: r["bytes_per_element"] for r in records if r["kernel"] == "_partial_kernel"}
    assert read == {"bf16": 2.0, "fp32": 4.0}  # of the last gradient, a small one, the partial sums would be the most


def test_case_labels_are_unique():
    labels = [(case.op, case.label) for case in all_cases()]
    assert len(set(labels)) == len(labels)
    assert all(isinstance(case, Case) for case in all_cases())
