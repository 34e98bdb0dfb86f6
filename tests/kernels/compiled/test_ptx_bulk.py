"""Bulk copies that reduce, tensor maps that kernels make, and maps that no copy takes, on the PTX machine."""

import ctypes

import pytest
import torch

from kernels.compiled.ptx import Options
from kernels.compiled.tensor_map import encode_tensor_map
from tests.helpers.hand_ptx import find_kinds, make_kernel

START = (
    "mov.u32 %r1, memory; add.s32 %r2, %r1, 4096; setp.eq.u32 %p1, %t, 0; shl.b32 %r5, %t, 2; add.s32 %r6, %r1, %r5;\n"
)
FILL = "mad.wide.u32 %d2, %t, 4, %a0; ld.global.b32 %r7, [%d2]; st.shared.b32 [%r6], %r7;\n"
FENCE = "fence.proxy.async.shared::cta; bar.sync 0;\n"
DONE = "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;\n"
KINDS = {
    "u32": torch.int32, "s32": torch.int32, "b32": torch.int32, "u64": torch.int64, "s64": torch.int64,
    "b64": torch.int64,
    "f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
REDUCED = [*((name, kind) for kind in ("u32", "s32", "u64", "s64") for name in ("add", "min", "max")),
           *((name, kind) for kind in ("b32", "b64") for name in ("and", "or", "xor")), ("inc", "u32"), ("dec", "u32"),
           *(("add", kind) for kind in ("f32", "f64", "noftz.f16", "noftz.bf16"))]  # fmt: skip


def reduced(name, kind, old, x):
    """Return what a reduction makes of two numbers of Python."""
    bits = int(kind[1:])
    if kind[0] != "s":
        old, x = old % (1 << bits), x % (1 << bits)
    found = {
        "add": old + x, "min": min(old, x), "max": max(old, x), "and": old & x, "or": old | x, "xor": old ^ x,
        "inc": 0 if old >= x else old + 1, "dec": x if old == 0 or old > x else old - 1,
    }[name]  # fmt: skip
    return (found + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("name", "kind"), REDUCED)
def test_a_bulk_copy_reduces_into_global_memory(name, kind, late):
    dtype = KINDS[kind.removeprefix("noftz.")]
    n, g = 256 // dtype.itemsize, torch.Generator().manual_seed(2)
    if dtype.is_floating_point:
        x, out = (torch.randn(n, generator=g).to(dtype) for _ in range(2))
        want = out + x
    else:
        few = name in ("inc", "dec")
        x, out = (
            torch.randint(0 if few else -9, 4 if few else 9, (n,), generator=g).to(dtype) << (0 if few else 20)
            for _ in range(2)
        )
        pairs = zip(out.tolist(), x.tolist(), strict=True)
        want = torch.tensor([reduced(name, kind, old, new) for old, new in pairs], dtype=dtype)
    copy = f"@%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.{name}.{kind} [%a1], [%r1], 256;\n"
    module = make_kernel(START + FILL + FENCE + copy + DONE, shared=8192, target="sm_90a")
    result = module.launch(
        "k", 1, (x.view(torch.float32), out.view(torch.float32)), num_warps=2, options=Options(late=late)
    )
    assert not result.findings and torch.equal(out, want)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("left", [0, 1])
def test_groups_of_bulk_stores_are_waited_for_in_order(left, late):
    x, out = torch.randn(64), torch.zeros(2, 64)
    body = START + FILL + FENCE
    for i in range(2):
        body += f"@%p1 cp.async.bulk.global.shared::cta.bulk_group [%a1+{256 * i}], [%r1], 256;\n"
        body += "cp.async.bulk.commit_group;\n"
    body += f"cp.async.bulk.wait_group {left}; @%p1 ld.global.b32 %r9, [%a1+256]; @%p1 st.global.b32 [%a2], %r9;"
    seen = torch.zeros(1)
    module = make_kernel(body, params=3, shared=8192, target="sm_90a")
    result = module.launch("k", 1, (x, out, seen), num_warps=2, options=Options(late=late))
    assert not result.findings and out.equal(torch.stack([x, x]))
    assert seen.item() == (0 if late and left else x[0].item())


# ---- tensor maps ----------------------------------------------------------------------------------------------------

LOAD_TILE = "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
INIT = "@%p1 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0;\n"


def load_by(fields="", start="0, 0", expect=1024):
    """Return a kernel that copies a map into its own memory, changes fields of it, loads a tile by it, and shows it."""
    body = START + INIT + "mad.wide.u32 %d2, %t, 4, %a0; add.s32 %r7, %r6, 2048; setp.lt.u32 %p3, %t, 32;\n"
    body += "@%p3 ld.global.b32 %r8, [%d2]; @%p3 st.shared.b32 [%r7], %r8; bar.sync 0;\n"
    body += fields + "setp.ge.u32 %p4, %t, 32; @%p4 bra ON; add.s32 %r9, %r1, 2048;\n"
    body += "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
    body += "[%a1], [%r9], 128;\nON: bar.sync 0; fence.proxy.tensormap::generic.acquire.gpu [%a1], 128;\n"
    body += f"@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {expect};\n"
    body += f"@%p1 {LOAD_TILE} [%r1], [%a1, {{{start}}}], [%r2];\n"
    body += "WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT; mov.b32 %r10, %t;\n"
    body += "LOOP: mad.lo.s32 %r11, %r10, 4, %r1; ld.shared.b32 %r12, [%r11]; mad.wide.u32 %d3, %r10, 4, %a2;\n"
    body += "st.global.b32 [%d3], %r12; add.s32 %r10, %r10, 64;\n"
    body += f"setp.lt.u32 %p5, %r10, {expect // 4}; @%p5 bra LOOP;"
    return make_kernel(body, params=3, shared=8192, target="sm_90a")


def aligned(n):
    memory = torch.zeros(n + 128, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 128 :][:n]


def replace(field, value, index=None, width=32):
    number = "" if index is None else f"{index}, "
    return f"@%p1 tensormap.replace.tile.{field}.shared::cta.b1024.b{width} [%r7], {number}{value};\n"


def test_a_kernel_makes_a_map_of_its_own():
    """Every field of a map of nothing, so that it is the one that the host would have made."""
    x = torch.randn(40, 72).bfloat16()
    host = torch.frombuffer(bytearray(encode_tensor_map(x, (8, 64), 128)), dtype=torch.uint8)
    given, made, tile = aligned(128), aligned(128), torch.zeros(512, dtype=torch.bfloat16)
    given.fill_(0)
    fields = replace("rank", 1) + replace("elemtype", 10) + replace("interleave_layout", 0) + replace("swizzle_mode", 3)
    fields += replace("fill_mode", 0) + replace("global_stride", 144, 0, 64)
    fields += f"@%p1 mov.b64 %d9, {x.data_ptr()}; " + replace("global_address", "%d9", None, 64)
    for i, (size, box) in enumerate(((72, 64), (40, 8))):
        fields += replace("global_dim", size, i) + replace("box_dim", box, i) + replace("element_stride", 1, i)
    result = load_by(fields, start="8, 30").launch("k", 1, (given, made, tile), num_warps=2, tensors={"x": x})
    assert not result.findings
    want = torch.zeros(8, 64, dtype=torch.bfloat16)
    want[:] = x[30:38, 8:72]
    pieces = want.view(8, 8, 8)
    placed = torch.stack([torch.stack([pieces[r, c ^ r] for c in range(8)]) for r in range(8)])
    assert torch.equal(tile.view(8, 8, 8), placed)
    meant = ctypes.c_uint64.from_buffer_copy(bytes(host[:8].tolist())).value
    assert meant == ctypes.c_uint64.from_buffer_copy(bytes(made[:8].tolist())).value == x.data_ptr()


FAULTS = {
    "has 2 axes": ("", {"start": "0, 0, 0"}), "is of a type or layout": (replace("elemtype", 13), {}),
    "or layout that is not known": (replace("interleave_layout", 1), {}),
    "layout that is not known": (replace("swizzle_mode", 4), {}),
    "box has an axis of 257": (replace("box_dim", 257, 1), {}),
    "box has an axis of 0": (replace("box_dim", 0, 1), {}),
    "has steps over elements": (replace("element_stride", 2, 0), {}),
    "has steps": (replace("element_stride", 2, 1), {}),
    "stride is no multiple of 16": (replace("global_stride", 136, 0, 64), {}),
    "box has rows of 120 bytes, no multiple of 16": (replace("box_dim", 60, 0), {}),
    "box has rows of 144 bytes, over the swizzle's": (replace("box_dim", 72, 0), {}),
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS)
def test_a_map_that_no_copy_takes_is_told(text):
    fields, more = FAULTS[text]
    x = torch.randn(40, 72).bfloat16()
    given, made, tile = aligned(128), aligned(128), torch.zeros(512, dtype=torch.bfloat16)
    given.copy_(torch.frombuffer(bytearray(encode_tensor_map(x, (8, 64), 128)), dtype=torch.uint8))
    module = load_by(fields, **more)
    if more:
        module = type(module)(module.ptx.replace("bulk.tensor.2d", "bulk.tensor.3d"))
    result = module.launch("k", 1, (given, made, tile), num_warps=2, tensors={"x": x})
    assert "descriptor" in find_kinds(result)
    (told,) = [finding.text for finding in result.findings if finding.kind == "descriptor"]
    assert told.startswith("the tensor map's ") and text in told


def test_what_lies_outside_of_a_tensor_is_nan_where_a_map_asks_for_it():
    x = torch.randn(40, 72)
    given, made, tile = aligned(128), aligned(128), torch.zeros(256)
    given.copy_(torch.frombuffer(bytearray(encode_tensor_map(x, (8, 32), 128)), dtype=torch.uint8))
    result = load_by(replace("fill_mode", 1), start="48, 36").launch(
        "k", 1, (given, made, tile), num_warps=2, tensors={"x": x}
    )
    pieces = tile.view(8, 8, 4)
    placed = torch.stack([torch.stack([pieces[r, c ^ r] for c in range(8)]) for r in range(8)]).view(8, 32)
    assert not result.findings and torch.equal(placed[:4, :24], x[36:, 48:])
    assert placed[4:].isnan().all() and placed[:, 24:].isnan().all()
