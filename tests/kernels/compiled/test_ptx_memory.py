"""Loads, stores, atomic instructions and cp.async of the PTX machine, against bytes that Python moves."""

import pytest
import torch

from kernels.compiled.ptx import Module, Options
from tests.helpers.hand_ptx import find_kinds, make_kernel


def patterns(n):
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


REGISTER = {2: ("%h", "b16"), 4: ("%r", "b32"), 8: ("%d", "b64")}


@pytest.mark.parametrize("space", ["global", "shared", "generic", "generic shared", "local", "generic local"])
@pytest.mark.parametrize("kind", ["b8", "u8", "s8", "b16", "s16", "u16", "b32", "s32", "b64", "f32"])
def test_a_value_is_loaded_and_stored(kind, space):
    """Into registers of its width and wider ones: extended by its sign where it has one."""
    size = int(kind[1:]) // 8
    for width in (2, 4, 8):
        if width < size:
            continue
        reg, store = REGISTER[width]
        x = patterns(32 * size)
        out, back = torch.zeros(32 * width, dtype=torch.uint8), torch.zeros(32 * size, dtype=torch.uint8)
        at = "" if space.startswith("generic") else f".{space}"
        body = f".local .align 8 .b8 mine[16];\nmul.wide.u32 %d1, %t, {size}; mul.wide.u32 %d2, %t, {width};\n"
        body += "add.s64 %d3, %a0, %d1; add.s64 %d4, %a1, %d2; add.s64 %d5, %a2, %d1;\n"
        given = {2: "%h1", 4: "%r10", 8: "%d10"}[max(size, 2)]
        if space != "global" and space != "generic":
            body += f"ld.global.b{8 * size} {given}, [%d3];\n"
        if "shared" in space:
            body += "mov.u32 %r9, memory; mov.u64 %d9, memory; cvta.shared.u64 %d9, %d9; add.s64 %d9, %d9, %d1;\n"
            body += f"cvt.u32.u64 %r8, %d1; add.s32 %r9, %r9, %r8; st.shared.b{8 * size} [%r9], {given};\n"
        if "local" in space:
            body += "mov.u64 %d9, mine; add.s64 %d8, %d9, 8; cvta.local.u64 %d9, %d8;\n"
            body += f"st.local.b{8 * size} [mine+8], {given};\n"
        place = {"global": "%d3", "shared": "%r9", "generic": "%d3", "generic shared": "%d9", "local": "mine+8",
                 "generic local": "%d9"}[space]  # fmt: skip
        body += f"ld{at}.{kind} {reg}7, [{place}]; st.global.{store} [%d4], {reg}7;\n"
        body += f"st.global.{kind} [%d5], {reg}7;"
        result = make_kernel(body, params=3, shared=512, target="sm_90").launch("k", 1, (x, out, back), num_warps=1)
        assert not result.findings
        for lane in range(32):
            given = bytes(x[lane * size : (lane + 1) * size].tolist())
            number = int.from_bytes(given, "little", signed=kind[0] == "s")
            got = bytes(out[lane * width : (lane + 1) * width].tolist())
            assert int.from_bytes(got, "little") == number % (1 << 8 * width), (width, lane)
            assert bytes(back[lane * size : (lane + 1) * size].tolist()) == given


@pytest.mark.parametrize(
    ("kind", "n"), [("b32", 2), ("b32", 4), ("b64", 2), ("b16", 4), ("u8", 4), ("f32", 4), ("s16", 2)]
)
def test_vectors(kind, n):
    """Elements next to each other; one that is thrown away is not written."""
    size = int(kind[1:]) // 8
    reg = REGISTER[max(size, 2)][0]
    x, out = patterns(32 * n * size), torch.zeros(32 * n * size, dtype=torch.uint8)
    names = [f"{reg}{4 + i}" for i in range(n)]
    body = f"mul.wide.u32 %d1, %t, {n * size}; add.s64 %d2, %a0, %d1; add.s64 %d3, %a1, %d1;\n"
    body += f"ld.global.v{n}.{kind} {{{', '.join(names)}}}, [%d2];\n"
    if n == 4:
        body += f"mov.{REGISTER[max(size, 2)][1]} {names[1]}, 5;\n"
        body += f"ld.global.v4.{kind} {{{names[3]}, _, {names[2]}, _}}, [%d2];\n"
    body += f"st.global.v{n}.{kind} [%d3], {{{', '.join(names)}}};"
    assert not make_kernel(body).launch("k", 1, (x, out), num_warps=1).findings
    want = x.view(32, n, size).clone()
    if n == 4:
        want[:, 3] = want[:, 0].clone()
        want[:, 1] = torch.tensor([5] + [0] * (size - 1))
    assert out.equal(want.flatten())


