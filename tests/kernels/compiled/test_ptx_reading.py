"""What of PTX the machine reads and what it refuses, and how a launch hands its arguments over."""

import pytest
import torch

from kernels.compiled import ptx as ptx_module
from kernels.compiled.ptx import Module, PtxError
from tests.helpers.hand_ptx import make_kernel

# ---- reading --------------------------------------------------------------------------------------------------------

HEAD = ".version 8.7\n.target sm_90\n.address_size 64\n"
WRONG = {
    "no directive": "\nhello there\n", "no end": HEAD + ".visible .entry k() {\nadd.s32 %r1, %r1, 1;\n",
    "no body": HEAD + ".visible .entry k()\n.maxntid 32, 1, 1\n",
    "no register": HEAD + ".entry k() {\n add.s32 %r1, %r1, 1;"
    " }", "a width": HEAD + ".entry k() { .reg .b64 %d; .reg .b32 %r;\nadd.s32 %r, %d, 1; }",
    "a result's width": HEAD + ".entry k() { .reg .b64 %d; .reg .b32 %r;\nadd.s32 %d, %r, 1; }",
    "no operands": HEAD + ".entry k() { bar.sync; }",
    "a label": HEAD + ".entry k() {\n\nbra NOWHERE; }", "a guard": HEAD + ".entry k() { .reg .b32 %r;"
    " @%p bra L; L: }",
    "a guard of numbers": HEAD + ".entry k() { .reg .b32 %r; @%r bra L; L: }",
    "an address": HEAD + ".entry k() { .reg .b32 %r; ld.global.b32 %r, %r; }",
    "an unknown address": HEAD + ".entry k() { .reg .b32 %r; ld.global.b32 %r, [nowhere+4]; }",
    "a type": HEAD + ".entry k() { .reg .b24 %r; }", "both kinds of shared memory": HEAD
    + ".shared .b8 a[4];\n.extern .shared .b8 b[];\n.entry k() { ret; }",
    "no number": HEAD + ".entry k() { .reg .b32 %r; cp.async.ca.shared.global [%r], [%r], %r; }",
    "a modifier": HEAD + ".entry k() { .reg .b32 %r; add.sat.s32 %r, %r, %r;"
    " }", "an opcode": HEAD + ".entry k() { frob.b32 %r; }",
    "rz of ftz": HEAD + ".entry k() { .reg .f32 %f; add.rz.ftz.f32 %f, %f, %f; }",
}  # fmt: skip


def test_what_is_no_ptx_is_refused_with_its_line(snapshot):
    told = []
    for name, text in WRONG.items():
        with pytest.raises(PtxError) as refused:
            Module(text)
        told.append(f"{name}: {refused.value}")
    assert "\n".join(told) + "\n" == snapshot


UNKNOWN = """cvt.rn.s32.f32 %r1, %f1|cvt.f32.s32 %f1, %r1|cvt.sat.s32.s32 %r1, %r2|cvt.rna.f32.f32x %f1, %f2
cvt.rz.bf16.f32 %h1, %f1|cvt.rn.bf16x2.f16x2 %r1, %r2|cvt.rn.e4m3x2.f32 %h1, %f1, %f2
cvt.rn.satfinite.bf16x2.f32 %r1, %f1, %f2|mul.hi.u16 %h1, %h1, %h2|mul.wide.u64 %d1, %d1, %d2
mad.hi.u64 %d1, %d1, %d2, %d1|popc.u32 %r1, %r2|shf.l.clamp.b32 %r1, %r1, %r2, %r3|copysign.f64 %d1, %d1, %d2
setp.foo.s32 %p1, %r1, %r2|setp.lt.b8 %p1, %h1, %h2|shfl.sync.b32 %r1, %r2, 1, 31, -1
redux.sync.mul.s32 %r1, %r2, -1|vote.sync.some.pred %p1, %p2, -1|match.sync.b32 %r1, %r2, -1|elect.sync %p1, -1
redux.sync.add.f32 %r1, %r2, -1|atom.global.add.b32 %r1, [%d1], %r2|atom.global.min.f32 %f1, [%d1], %f2
atom.global.and.u32 %r1, [%d1], %r2|atom.global.cas.b32 %r1, [%d1], %r2|ld.global.v2.b32 {%r1}, [%d1]
mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r1, %r2}, {%r3}, {%r1, %r2}
ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r1, %r2, %r3}, [%r1]
mma.sync.aligned.m16n8k16.row.col.f32.tf32.tf32.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2,%r3,%r4}
stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r1], {%r2}|mbarrier.frob.shared.b64 [%r1], 1|wgmma.frob.sync.aligned
bar.frob 0|cp.frob [%r1]|cp.async.bulk.shared::cta.global [%r1], [%d1], 16
cp.reduce.async.bulk.global.shared::cta.bulk_group.mul.f32 [%d1], [%r1], 16
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.e4m3 [%d1], [%r1], 16
tensormap.replace.tile.frob.shared::cta.b1024.b32 [%r1], %r2
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%d1], [%r1], 64
mov.b16 {%h1, %h2}, {%h1, %h2}|fence.frob|add.rm.f64 %d1, %d1, %d2|div.rz.f32 %f1, %f1, %f2|not.b8 %h1, %h2
bfe.b32 %r1, %r2, 1, 2|cvta.frob.u64 %d1, %d2|trap.frob|mov.b32 %r1, %r2, %r3|mov.pred %p1
tensormap.replace.tile.rank.const.b1024.b32 [%r1], %r2"""


