"""Branches, counters and findings on the PTX machine: what a run computes and tells, to the letter."""

import re

import pytest
import torch

from kernels.compiled.ptx import Module, Options
from tests.helpers.hand_ptx import make_kernel

OUT = "mad.wide.u32 %d1, %t, 4, %a0;\n"
STORE = "\nst.global.b32 [%d1], %r1;"

# ---- branches: what each lane computes, from a loop over the lanes --------------------------------------------------


def collatz(lane):
    n, steps = lane + 1, 0
    while n != 1:
        n, steps = (n // 2 if n % 2 == 0 else 3 * n + 1), steps + 1
    return steps


def nested(lane):
    total = 0
    for i in range(lane % 5):
        for j in range(i + lane % 3):
            if (i + j) % 2:
                continue
            total += 1 + j
            if total > 9:
                return total
    return total + 100


BRANCHES = {
    "two ways": (
        "setp.lt.u32 %p1, %t, 11; @%p1 bra LEFT; mov.b32 %r1, 5; bra JOIN; LEFT: mov.b32 %r1, 6;"
    " JOIN: add.s32 %r1, %r1, %t;",
        lambda lane: (6 if lane < 11 else 5) + lane,
    ),
    "one way, negated": (
        "mov.b32 %r1, 1; setp.lt.u32 %p1, %t, 11; @!%p1 bra.uni OVER; add.s32 %r1, %r1, 7;"
    " OVER: shl.b32 %r1, %r1, 1;",
        lambda lane: 16 if lane < 11 else 2,
    ),
    "a loop": (
        """add.u32 %r2, %t, 1; mov.b32 %r1, 0; bra TEST;
        NEXT: and.b32 %r3, %r2, 1; setp.eq.u32 %p1, %r3, 0; @%p1 bra HALF; mad.lo.u32 %r2, %r2, 3, 1; bra DONE;
        HALF: shr.u32 %r2, %r2, 1; DONE: add.u32 %r1, %r1, 1; TEST: setp.ne.u32 %p2, %r2, 1; @%p2 bra NEXT;""",
        collatz,
    ),
    "loops in loops, with a way out of both": (
        """rem.u32 %r10, %t, 5; rem.u32 %r11, %t, 3; mov.b32 %r1, 0; mov.b32 %r2, 0;
        OUTER: setp.ge.u32 %p1, %r2, %r10; @%p1 bra END; mov.b32 %r3, 0; add.u32 %r4, %r2, %r11;
        INNER: setp.ge.u32 %p2, %r3, %r4; @%p2 bra NEXT; add.u32 %r5, %r2, %r3; and.b32 %r5, %r5, 1;
        setp.ne.u32 %p3, %r5, 0; @%p3 bra SKIP; add.u32 %r1, %r1, %r3; add.u32 %r1, %r1, 1;
        setp.gt.u32 %p4, %r1, 9; @%p4 bra OUT; SKIP: add.u32 %r3, %r3, 1; bra INNER;
        NEXT: add.u32 %r2, %r2, 1; bra OUTER; END: add.u32 %r1, %r1, 100; OUT:""",
        nested,
    ),
    "an end within a branch": (
        f"mov.b32 %r1, %t; setp.gt.u32 %p1, %t, 20; @!%p1 bra GO; add.s32 %r1, %r1, 1000; {STORE} exit;"
    f" GO: neg.s32 %r1, %r1;",
        lambda lane: lane + 1000 if lane > 20 else -lane,
    ),
    "an end under a guard": (
        f"mov.b32 %r1, 3; {STORE} setp.lt.u32 %p1, %t, 9; @%p1 ret; activemask.b32 %r1;",
        lambda lane: 3 if lane < 9 else -512,
    ),
    "labels of inner braces": (
        """mov.b32 %r1, 0; { .reg .b32 %r1, %q; mov.b32 %r1, 50; mov.b32 %q, 1; setp.lt.u32 %p1, %t, 5;
        @%p1 bra L; mov.b32 %q, 2;
        L: st.global.b32 [%d1], %q; } { .reg .b32 %q; ld.global.b32 %q, [%d1]; setp.eq.u32 %p1, %q, 2; @%p1 bra L;
        add.u32 %r1, %r1, 10; L: add.u32 %r1, %r1, %q; }""",
        lambda lane: 11 if lane < 5 else 2,
    ),
    "in one instruction of all ones active": (
        "mov.b32 %r1, 0; setp.lt.u32 %p1, %t, 16; @%p1 bra A; activemask.b32 %r1; bra B; A: activemask.b32 %r1; B: "
        "activemask.b32 %r2; xor.b32 %r1, %r1, %r2;",
        lambda lane: -65536 if lane < 16 else 65535,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHES)
def test_lanes_that_part_meet_again(name):
    """Of a whole warp, and of one with five lanes: each computes what it would alone."""
    body, function = BRANCHES[name]
    for n in (32, 37):
        out = torch.full((n,), 77, dtype=torch.int32)
        assert not make_kernel(OUT + body + STORE, params=1).launch("k", 1, (out,), block=(n,)).findings
        if n == 32 or "activemask" not in body:
            assert out.tolist() == [function(lane) for lane in range(n)]


# ---- counters -------------------------------------------------------------------------------------------------------

COUNTED = """
mov.u32 %r1, memory; mad.lo.s32 %r2, %t, 8, %r1; setp.lt.u32 %p1, %t, 20; cvta.shared.u64 %d6, %d5;
mad.wide.u32 %d2, %t, 16, %a0; ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d2];
@%p1 ld.global.b64 %d3, [%d2+4080]; add.s64 %d4, %a0, 64; ld.global.b32 %r8, [%d4];
st.shared.v2.b32 [%r2], {%r4, %r5}; bar.sync 0; ld.shared.v2.b32 {%r4, %r5}, [%r2];
and.b32 %r9, %t, 31; mad.lo.s32 %r9, %r9, 128, %r1; @%p1 ld.shared.b32 %r10, [%r9]; mad.lo.s32 %r11, %t, 16, %r1;
st.shared.v4.b32 [%r11], {%r4, %r5, %r6, %r7}; st.shared.b16 [%r1], %h1;
mul.f32 %r12, %r4, %r5; sqrt.approx.f32 %r12, %r12; shfl.sync.bfly.b32 %r13, %r12, 1, 31, -1;
@!%p1 bra SKIP; st.global.b32 [%d2], %r12; SKIP: red.global.add.u32 [%a0], 1; cp.async.ca.shared.global [%r2], [%d2], 8;
cp.async.wait_all; ld.param.b64 %d7, [p0]; ld.b32 %r14, [%d7]; fence.proxy.async; prefetch.global.L2 [%a0];
"""


@pytest.mark.parametrize("grid", [1, (2, 1, 2)])
def test_what_a_launch_costs(grid, snapshot):
    """Instructions by class, bytes and sectors of global memory, cycles of banks; and the accesses that are slow."""
    memory = torch.zeros(4096, dtype=torch.uint8)
    aligned = torch.zeros(8192, dtype=torch.uint8)
    aligned = aligned[-aligned.data_ptr() % 128 :][:4600].view(torch.int32)
    del memory
    result = make_kernel(COUNTED, params=1, shared=4224).launch(
        "k", grid, (aligned,), block=(40,), options=Options(check=False)
    )
    lines = [f"{name} {count}" for name, count in result.counters.items()]
    lines += [re.sub("where=''", "", str(slow)) for slow in result.slow] + [str(f.kind) for f in result.findings]
    assert "\n".join(lines) + "\n" == snapshot


# ---- findings, to the letter ----------------------------------------------------------------------------------------

WORD = (
    "shl.b32 %r1, %t, 2; mov.u32 %r2, memory; add.s32 %r1, %r1, %r2; setp.eq.u32 %p1, %t, 0; setp.lt.u32 %p2, %t, 32;\n"
)
SECOND = "mov.u32 %r20, %ctaid.y; setp.eq.u32 %p8, %r20, 0; @%p8 exit;\n"  # the first block does nothing
INIT = "@%p1 mbarrier.init.shared.b64 [%r2+128], 1; bar.sync 0;\n"
FAULTS = {
    "store past": "st.global.b32 [%a0+256], %t;", "load below": "ld.global.b32 %r3, [%a0+-16];",
    "between": "@%p1 ld.global.b64 %d3, [%a1+-8];", "misaligned": "@%p1 ld.global.b32 %r3, [%a0+2];",
    "far": "@%p1 ld.global.b32 %r3, [%d3];",
    "shared store": "st.shared.b32 [%r1+192], %t;", "shared load": "@%p1 ld.shared.v2.b32 {%r3, %r4}, [%r2+252];",
    "shared misaligned": "@%p1 st.shared.b64 [%r2+4], %d1;", "local": ".local .b8 own[16];"
    " @%p1 ld.local.b32 %r3, [own+16];",
    "param": "mov.u64 %d3, p1; cvta.param.u64 %d3, %d3; @%p1 ld.b64 %d4, [%d3+16];",
    "unwritten": "ld.shared.b32 %r3, [%r1];", "race of stores": "st.shared.b32 [%r2], %t;",
    "race of load and store": "@%p1 st.shared.b32 [%r2], 1; ld.shared.b32 %r3, [%r2];",
    "race of store after load": "@%p1 st.shared.b32 [%r2], 1; bar.sync 0; @!%p2 ld.shared.b32 %r3, [%r2];"
    " @%p1 st.shared.b32 [%r2], 2;",
    "race of atomics": "@%p1 st.shared.b32 [%r2], 1; bar.sync 0; red.shared.add.u32 [%r2], 1;"
    " ld.shared.b32 %r3, [%r2];",
    "race with a copy": "cp.async.ca.shared.global [%r1], [%a0], 4; ld.shared.b32 %r3, [%r1];",
    "copy over a read": "st.shared.b32 [%r1], 1; bar.sync 0; ld.shared.b32 %r3, [%r2];"
    " @!%p2 cp.async.ca.shared.global [%r2], [%a0], 4;",
    "lanes": "setp.lt.u32 %p3, %t, 5; @%p3 shfl.sync.bfly.b32 %r3, %t, 1, 31, -1;",
    "inactive lane": "setp.lt.u32 %p3, %t, 5; @%p3 shfl.sync.idx.b32 %r3, %t, 9, 31, 31;",
    "part of a warp": "setp.lt.u32 %p3, %t, 16; @%p3 bar.sync 0;", "part of the block": "@%p2 bar.sync 0;",
    "another barrier": "@%p2 bar.sync 1; @!%p2 bar.sync 2;", "never": "@%p2 bar.sync 3, 128; bar.sync 0;",
    "twice": "bar.arrive 4, 96; bar.arrive 4, 96;", "warp barrier": "setp.lt.u32 %p3, %t, 5; @%p3 bar.warp.sync 255;",
    "matrix by a part": "st.shared.b32 [%r1], 1; bar.sync 0; setp.lt.u32 %p3, %t, 5;"
    " @%p3 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];",
    "trap": "@!%p2 trap;", "limit": "LOOP: bra LOOP;",
    "no mbarrier": "@%p1 mbarrier.arrive.shared.b64 _, [%r2+128];",
    "waits": INIT + "WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r2+128], 0; @!%p3 bra WAIT;",
    "arrivals": INIT + "@%p1 mbarrier.arrive.shared.b64 _, [%r2+128], 2;",
    "invalidated": INIT + "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2+128], 16;"
    " @%p1 mbarrier.inval.shared.b64 [%r2+128];",
    "bulk": INIT + "@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r2+8], "
    "[%a0], 20, [%r2+128];",
    "proxy": "st.shared.b32 [%r1], 7; bar.sync 0; @%p1 cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r2], 64;"
    " cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;",
    "bulk store under way": "st.shared.b32 [%r1], 7; fence.proxy.async; bar.sync 0;"
    " @%p1 cp.async.bulk.global.shared::cta.bulk_group"
    " [%a0], [%r2], 64; cp.async.bulk.commit_group; @%p1 st.shared.b32 [%r2], 8; cp.async.bulk.wait_group.read 0;",
}  # fmt: skip


def test_what_a_kernel_must_not_do_is_told(snapshot):
    """With the line, the block, the warp and the lane where it first happened, and how often."""
    told, memory = [], torch.zeros(4096, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 256 :]
    first, second = memory[:256], memory[512:768]
    for name, body in FAULTS.items():
        module = make_kernel(
            SECOND + ".loc 1 7 3\n" + WORD + "mov.b64 %d3, 64;\n" + body, params=2, shared=256, target="sm_90a"
        )
        module = Module(module.ptx + '\n.file 1 "deep/kernel.py"\n')
        result = module.launch(
            "k", (1, 2), (first, second), num_warps=2, options=Options(limit=9000), tensors={"first": first}
        )
        told += [f"{name}: {finding}" for finding in result.findings] or [f"{name}: nothing"]
    text = "\n".join(told) + "\n"
    text = re.sub(r"bytes at 0x[0-9a-f]{7,}", "bytes at ADDRESS", text)
    text = re.sub(r"between 0x8 and 0x[0-9a-f]{7,}", "between 0x8 and ADDRESS", text)
    text = re.sub(r"\d{7,} bytes after|(?<!\d)\d{7,} before", "FAR", text)
    middle = text.index("lanes: ")
    assert text[:middle] == snapshot(name="memory") and text[middle:] == snapshot(name="order")


def test_after_four_blocks_that_cannot_go_on_the_others_are_not_run():
    result = make_kernel("trap;", params=0).launch("k", (3, 3), (), num_warps=1)
    assert result.counters["blocks"] == 4 and [f.kind for f in result.findings] == ["trap"]


def test_a_block_that_cannot_go_on_keeps_no_later_one_from_its_work():
    body = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 1; @%p1 trap; mul.wide.u32 %d1, %r1, 4; add.s64 %d1, %a0, %d1;"
    out = torch.zeros(4, dtype=torch.int32)
    result = make_kernel(f"{body} st.global.b32 [%d1], 7;", params=1).launch("k", 4, (out,), num_warps=1)
    assert out.tolist() == [7, 0, 7, 7] and [f.kind for f in result.findings] == ["trap"]


def test_no_check_is_no_finding_of_order():
    body = WORD + "st.shared.b32 [%r2], %t; ld.shared.b32 %r3, [%r1]; st.shared.b32 [%r2+1000], %t;"
    result = make_kernel(body, params=0, shared=256).launch("k", 1, (), num_warps=2, options=Options(check=False))
    assert [f.kind for f in result.findings] == ["shared"]