def test_parameters_are_read_at_their_places():
    """Each aligned to its size or as it asks, and by generic addresses; variables of the module hold their values."""
    text = """.version 8.7
.target sm_90
.address_size 64
.global .align 8 .b32 table[3] = {7, -2, 0x10};
.global .align 8 .f64 half[1] = {0.5};
.const .align 4 .b8 bytes[4] = {1, 2, 3, 4};
.visible .entry k(.param .u64 p0, .param .u8 small, .param .u32 word, .param .align 16 .b8 block[24],
 .param .f32 number, .param .u16 last) { .reg .b64 %a, %d<9>; .reg .b32 %r<20>; .reg .b16 %h<3>;
ld.param.b64 %a, [p0]; ld.param.u8 %r1, [small]; ld.param.b32 %r2, [word]; ld.param.v2.b32 {%r3, %r4}, [block+16];
ld.param.b32 %r5, [number]; ld.param.u16 %r6, [last]; mov.u64 %d1, block; cvta.param.u64 %d1, %d1; ld.b32 %r7, [%d1+4];
ld.global.b32 %r8, [table+4]; mov.u64 %d2, table; ld.global.b32 %r9, [%d2+8]; ld.const.b32 %r10, [bytes];
ld.global.b64 %d3, [half]; mov.b64 {%r11, %r12}, %d3; st.global.b32 [table], %r2; ld.global.b32 %r13, [table];
"""
    text += "".join(f"st.global.b32 [%a+{4 * i - 4}], %r{i};\n" for i in range(1, 14)) + "ret; }"
    module, out = Module(text), torch.zeros(13, dtype=torch.int32)
    assert module.params == {"k": [8, 1, 4, 24, 4, 2]}
    result = module.launch("k", 1, (out, 200, -5, bytes(range(24)), 1.5, 0x1234), block=(1,))
    assert not result.findings
    word = [int.from_bytes(bytes(range(i, i + 4)), "little") for i in (16, 20, 4)]
    assert out.tolist() == [200, -5, *word[:2], 0x3FC00000, 0x1234, word[2], -2, 16, 0x04030201, 0, 0x3FE00000, -5]


def test_dynamic_shared_memory_begins_after_nothing_else():
    text = """.version 8.7
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry k(.param .u64 p0) { .reg .b64 %a; .reg .b32 %r<9>;
ld.param.b64 %a, [p0]; mov.u32 %r1, dynamic; st.shared.b32 [%r1+60], 9; ld.shared.b32 %r2, [dynamic+60];
st.global.b32 [%a], %r2; ret; }"""
    out = torch.zeros(1, dtype=torch.int32)
    assert not Module(text).launch("k", 1, (out,), block=(1,), shared_bytes=64).findings and out.item() == 9
    assert find_kinds(Module(text).launch("k", 1, (out,), block=(1,), shared_bytes=60)) == {"shared"}


# ---- atomic instructions --------------------------------------------------------------------------------------------

WHOLE = {"b16": torch.int16, "32": torch.int32, "64": torch.int64}


def atomic_of(name, bits, signed):
    """Return a function (old, x, y) -> new, of Python's integers."""
    return {
        "add": lambda old, x, y: old + x, "min": lambda old, x, y: min(old, x), "max": lambda old, x, y: max(old, x),
        "and": lambda old, x, y: old & x, "or": lambda old, x, y: old | x, "xor": lambda old, x, y: old ^ x,
        "exch": lambda old, x, y: x, "cas": lambda old, x, y: y if old == x else old,
        "inc": lambda old, x, y: 0 if old >= x else old + 1,
        "dec": lambda old, x, y: x if old == 0 or old > x else old - 1,
    }[name]  # fmt: skip


ATOMICS = [(name, f"{sign}{bits}") for bits in (32, 64) for sign in "us" for name in ("add", "min", "max")
           if (name, sign, bits) != ("add", "s", 64)]  # fmt: skip
ATOMICS += [(name, f"b{bits}") for bits in (32, 64) for name in ("and", "or", "xor", "exch", "cas")]
ATOMICS += [("inc", "u32"), ("dec", "u32"), ("cas", "b16"), ("exch", "b16")]


