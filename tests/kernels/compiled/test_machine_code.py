"""Reading machine code: occupancy, loops, widths of accesses, streams."""

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