def test_instructions_that_the_machine_does_not_know_are_refused():
    registers = ".reg .b32 %r<9>; .reg .b64 %d<9>; .reg .b16 %h<9>; .reg .f32 %f<9>; .reg .pred %p<9>;"
    for line in UNKNOWN.replace("\n", "|").split("|"):
        with pytest.raises(PtxError):
            Module(f"{HEAD}.entry k() {{ {registers} {line}; }}")
            raise AssertionError(line)


def test_comments_sections_and_functions_are_passed_over():
    text = """// .version 1
.version 8.7
/* of
several lines */
.target sm_90, debug
.address_size 64
.file 1 "a/b.py"
.file 2 "c.py"
.func (.param .b32 r) helper(.param .b32 a) { { frob; } }
.extern .func other(.param .b32 a);
.section .debug_info { .b8 1, { 2 } }
.visible .entry first(.param .u64 p0) .maxntid 32, 1, 1
.minnctapersm 1
{ .reg .b64 %a; .reg .b32 %r<3>; .pragma "nounroll";
ld.param.b64 %a, [p0]; // one
.loc 1 7 3, function_name $x, inlined_at 2 5 1
mov.u32 %r1, /* seven */ 7;
$L__1:
st.global.b32 [%a+4], %r1; }
.visible .entry second() .maxntid 32, 1, 1 { ret; }
.visible .entry third(.param .u32 p);
"""
    module, out = Module(text), torch.zeros(2, dtype=torch.int32)
    assert module.params == {"first": [8], "second": []}
    assert not module.launch(None, 1, (out,), block=(1,)).findings and out.tolist() == [0, 7]
    (finding,) = module.launch("first", 1, (out[:1],), block=(1,)).findings
    assert (finding.where, finding.line, finding.instruction) == ("b.py:7 in c.py:5", 19, "st.global.b32")


# ---- the launch in Python -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arg", "size", "want"),
    [(1.5, 2, "003e"), (1.5, 4, "0000c03f"), (1.5, 8, "000000000000f83f"), (-1, 2, "ffff"),
     (True, 1, "01"), (None, 8, "00" * 8),
     (b"\\1\\2", 4, "5c315c32"), (258, 4, "02010000"), (2**40 + 7, 4, "07000000")],
)  # fmt: skip
def test_an_argument_takes_the_width_of_its_parameter(arg, size, want):
    assert ptx_module._as_parameter("k", arg, size).raw.hex() == want


def test_sizes_are_of_three_axes_and_a_launch_is_timed_on_its_own_clock():
    assert [list(ptx_module._three(shape)) for shape in (4, (2,), (2, 3), [2, 3, 5])] == [
        [4, 1, 1], [2, 1, 1], [2, 3, 1], [2, 3, 5],
    ]  # fmt: skip
    module = make_kernel("", params=0)
    result = module.launch("k", (2, 3), ())
    assert (result.kernel, result.ptx, result.findings, result.slow) == ("k", module.ptx, [], [])
    assert result.counters["blocks"] == 6 and result.counters["lanes"] % (6 * 128) == 0 and 0 <= result.seconds < 5
    result = module.launch("k", 1, (), num_warps=3)
    assert result.counters["lanes"] % 96 == 0 and result.counters["lanes"] // 96 == result.counters["instructions"] // 3
