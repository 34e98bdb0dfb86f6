"""What the lanes of a warp exchange, and what each knows of itself, on the PTX machine, against loops over lanes."""

import pytest
import torch

from kernels.compiled.ptx import Module
from tests.helpers.hand_ptx import find_kinds, make_kernel

LANES = range(32)
LOAD = "mad.wide.u32 %d1, %t, 4, %a0; ld.global.b32 %r1, [%d1]; mad.wide.u32 %d2, %t, 4, %a1;\n"
PART = "and.b32 %r20, %t, 7; setp.gt.u32 %p1, %r20, 2;\n"  # lanes 3 to 7 of each 8
ACTIVE = [lane for lane in LANES if lane % 8 > 2]
MEMBERS = sum(1 << lane for lane in ACTIVE)


def as_signed(x):
    return (x + 2**31) % 2**32 - 2**31


def run(body, x, n=32):
    """Run a body that makes %r2 of %r1, an element of x a lane, and return every lane's. It finds nothing."""
    out = torch.full((n,), 77, dtype=torch.int32)
    text = LOAD + PART + "mov.b32 %r2, 77;\n" + body + "\nst.global.b32 [%d2], %r2;"
    assert not make_kernel(text, target="sm_90a").launch("k", 1, (x, out), block=(n,)).findings
    return out.tolist()


def numbers():
    return torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(3)).to(torch.int32)


# ---- shuffles -------------------------------------------------------------------------------------------------------


def source_of(kind, lane, n, c):
    """Return the lane that a shuffle reads from, and whether it is within its segment, as the ISA has it."""
    segment, clamp, n = c >> 8 & 31, c & 31, n & 31
    most = (lane & segment) | (clamp & ~segment & 31)
    if kind == "up":
        return (lane - n, True) if lane - n >= most else (lane, False)
    found = {"down": lane + n, "bfly": lane ^ n, "idx": (lane & segment) | (n & ~segment & 31)}[kind]
    return (found, True) if found <= most else (lane, False)


@pytest.mark.parametrize("kind", ["up", "down", "bfly", "idx"])
def test_a_shuffle_reads_within_its_segment(kind):
    """Of 32, 16 or 8 lanes, and clamped within it; from outside a lane reads itself, and the predicate is false."""
    x = numbers()
    for c in (0x1F, 0x00, 0x100F, 0x181F, 0x1800, 0x1807, 0x0A, 0x1C1F):
        for n in (0, 1, 3, 7, 16, 31, 33):
            want = [source_of(kind, lane, n, c) for lane in LANES]
            got = run(f"shfl.sync.{kind}.b32 %r2|%p2, %r1, {n}, {c}, -1; @!%p2 xor.b32 %r2, %r2, -1;", x)
            assert got == [x[lane].item() if ok else ~x[lane].item() for lane, ok in want], (c, n)
    assert run(f"shfl.sync.{kind}.b32 %r1, %r1, 1, 31, -1; mov.b32 %r2, %r1;", x) == [
        x[source_of(kind, lane, 1, 31)[0]].item() for lane in LANES
    ]  # over its own source


def test_lanes_may_read_from_places_of_their_own():
    x = numbers()
    got = run("mad.lo.s32 %r3, %t, 5, 2; shfl.sync.idx.b32 %r2, %r1, %r3, 31, -1;", x)
    assert got == [x[(5 * lane + 2) % 32].item() for lane in LANES]


def test_a_part_of_a_warp_shuffles_among_itself():
    x = numbers()
    got = run(f"@%p1 shfl.sync.bfly.b32 %r2, %r1, 16, 31, {MEMBERS};", x)
    assert got == [x[lane ^ 16].item() if lane in ACTIVE else 77 for lane in LANES]
    for text in (f"@%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, {MEMBERS};",
                 f"@%p1 vote.sync.ballot.b32 %r2, %p1, {MEMBERS | 1};",
                 "@%p1 redux.sync.add.s32 %r2, %r1, -1;", "@%p1 match.any.sync.b32 %r2, %r1, -1;",
                 "@%p1 elect.sync _|%p2, -1;", "@%p1 bar.warp.sync -1;"):  # fmt: skip
        result = make_kernel(LOAD + PART + text, target="sm_90a").launch("k", 1, (x, x), num_warps=1)
        assert find_kinds(result) == {"converged"}, text
    for text in (f"@%p1 bar.warp.sync {MEMBERS};", "bar.warp.sync -1;"):
        assert run(text + " mov.b32 %r2, %r1;", x) == x.tolist()