@pytest.mark.parametrize(("name", "kind"), ATOMICS)
def test_an_atomic_returns_what_was_there(name, kind):
    """And leaves what it makes of that, of lanes that share a word in turn."""
    bits, n, words = int(kind[1:]), 32, 4
    dtype = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    g = torch.Generator().manual_seed(7)
    few = name in ("cas", "inc", "dec")
    x = torch.randint(0 if few else -(2 ** (bits - 2)), 4 if few else 2 ** (bits - 2), (n,), generator=g).to(dtype)
    x[5] = -1 if not few else 2
    memory = torch.tensor([3, 0, -7, 2], dtype=dtype)
    first, old = memory.clone(), torch.zeros(n, dtype=dtype)
    reg, move = REGISTER[bits // 8]
    body = f"mul.wide.u32 %d1, %t, {bits // 8}; add.s64 %d2, %a0, %d1; add.s64 %d3, %a1, %d1; and.b32 %r9, %t, 3;\n"
    body += f"mad.wide.u32 %d4, %r9, {bits // 8}, %a2; ld.global.{move} {reg}5, [%d2];\n"
    swap = f", {reg}6" if name == "cas" else ""
    body += f"cvt.u{bits}.u32 {reg}6, %t;\n" if bits != 32 else "mov.b32 %r6, %t;\n"
    body += f"atom.global.{name}.{kind} {reg}7, [%d4], {reg}5{swap}; st.global.{move} [%d3], {reg}7;"
    assert not make_kernel(body, params=3, target="sm_90").launch("k", 1, (x, old, memory), num_warps=1).findings

    def number(v):
        return v if kind[0] == "s" else v % (1 << bits)

    kept, function = [number(v) for v in first.tolist()], atomic_of(name, bits, kind[0] == "s")
    for lane, value in enumerate(x.tolist()):
        assert number(old[lane].item()) == kept[lane % words], lane
        kept[lane % words] = function(kept[lane % words], number(value), lane) % (1 << bits)
        kept[lane % words] = number(
            kept[lane % words] - (1 << bits) * (kind[0] == "s" and kept[lane % words] >> (bits - 1))
        )
    assert [number(v) for v in memory.tolist()] == kept


@pytest.mark.parametrize(("kind", "dtype", "n"), [("f32", torch.float32, 2), ("f64", torch.float64, 1),
                                                   ("noftz.f16", torch.float16, 1), ("noftz.bf16", torch.bfloat16, 1),
                                                   ("f32", torch.float32, 4)])  # fmt: skip
def test_sums_of_floats_return_what_was_there(kind, dtype, n):
    x, memory = (torch.randn(32, n).to(dtype) for _ in range(2))
    first, old, size = memory.clone(), torch.zeros(32, n, dtype=dtype), dtype.itemsize
    reg, _ = REGISTER[size]
    a, b = ([f"{reg}{start + i}" for i in range(n)] for start in ((4, 0) if n > 1 else (5, 6)))
    brace = (lambda names: f"{{{', '.join(names)}}}") if n > 1 else (lambda names: names[0])
    v = f".v{n}" if n > 1 else ""
    body = f"mul.wide.u32 %d1, %t, {size * n}; add.s64 %d2, %a0, %d1; add.s64 %d3, %a1, %d1; add.s64 %d4, %a2, %d1;\n"
    body += f"ld.global{v}.b{8 * size} {brace(a)}, [%d2];\n"
    body += f"atom.global.add{v}.{kind} {brace(b)}, [%d4], {brace(a)}; st.global{v}.b{8 * size} [%d3], {brace(b)};"
    assert not make_kernel(body, params=3, target="sm_90").launch("k", 1, (x, old, memory), num_warps=1).findings
    assert old.equal(first) and memory.equal(first + x)


# ---- cp.async -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_copy_fills_with_zeros_what_it_is_not_given(size, late):
    """Of a register, per lane: all, a part, none, and more than all, which is all."""
    x, out = patterns(32 * size), torch.zeros(32 * size, dtype=torch.uint8)
    body = f"mul.wide.u32 %d1, %t, {size}; add.s64 %d2, %a0, %d1; add.s64 %d3, %a1, %d1; mov.u32 %r1, memory;\n"
    body += f"mad.lo.s32 %r1, %t, {size}, %r1; and.b32 %r2, %t, 15; shl.b32 %r2, %r2, 1;\n"
    body += f"cp.async.ca.shared.global [%r1], [%d2], {size}, %r2; cp.async.wait_all;\n"
    body += "".join(f"ld.shared.b32 %r5, [%r1+{i}]; st.global.b32 [%d3+{i}], %r5;\n" for i in range(0, size, 4))
    result = make_kernel(body, shared=512).launch("k", 1, (x, out), num_warps=1, options=Options(late=late))
    given = torch.tensor([min(2 * (lane % 16), size) for lane in range(32)])
    want = x.view(32, size) * (torch.arange(size) < given[:, None])
    assert not result.findings and out.view(32, size).equal(want)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("left", [0, 1, 2])
def test_groups_of_copies_are_waited_for_in_order(left, late):
    """Of three groups, the first ones have landed; a read of the others is a race, and finds nothing there if late."""
    x, out = torch.randn(3, 32), torch.zeros(3, 32)
    body = "mul.wide.u32 %d1, %t, 4; add.s64 %d2, %a0, %d1; add.s64 %d3, %a1, %d1; mov.u32 %r1, memory;\n"
    body += "mad.lo.s32 %r1, %t, 4, %r1;\n"
    for i in range(3):
        body += f"cp.async.ca.shared.global [%r1+{128 * i}], [%d2+{128 * i}], 4; cp.async.commit_group;\n"
    body += f"cp.async.wait_group {left};\n"
    body += "".join(f"ld.shared.b32 %r5, [%r1+{128 * i}]; st.global.b32 [%d3+{128 * i}], %r5;\n" for i in range(3))
    result = make_kernel(body, shared=512).launch("k", 1, (x, out), num_warps=1, options=Options(late=late))
    assert find_kinds(result) == ({"race"} if left else set())
    landed = 3 - left if late else 3
    assert out[:landed].equal(x[:landed]) and not (out[landed:] == x[landed:]).any()


# ---- mbarriers of copies --------------------------------------------------------------------------------------------

BARRIER = "mov.u32 %r1, memory; add.s32 %r2, %r1, 256; mad.lo.s32 %r3, %t, 4, %r1; mad.wide.u32 %d2, %t, 4, %a0;\n"
BARRIER += (
    "mad.wide.u32 %d3, %t, 4, %a1; setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [%r2], {}; bar.sync 0;\n"
)
COPY = "cp.async.ca.shared.global [%r3], [%d2], 4; cp.async.mbarrier.arrive{}.shared.b64 [%r2];\n"
SHOW = "ld.shared.b32 %r5, [%r3]; st.global.b32 [%d3], %r5;"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("kind", "count"), [("", 1), (".noinc", 33)])
def test_copies_arrive_as_those_that_are_counted_or_beside_them(kind, count, late):
    """The phase ends with a plain arrival: alone, or with those of 32 lanes. By then the copies have landed."""
    body = BARRIER.format(count) + COPY.format(kind) + "@%p1 mbarrier.arrive.shared.b64 %d5, [%r2];\n"
    body += "@%p1 st.global.b64 [%a1+128], %d5;\n"  # the phase that it arrives in
    body += "WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT;\n" + SHOW
    x, out = torch.randn(32), torch.ones(34)
    result = make_kernel(body, shared=512).launch("k", 1, (x, out), num_warps=1, options=Options(late=late))
    if kind or not late:  # without .noinc nothing says that late copies have landed
        assert out[:32].equal(x)
    assert out[32:].view(torch.int64).item() == 0
    assert {f.kind for f in result.findings} <= (set() if kind else {"race"})


