"""Reading machine code: occupancy, loops, widths of accesses, streams."""

from types import SimpleNamespace

import pytest

from kernels.compiled import machine_code

CHIPS = tuple(machine_code.CHIPS)


def test_programs_per_sm():
    def programs(registers, warps, shared_kb, chip, columns=0):
        return machine_code.programs_per_sm(machine_code.Facts(registers, 0, shared_kb * 1024, warps, columns), chip)

    assert programs(32, 4, 0, "sm_90") == 16  # 64 warps
    assert programs(16, 1, 0, "sm_90") == 32  # 32 blocks
    assert programs(128, 8, 0, "sm_90") == 2  # registers
    assert programs(104, 1, 0, "sm_80") == 16  # 19 but for the 4 partitions
    assert programs(33, 2, 0, "sm_80") == 24  # registers come in eights
    assert [programs(32, 4, 100, chip) for chip in CHIPS] == [1, 2, 2]  # shared memory
    assert programs(32, 4, 113, "sm_90") == 2 and programs(32, 4, 114, "sm_90") == 1  # and the KB reserved
    assert programs(32, 4, 45, "sm_90") == 4  # 5 without it
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
    code = machine_code.parse_instructions(SASS)
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
    assert machine_code.access_bits(opcode) == bits


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
    assert list(machine_code.find_accesses(PTX)) == [
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
    assert machine_code.find_streams(TTGIR, PTX) == [
        machine_code.Stream(86, False, 2048, 2, 64),
        machine_code.Stream(7, True, 4096, 4, 16),
        machine_code.Stream(9, True, 16, 1, 0),  # of which PTX shows nothing
    ]


# ---- a whole kernel, with stand-ins for NVIDIA's programs -----------------------------------------------------------

TTIR = """
  tt.func public @k(%x: !tt.ptr<f32> {}, %out: !tt.ptr<f32>, %n: i32, %spare: !tt.ptr<f32>) attributes {} {
    %0 = tt.splat %x : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>>
    %1:2 = scf.for %i = %c0 to %n step %c1 iter_args(%p = %0, %q = %out) -> (tensor, !tt.ptr<f32>) {
      %2 = tt.load %p : tensor<64x!tt.ptr<f32>>
      %3 = tt.addptr %p, %c : tensor<64x!tt.ptr<f32>>, tensor<64xi32>
      scf.yield %3, %q : tensor<64x!tt.ptr<f32>>, !tt.ptr<f32>
    }
    tt.store %1#1, %4 : !tt.ptr<f32>
"""


def test_the_pointers_that_are_loaded_from_and_stored_to():
    """Followed through loops to the arguments; of those that are no pointers, or not used, none."""
    assert machine_code.find_touched_arguments(TTIR) == ([0], [1])
    assert machine_code.find_touched_arguments("") == ([], [])
    assert machine_code._follow_back(["a"], {"a": ["b", "c"], "c": ["a", "d"], "d#0": ["e"]}) == set("abcde")


def made(**more):
    texts = {
        "cubin": b"code", "ptx": ".reqntid 384\n" + PTX, "ttir": TTIR,
        "ttgir": TTGIR + "tt.dot x\nttng.warp_group_dot y\nttng.tc_gen5_mma z\ntt.dots\n",
    }  # fmt: skip
    return SimpleNamespace(asm=texts | more, metadata=SimpleNamespace(shared=4096, num_warps=8, tmem_size=128))


USAGE = "Resource usage:\n Function k:\n  REG:77 STACK:16 SHARED:0 LOCAL:0"


def test_the_facts_of_a_compiled_kernel(monkeypatch):
    """Warps are those of the PTX, where warps are specialised; each fact is of its own text."""
    asked = []

    def run(program, *arguments):
        with open(arguments[-1], "rb") as file:
            asked.append((str(program), arguments[:-1], file.read()))
        return USAGE if len(asked) % 2 else SASS

    monkeypatch.setattr(machine_code, "_run", run)
    monkeypatch.setattr(machine_code, "find_unordered", lambda ptx: [f"{len(ptx)} characters"])
    kernel = made()
    facts = machine_code.read_facts(kernel)
    assert (facts.registers, facts.stack_bytes, facts.shared_bytes, facts.warps, facts.tensor_columns) == (
        77,
        16,
        4096,
        12,
        128,
    )
    assert (facts.dots, facts.loaded, facts.stored) == (3, [0], [1])
    assert facts.streams == machine_code.find_streams(TTGIR, PTX)
    assert facts.unordered == [f"{len(kernel.asm['ptx'])} characters"]
    counted = facts.instructions, facts.alu, facts.spills, facts.spills_in_loops, facts.wide, facts.narrow
    assert counted == (9, 0, 2, 1, 1, 1)
    programs = [(machine_code.knobs.nvidia.cuobjdump.path, ("--dump-resource-usage",), b"code"),
                (machine_code.knobs.nvidia.nvdisasm.path, ("-c", "-ndf"), b"code")]  # fmt: skip
    assert asked == [(str(path), flags, code) for path, flags, code in programs]
    plain = made(ptx=PTX)
    plain.metadata = SimpleNamespace(shared=0, num_warps=8)
    facts = machine_code.read_facts(plain)
    assert (facts.warps, facts.tensor_columns) == (8, 0)
    monkeypatch.setattr(machine_code, "_run", lambda *_: "nothing")
    with pytest.raises(RuntimeError, match="cuobjdump shows no registers, wanted a line with REG: and STACK:\nnothing"):
        machine_code.read_facts(made())


def test_instructions_are_counted_by_their_pipes():
    facts = machine_code.Facts(1, 0, 0, 4)
    in_loops = "IADD3.X", "LDL.64", "HGMMA.64x8", "FFMA", "LDGSTS.E"
    beside = "NOP", "STL", "UTCHMMA", "LDG.E.64", "STG.E.128", "UBLKCP"
    code = [(name, True) for name in in_loops] + [(name, False) for name in beside]
    machine_code._count(code, facts)
    assert (facts.instructions, facts.alu, facts.spills, facts.spills_in_loops) == (10, 1, 2, 1)
    assert (facts.matrix, facts.matrix_in_loops) == ({"HGMMA": 1, "UTCHMMA": 1}, {"HGMMA": 1})
    assert (facts.wide, facts.narrow) == (2, 2)
    assert str(machine_code.Stream(7, True, 64, 4, 32)) == "the store of 64 elements in line 7"
    assert str(machine_code.Stream(9, False, 32, 4, 32)) == "the load of 32 elements in line 9"