# ---- reductions, votes, matches -------------------------------------------------------------------------------------

REDUCED = {
    "add.s32": sum, "add.u32": sum, "min.s32": min, "max.s32": max,
    "min.u32": lambda xs: min(x % 2**32 for x in xs), "max.u32": lambda xs: max(x % 2**32 for x in xs),
    "and.b32": lambda xs: [m := -1, [m := m & x for x in xs][-1]][1],
    "or.b32": lambda xs: [m := 0, [m := m | x for x in xs][-1]][1],
    "xor.b32": lambda xs: [m := 0, [m := m ^ x for x in xs][-1]][1],
}  # fmt: skip


@pytest.mark.parametrize("text", REDUCED)
def test_a_reduction_over_a_warp_and_a_part_of_it(text):
    x = numbers() | 0x00F00F00
    values = x.tolist()
    assert run(f"redux.sync.{text} %r2, %r1, -1;", x) == [as_signed(REDUCED[text](values))] * 32
    want = as_signed(REDUCED[text]([values[lane] for lane in ACTIVE]))
    got = run(f"@%p1 redux.sync.{text} %r2, %r1, {MEMBERS};", x)
    assert got == [want if lane in ACTIVE else 77 for lane in LANES]


@pytest.mark.parametrize("mark", ["", "!"])
@pytest.mark.parametrize("which", ["some", "all", "none", "active"])
def test_votes(which, mark):
    """Ballots name the lanes; all, any and uni are of the lanes that vote."""
    sets = {"some": {3, 4, 9, 14, 31}, "all": set(LANES), "none": set(), "active": set(ACTIVE)}
    x = torch.tensor([int(lane in sets[which]) for lane in LANES], dtype=torch.int32)
    says = {lane for lane in LANES if (lane in sets[which]) != (mark == "!")}
    for guard, members, named in (("", LANES, "-1"), ("@%p1 ", ACTIVE, str(MEMBERS))):

        def voted(text, guard=guard):
            return run(f"setp.ne.u32 %p2, %r1, 0; setp.eq.u32 %p3, %r1, 7; {guard}{text}", x)

        inside = [lane for lane in members if lane in says]
        ballot = as_signed(sum(1 << lane for lane in inside))
        got = voted(f"vote.sync.ballot.b32 %r2, {mark}%p2, {named};")
        assert got == [ballot if lane in members else 77 for lane in LANES]
        for kind, want in (("any", bool(inside)), ("all", len(inside) == len(members)),
                           ("uni", len(inside) in (0, len(members)))):  # fmt: skip
            got = voted(f"vote.sync.{kind}.pred %p3, {mark}%p2, {named}; selp.b32 %r2, 1, 0, %p3;")
            assert got == [int(want and lane in members) for lane in LANES], kind


