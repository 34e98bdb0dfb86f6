"""The PTX machine's matrix instructions against fp64 products, with the fragments as the PTX manual draws them."""

import numpy as np
import pytest
import torch

from kernels.compiled.ptx import Options
from tests.helpers.hand_ptx import make_kernel

LANES_ROW, LANES_COL = np.arange(32) // 4, np.arange(32) % 4
LOAD = "mad.wide.u32 %d{0}, %t, 4, %a{0};\n"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def left_fragment(a, packed):
    """Return the four registers of each lane of A (16, K): (4, 32, packed)."""
    half = a.shape[1] // 2
    return np.stack(
        [
            np.stack([a[LANES_ROW + 8 * (q % 2), LANES_COL * packed + e + half * (q // 2)] for e in range(packed)], -1)
            for q in range(4)
        ]
    )


def right_fragment(b, packed):
    """Return the two registers of each lane of B (K, 8): (2, 32, packed)."""
    half = b.shape[0] // 2
    return np.stack(
        [np.stack([b[LANES_COL * packed + e + half * q, LANES_ROW] for e in range(packed)], -1) for q in range(2)]
    )


def accumulators(n):
    """Return the row and the column that each register and lane holds of a result (16, n)."""
    q = np.arange(n // 2)[:, None]
    return LANES_ROW + 8 * (q // 2 % 2), 8 * (q // 4) + 2 * LANES_COL + q % 2


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32"])
def test_mma(name):
    rng = np.random.default_rng(0)
    k, packed = (8, 1) if name == "tf32" else (16, 2)
    to = DTYPES[name]
    a, b = (torch.from_numpy(rng.standard_normal(shape)).to(to) for shape in ((16, k), (k, 8)))
    given = a, b
    if name == "tf32":  # of which the hardware reads the upper 19 bits
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    c = torch.from_numpy(rng.standard_normal((16, 8))).float()

    def pack(fragment):
        return torch.from_numpy(fragment.copy()).to(to).contiguous().view(torch.int32).reshape(-1)

    rows, cols = accumulators(8)
    inputs = (
        pack(left_fragment(given[0].double().numpy(), packed)),
        pack(right_fragment(given[1].double().numpy(), packed)),
        c[rows, cols].contiguous(),
    )
    out = torch.empty(4, 32)
    body = "".join(LOAD.format(i) for i in range(4))
    body += "".join(f"ld.global.b32 %r{q}, [%d0+{128 * q}];\n" for q in range(4))
    body += "".join(f"ld.global.b32 %r{4 + q}, [%d1+{128 * q}];\n" for q in range(2))
    body += "".join(f"ld.global.b32 %r{8 + q}, [%d2+{128 * q}];\n" for q in range(4))
    body += f"mma.sync.aligned.m16n8k{k}.row.col.f32.{name}.{name}.f32 "
    body += "{%r8,%r9,%r10,%r11}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r8,%r9,%r10,%r11};\n"
    body += "".join(f"st.global.b32 [%d3+{128 * q}], %r{8 + q};\n" for q in range(4))
    assert not make_kernel(body, params=4).launch("k", 1, (*inputs, out), num_warps=1).findings
    want = a.double().numpy() @ b.double().numpy() + c.double().numpy()
    assert np.abs(out.numpy() - want[rows, cols]).max() < 1e-5


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix_and_stmatrix(n, trans):
    x = torch.arange(64 * n, dtype=torch.int16).view(n, 8, 8)
    out, back = torch.empty(n, 32, 2, dtype=torch.int16), torch.empty(n, 8, 8, dtype=torch.int16)
    registers = "{" + ", ".join(f"%r{q}" for q in range(n)) + "}"
    four = "{%r10, %r11, %r12, %r13}"
    trans_text = ".trans" if trans else ""
    body = "mov.u32 %r9, memory; shl.b32 %r8, %t, 4; add.s32 %r8, %r8, %r9;\n"
    body += "".join(LOAD.format(i) for i in range(3))
    body += "mul.wide.u32 %d5, %t, 16; add.s64 %d6, %a0, %d5; add.s64 %d7, %a2, %d5;\n"
    body += f"setp.lt.u32 %p1, %t, {8 * n};\n"
    body += f"@%p1 ld.global.v4.b32 {four}, [%d6]; @%p1 st.shared.v4.b32 [%r8], {four};\n"
    body += f"bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.x{n}{trans_text}.shared.b16 {registers}, [%r8];\n"
    body += "".join(f"st.global.b32 [%d1+{128 * q}], %r{q};\n" for q in range(n))
    body += f"stmatrix.sync.aligned.m8n8.x{n}{trans_text}.shared.b16 [%r8], {registers};\n"
    body += f"@%p1 ld.shared.v4.b32 {four}, [%r8]; @%p1 st.global.v4.b32 [%d7], {four};\n"
    assert not make_kernel(body, params=3, shared=512).launch("k", 1, (x, out, back), num_warps=1).findings
    tile = x.mT if trans else x
    assert out.equal(torch.stack([tile[:, LANES_ROW, 2 * LANES_COL + e] for e in range(2)], -1)) and back.equal(x)


# ---- wgmma ----------------------------------------------------------------------------------------------------------


def place(matrix, swizzle, rows_contiguous):
    """Lay (rows, 16) of 16 bits out as a wgmma descriptor wants it. Return the memory, leading and stride offsets."""
    width = {0: 8, 32: 16, 64: 32, 128: 64}[swizzle]  # elements of a row of a swizzle's pattern
    memory, at = np.zeros(1 << 16, np.int16), np.zeros(matrix.shape, np.int64)
    r, k = np.arange(len(matrix))[:, None], np.arange(16)[None, :]
    if not rows_contiguous and swizzle:
        leading, stride = 1, 8 * width * 2
        at[:] = r // 8 * (8 * width) + r % 8 * width + k
    elif not rows_contiguous:  # 8 x 16 bytes in a piece; along k first
        leading, stride = 128, 256
        at[:] = r // 8 * 128 + k // 8 * 64 + r % 8 * 8 + k % 8
    elif swizzle:  # patterns of (8 of k, width of rows); along k first
        leading, stride = 2 * 8 * width * 2, 8 * width * 2
        at[:] = r // width * (2 * 8 * width) + k // 8 * (8 * width) + k % 8 * width + r % width
    else:
        leading, stride = 128, 256
        at[:] = r // 8 * 128 + k // 8 * 64 + k % 8 * 8 + r % 8
    chunk = at // 8
    if swizzle:
        chunk = chunk ^ (chunk >> 3 & swizzle // 16 - 1)
    memory[chunk * 8 + at % 8] = matrix
    return torch.from_numpy(memory[:4096]), leading, stride


def descriptor(swizzle, start, leading, stride):
    """Return a wgmma descriptor. start, leading, stride: bytes."""
    code = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return code << 62 | start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32


COPY_TO_SHARED = """
mov.u32 %r40, memory; mov.u32 %r41, %t;
LOOP: mad.wide.u32 %d5, %r41, 16, %a0; ld.global.v4.b32 {%r42, %r43, %r44, %r45}, [%d5]; shl.b32 %r46, %r41, 4;
add.s32 %r46, %r46, %r40; st.shared.v4.b32 [%r46], {%r42, %r43, %r44, %r45}; add.s32 %r41, %r41, 128;
setp.lt.u32 %p1, %r41, 1024; @%p1 bra LOOP; fence.proxy.async.shared::cta; bar.sync 0;
"""


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("from_registers", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_wgmma(swizzle, trans, from_registers, late):
    n = 64
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(n, 16).bfloat16()
    shared_a, *offsets_a = place(a.view(torch.int16).numpy(), swizzle, trans and not from_registers)
    shared_b, *offsets_b = place(b.view(torch.int16).numpy(), swizzle, trans)
    fragments = [left_fragment(a[16 * w : 16 * w + 16].float().numpy(), 2) for w in range(4)]
    fragments = torch.cat([torch.from_numpy(f).bfloat16().view(torch.int32).reshape(4, 32) for f in fragments], 1)
    out = torch.empty(n // 2, 128)
    body = "".join(LOAD.format(i) for i in range(3)) + COPY_TO_SHARED
    body += "".join(f"ld.global.b32 %r{50 + q}, [%d1+{512 * q}];\n" for q in range(4))
    body += f"mov.b64 %d10, {descriptor(swizzle, 0, *offsets_a)};\n"
    body += f"mov.b64 %d11, {descriptor(swizzle, 8192, *offsets_b)};\n"
    d = "{" + ",".join(f"%r{i}" for i in range(n // 2)) + "}"
    left = "{%r50,%r51,%r52,%r53}" if from_registers else "%d10"
    flags = f"1, 1, {int(trans)}" if from_registers else f"1, 1, {int(trans)}, {int(trans)}"
    body += "wgmma.fence.sync.aligned;\n"
    body += f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {d}, {left}, %d11, 0, {flags};\n"
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"
    body += "".join(f"st.global.b32 [%d2+{512 * q}], %r{q};\n" for q in range(n // 2))
    module = make_kernel(body, params=3, shared=16384, target="sm_90a")
    memory = torch.cat((shared_a, shared_b))
    result = module.launch("k", 1, (memory, fragments, out), options=Options(late=late))
    assert not result.findings
    want, (rows, cols) = a.double() @ b.double().T, accumulators(n)
    for w in range(4):
        assert (out[:, 32 * w : 32 * w + 32] - want[16 * w : 16 * w + 16][rows, cols]).abs().max() < 1e-4
    assert result.counters["multiply_adds"] == 64 * n * 16


def words(t):
    return t.contiguous().view(torch.int32).reshape(-1)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_mma_of_half_the_depth(name):
    """m16n8k8 of 16 bits: two registers of A, one of B."""
    to, (rows, cols) = DTYPES[name], accumulators(8)
    a, b, c = torch.randn(16, 8).to(to), torch.randn(8, 8).to(to), torch.randn(16, 8)
    left = torch.stack([torch.stack([a[LANES_ROW + 8 * q, 2 * LANES_COL + e] for e in range(2)], -1) for q in range(2)])
    right = torch.stack([b[2 * LANES_COL + e, LANES_ROW] for e in range(2)], -1)
    out = torch.empty(4, 32)
    body = "".join(LOAD.format(i) for i in range(4)) + "ld.global.b32 %r0, [%d0]; ld.global.b32 %r1, [%d0+128];\n"
    body += "ld.global.b32 %r2, [%d1];\n" + "".join(f"ld.global.b32 %r{8 + q}, [%d2+{128 * q}];\n" for q in range(4))
    body += f"mma.sync.aligned.m16n8k8.row.col.f32.{name}.{name}.f32 {{%r4,%r5,%r6,%r7}}, {{%r0,%r1}}, {{%r2}}, "
    body += "{%r8,%r9,%r10,%r11};\n" + "".join(f"st.global.b32 [%d3+{128 * q}], %r{4 + q};\n" for q in range(4))
    inputs = words(left), words(right), c[rows, cols].contiguous()
    result = make_kernel(body, params=4).launch("k", 1, (*inputs, out), num_warps=1)
    assert not result.findings and result.counters["multiply_adds"] == 16 * 8 * 8
    assert (out - (a.double() @ b.double() + c)[rows, cols]).abs().max() < 1e-5


CHAIN = [  # (sign of A, sign of B, whether the result is added to) of products in turn, by an immediate or a predicate
    [("1", "1", "0")], [("-1", "1", "0"), ("1", "1", "1")], [("1", "-1", "0"), ("1", "-1", "1"), ("-1", "-1", "1")],
    [("1", "1", "%p5"), ("1", "1", "%p4")],
]  # fmt: skip


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("chain", CHAIN)
@pytest.mark.parametrize(("name", "n"), [("f16", 8), ("tf32", 24), ("bf16", 256)])
def test_wgmma_adds_and_subtracts_products(name, n, chain, late):
    """Of a matrix in registers and one in shared memory without a swizzle, both read as tf32 has them."""
    to, k, packed = DTYPES[name], 8 if name == "tf32" else 16, 1 if name == "tf32" else 2
    a, b = torch.randn(64, k).to(to), torch.randn(n, k).to(to)
    exact = [t.double() for t in (a, b)]
    if name == "tf32":
        exact = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (a, b)]
    half = k // 2  # rows of 16 bytes: (8 rows, 16 bytes) in a piece, along k first
    memory = torch.zeros(16384 // to.itemsize, dtype=to)
    for r in range(n):
        for c in range(k):
            memory[(r // 8) * 8 * k + (c // half) * 8 * half + r % 8 * half + c % half] = b[r, c]
    fragments = [left_fragment(a[16 * w : 16 * w + 16].float().numpy(), packed) for w in range(4)]
    fragments = torch.cat(
        [torch.from_numpy(f).to(to).contiguous().view(torch.int32).reshape(4, 32) for f in fragments], 1
    )
    out = torch.empty(n // 2, 128)
    body = "".join(LOAD.format(i) for i in range(3)) + COPY_TO_SHARED
    body = body.replace("%r4", "%z4") if n == 256 else body
    first = 150 if n == 256 else 50
    body += "".join(f"ld.global.b32 %r{first + q}, [%d1+{512 * q}];\n" for q in range(4))
    body += f"mov.b64 %d11, {descriptor(0, 0, 128, 256)}; setp.eq.u32 %p4, %t, %t; setp.ne.u32 %p5, %t, %t;\n"
    d = "{" + ",".join(f"%r{i}" for i in range(n // 2)) + "}"
    left = "{" + ",".join(f"%r{first + q}" for q in range(4)) + "}"
    body += "".join(f"mov.b32 %r{i}, 0f7fc00000;\n" for i in range(n // 2)) + "wgmma.fence.sync.aligned;\n"
    for sign_a, sign_b, add in chain:
        trans = "" if name == "tf32" else ", 0"
        body += (
            f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{name}.{name} {d}, {left}, %d11, {add}, {sign_a}, {sign_b}"
        )
        body += f"{trans};\nwgmma.commit_group.sync.aligned;\n"
    body += "wgmma.wait_group.sync.aligned 0;\n"
    body += "".join(f"st.global.b32 [%d2+{512 * q}], %r{q};\n" for q in range(n // 2))
    if n == 256:
        body = ".reg .b32 %r<160>, %z<50>;\n" + body.replace("%r40", "%z40")
    module = make_kernel("{" + body + "}", params=3, shared=16384, target="sm_90a")
    result = module.launch("k", 1, (memory, fragments, out), options=Options(late=late))
    assert not result.findings and result.counters["multiply_adds"] == len(chain) * 64 * n * k
    total = sum(int(sign_a) * int(sign_b) for sign_a, sign_b, _ in chain)
    want, (rows, cols) = total * (exact[0] @ exact[1].T), accumulators(n)
    for w in range(4):
        assert (out[:, 32 * w : 32 * w + 32] - want[16 * w : 16 * w + 16][rows, cols]).abs().max() < 1e-4