@pytest.mark.parametrize("late", [False, True])
def test_a_barrier_that_copies_arrive_at_is_not_invalidated(late):
    body = BARRIER.format(64) + COPY.format(".noinc") + "@%p1 mbarrier.inval.shared.b64 [%r2]; cp.async.wait_all;"
    result = make_kernel(body, shared=512).launch(
        "k", 1, (torch.randn(32), torch.zeros(32)), num_warps=1, options=Options(late=late)
    )
    assert find_kinds(result) == ({"mbarrier"} if late else set())


def test_a_token_is_of_its_phase():
    """Of three phases: each token waits for the end of its own, and is over in all that come later."""
    body = BARRIER.format(1) + "setp.ne.u32 %p5, %t, 0; @%p5 exit; mov.b32 %r9, 0;\n"
    for i in range(3):
        body += f"mbarrier.test_wait.parity.shared.b64 %p2, [%r2], {i % 2}; selp.b32 %r8, 1, 0, %p2;\n"
        body += f"add.s32 %r9, %r9, %r8; mbarrier.arrive.shared.b64 %d{5 + i}, [%r2];\n"
    for i in range(3):
        body += f"mbarrier.test_wait.shared.b64 %p2, [%r2], %d{5 + i}; selp.b32 %r{10 + i}, 1, 0, %p2;\n"
        body += f"st.global.b64 [%a1+{8 * i}], %d{5 + i}; st.global.b32 [%a1+{64 + 4 * i}], %r{10 + i};\n"
    out = torch.zeros(32, dtype=torch.int32)
    result = make_kernel(body + "st.global.b32 [%a1+100], %r9;", shared=512).launch(
        "k", 1, (torch.zeros(32), out), num_warps=1
    )
    assert not result.findings and out[:6].tolist() == [0, 0, 1, 0, 2, 0]
    assert out[16:19].tolist() == [1, 1, 1] and out[25] == 0