@pytest.mark.parametrize("bits", [32, 64])
def test_matches(bits):
    """Any: the lanes with this one's value. All: every lane that takes part, or none."""
    x = torch.tensor([lane % 3 + 10 * (lane == 20) for lane in LANES], dtype=torch.int32)
    wide = "cvt.s64.s32 %d5, %r1; shl.b64 %d5, %d5, 32;" if bits == 64 else ""
    value = "%d5" if bits == 64 else "%r1"
    for guard, members, named in (("", LANES, "-1"), ("@%p1 ", ACTIVE, str(MEMBERS))):
        got = run(f"{wide} {guard}match.any.sync.b{bits} %r2, {value}, {named};", x)
        same = [as_signed(sum(1 << other for other in members if x[other] == x[lane])) for lane in LANES]
        assert got == [same[lane] if lane in members else 77 for lane in LANES]
        for equal in (False, True):
            flat = "shr.s32 %r1, %r1, 5; mov.b64 %d5, 3;" if equal else ""
            text = f"{wide} {flat} {guard}match.all.sync.b{bits} %r2|%p2, {value}, {named}; "
            mask = as_signed(sum(1 << lane for lane in members)) if equal else 0
            assert run(text, x) == [mask if lane in members else 77 for lane in LANES]
            assert run(text + f"{guard}selp.b32 %r2, 5, 6, %p2;", x) == [
                (5 if equal else 6) if lane in members else 77 for lane in LANES
            ]


def test_the_lanes_that_are_active_and_one_of_them():
    x = numbers()
    members = as_signed(MEMBERS)
    assert run("activemask.b32 %r2;", x) == [-1] * 32
    assert run("@%p1 activemask.b32 %r2;", x) == [members if lane in ACTIVE else 77 for lane in LANES]
    text = f"setp.eq.u32 %p2, %t, %t; @%p1 elect.sync %r2|%p2, {MEMBERS};"
    assert run(text, x) == [3 if lane in ACTIVE else 77 for lane in LANES]
    want = [int(lane == 3 or lane not in ACTIVE) for lane in LANES]
    assert run(text + "selp.b32 %r2, 1, 0, %p2;", x) == want


# ---- what a thread knows of itself ----------------------------------------------------------------------------------

BLOCK, GRID = (5, 3, 4), (2, 3, 2)
NAMES = [f"%{what}.{axis}" for what in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
NAMES += ["%laneid", "%warpid", "%nwarpid", *(f"%lanemask_{which}" for which in ("lt", "le", "gt", "ge", "eq"))]
NAMES += ["%cluster_ctarank", "%cluster_nctarank", "%smid", "%dynamic_smem_size", "%total_smem_size"]


def known(thread, block):
    """Return what a thread of a block knows, in the order of NAMES."""
    lane = thread % 32
    tid = (thread % 5, thread // 5 % 3, thread // 15)
    bits = [sum(1 << other for other in LANES if test(other, lane)) for test in (
        int.__lt__, int.__le__, int.__gt__, int.__ge__, int.__eq__,
    )]  # fmt: skip
    of_warp = [lane, thread // 32, 2, *map(as_signed, bits)]
    return [*tid, *BLOCK, *block, *GRID, *of_warp, 0, 1, 0, 640, 640 + 48]


def test_what_a_thread_knows_of_itself():
    threads, n = 5 * 3 * 4, len(NAMES)
    out = torch.zeros(12, threads, n, dtype=torch.int32)
    text = ".version 8.7\n.target sm_90a\n.address_size 64\n.shared .align 16 .b8 fixed[48];\n"
    text += ".visible .entry k(.param .u64 p0) { .reg .b64 %a, %d; .reg .b32 %r<4>;\n"
    text += "ld.param.b64 %a, [p0]; mad.lo.s32 %r1, %tid.z, 3, %tid.y; mad.lo.s32 %r1, %r1, 5, %tid.x;\n"
    text += "mad.lo.s32 %r2, %ctaid.z, 3, %ctaid.y; mad.lo.s32 %r2, %r2, 2, %ctaid.x;\n"
    text += f"mad.lo.s32 %r1, %r2, {threads}, %r1; mad.wide.u32 %d, %r1, {4 * n}, %a;\n"
    text += "".join(f"mov.u32 %r3, {name}; st.global.b32 [%d+{4 * i}], %r3;\n" for i, name in enumerate(NAMES))
    result = Module(text + "ret; }").launch("k", GRID, (out,), block=BLOCK, shared_bytes=640)
    assert not result.findings and result.counters["blocks"] == 12
    for number in range(12):
        block = (number % 2, number // 2 % 3, number // 6)
        assert out[number].tolist() == [known(thread, block) for thread in range(threads)]
