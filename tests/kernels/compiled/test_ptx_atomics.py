"""Atomic instructions of the PTX machine: what they leave in memory, what they return, what they may not race with."""

import operator

import pytest
import torch

from kernels.compiled.ptx import Options
from tests.helpers.hand_ptx import find_kinds, make_kernel

N = 96  # threads, of which each 8 share a word
INTEGERS = {"32": torch.int32, "64": torch.int64}


def run_atomic(text, x, out, *, shared):
    """Run "... [AT], X;" by N threads on out[thread % len(out)], in global or shared memory; X is the thread's x."""
    bytes_each, words = out.element_size(), len(out)
    kind, reg = {2: ("b16", "%h"), 4: ("b32", "%r"), 8: ("b64", "%d")}[bytes_each]
    load = f"mad.wide.u32 %d8, %t, {bytes_each}, %a0; ld.global.{kind} {reg}7, [%d8]; rem.u32 %r1, %t, {words};"
    body = f"{load} mad.wide.u32 %d6, %r1, {bytes_each}, %a1;\n"
    if shared:
        body += f"mov.u32 %r2, memory; mad.lo.s32 %r2, %r1, {bytes_each}, %r2; setp.lt.u32 %p1, %t, {words};\n"
        body += f"@%p1 ld.global.{kind} {reg}4, [%d6]; @%p1 st.shared.{kind} [%r2], {reg}4; bar.sync 0;\n"
    body += text.replace("AT", "%r2" if shared else "%d6").replace("X", f"{reg}7") + "\n"
    if shared:
        body += f"bar.sync 0; @%p1 ld.shared.{kind} {reg}4, [%r2]; @%p1 st.global.{kind} [%d6], {reg}4;"
    result = make_kernel(body, shared=256 if shared else 0, target="sm_90").launch("k", 1, (x, out), block=(N,))
    assert not result.findings
    return out


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("bits", ["32", "64"])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add.u", operator.add),
        ("min.s", min),
        ("max.s", max),
        ("and.b", operator.and_),
        ("or.b", operator.or_),
        ("xor.b", operator.xor),
    ],
)
def test_integers(name, function, bits, space):
    g = torch.Generator().manual_seed(1)
    x, first = (torch.randint(-(2**30), 2**30, (n,), generator=g).to(INTEGERS[bits]) for n in (N, 12))
    out = run_atomic(f"red.{space}.{name}{bits} [AT], X;", x, first.clone(), shared=space == "shared")
    want = first.tolist()
    for i, value in enumerate(x.tolist()):
        want[i % 12] = function(want[i % 12], value)
    assert out.tolist() == [(v + 2**31) % 2**32 - 2**31 if bits == "32" else v for v in want]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("f32", torch.float32), ("f64", torch.float64), ("noftz.f16x2", torch.float16), ("noftz.bf16x2", torch.bfloat16)],
)
def test_sums_of_floats_round_after_each(name, dtype, space):
    each = 2 if "x2" in name else 1
    x, first = torch.randn(N, each).to(dtype), torch.randn(12, each).to(dtype)
    words, out = (t.view(torch.int32 if each == 2 else dtype).view(-1) for t in (x, first.clone()))
    old = "%d7" if dtype is torch.float64 else "%r7"
    run_atomic(f"atom.{space}.add.{name} {old}, [AT], X;", words, out, shared=space == "shared")
    want = first.clone()
    for i in range(N):
        want[i % 12] += x[i]
    assert out.view(dtype).view(-1, each).equal(want)


def test_a_compare_and_swap_takes_one_of_many():
    out = torch.zeros(12, dtype=torch.int32)
    x = torch.arange(1, N + 1, dtype=torch.int32)
    run_atomic("atom.global.cas.b32 %r5, [AT], 0, X;", x, out, shared=False)
    assert out.tolist() == list(range(1, 13))


def test_an_exchange_returns_what_was_there():
    out, x = torch.tensor([7], dtype=torch.int32), torch.arange(N, dtype=torch.int32)
    run_atomic("atom.global.exch.b32 %r5, [AT], X; st.global.b32 [%d8], %r5;", x, out, shared=False)
    assert out.item() == N - 1 and x.tolist() == [7, *range(N - 1)]


def test_increments_wrap_at_their_bound():
    out = torch.tensor([3], dtype=torch.int32)
    run_atomic("red.global.inc.u32 [AT], 5;", torch.zeros(N, dtype=torch.int32), out, shared=False)
    assert out.item() == (3 + N) % 6


def test_a_vector_is_added_element_by_element():
    out, x = torch.zeros(N, 4), torch.randn(N, 4)
    body = "mul.wide.u32 %d1, %t, 16; add.s64 %d2, %a0, %d1; add.s64 %d3, %a1, %d1;\n"
    body += "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d2]; red.global.add.v4.f32 [%d3], {%r1, %r2, %r3, %r4};\n"
    result = make_kernel(body * 2, target="sm_90").launch("k", 1, (x, out), block=(N,))
    assert not result.findings and out.equal(2 * x)


def test_an_atomic_races_with_a_plain_access_and_not_with_another():
    start = "mov.u32 %r2, memory; setp.eq.u32 %p1, %t, 0; @%p1 st.shared.b32 [%r2], 0;\n"
    add, read = "red.shared.add.u32 [%r2], 1;\n", "ld.shared.b32 %r3, [%r2];\n"
    for body, kinds in (
        (start + "bar.sync 0;" + add + "bar.sync 0;" + read, set()),
        (start + "bar.sync 0;" + add + read, {"race"}),
        (start + add, {"race"}),
        ("mov.u32 %r2, memory;" + add, {"uninitialised"}),
    ):
        assert find_kinds(make_kernel(body, params=0, shared=256).launch("k", 1, (), num_warps=3)) == kinds


USES = {
    "load": "ld.shared.b32 %r3, [%r2];", "store": "st.shared.b32 [%r2], %t;", "atomic": "red.shared.add.u32 [%r2], 1;",
}  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("second", USES)
@pytest.mark.parametrize("first", USES)
def test_of_two_warps_uses_only_loads_or_only_atomics_need_no_order(first, second, reverse):
    """One warp does the first, the other the second, in either order, to a word that all have seen written."""
    body = "mov.u32 %r2, memory; setp.eq.u32 %p1, %t, 0; @%p1 st.shared.b32 [%r2], 7; bar.sync 0;\n"
    for use, lane in ((first, 0), (second, 32)):
        body += f"setp.eq.u32 %p1, %t, {lane}; @%p1 {USES[use]}\n"
    module = make_kernel(body, params=0, shared=256)
    result = module.launch("k", 1, (), num_warps=2, options=Options(reverse=reverse))
    needs_order = first != second or first == "store"
    assert find_kinds(result) == ({"race"} if needs_order else set())
