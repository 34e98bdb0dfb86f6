"""Asynchronous work on the PTX machine: mbarriers, bulk copies, tiles of tensors, named barriers."""

import re

import numpy as np
import pytest
import torch

from kernels.compiled.ptx import Options
from kernels.compiled.tensor_map import encode_tensor_map
from tests.helpers.hand_ptx import find_kinds, make_kernel

MODES = pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
ADDRESSES = (
    "mov.u32 %r1, memory; add.s32 %r2, %r1, 4096; setp.eq.u32 %p1, %t, 0;\n"  # data, mbarriers, the first thread
)
INIT = "@%p1 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0;\n"
WAIT = "WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT;\n"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {0};\n"
BULK_LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
OWN = (
    "shl.b32 %r5, %t, 2; add.s32 %r6, %r1, %r5; mad.wide.u32 %d1, %t, 4, %a1;\n"  # the thread's word, and place in out
)
READ = OWN + "ld.shared.b32 %r7, [%r6]; st.global.b32 [%d1], %r7;\n"


def launch(body, *args, late=False, warps=2, shared=8192, maps=0, reverse=False):
    module = make_kernel(ADDRESSES + body, params=len(args) - maps, shared=shared, target="sm_90a", maps=maps)
    return module.launch("k", 1, args, num_warps=warps, options=Options(late=late, reverse=reverse))


# ---- mbarriers and runs of bytes ------------------------------------------------------------------------------------

BULK = EXPECT.format(256) + f"@%p1 {BULK_LOAD} [%r1], [%a0], 256, [%r2];\n"


@MODES
def test_a_bulk_copy_is_there_after_the_wait(late):
    x, out = torch.randn(64), torch.zeros(64)
    result = launch(INIT + BULK + WAIT + READ, x, out, late=late)
    assert not result.findings and out.equal(x)
    assert (result.counters["load_bytes"], result.counters["load_sectors"]) == (256, 8 + (x.data_ptr() % 32 > 0))


def test_a_bulk_copy_that_is_not_waited_for_is_a_race_and_changes_the_result():
    x, out = torch.randn(64), torch.zeros(64)
    result = launch(INIT + BULK + READ, x, out, late=True)
    assert find_kinds(result) == {"race"} and not out.equal(x)
    assert "what a bulk copy wrote" in result.findings[0].text


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        ("race", INIT.replace("bar.sync 0;", "") + BULK + WAIT, "reads what warp 0 wrote"),
        ("mbarrier", BULK, "not initialised"),
        ("mbarrier", INIT + WAIT, "waits for ever"),
        ("mbarrier", INIT + EXPECT.format(512) + BULK.split("\n")[1] + WAIT, "waits for ever"),
        ("mbarrier", INIT + "@%p1 mbarrier.arrive.shared.b64 _, [%r2], 2;", "more arrivals than it counts"),
        ("global", INIT + BULK.replace("256", "512"), "256 bytes after|bytes, 0 bytes after the end"),
        ("misaligned", INIT + BULK.replace("[%r1]", "[%r1+8]"), "bulk copy"),
        ("proxy", "st.shared.b32 [%r1], 7; bar.sync 0;" + INIT + BULK + WAIT, "overwrites what warp 1 wrote"),
    ],
)
def test_what_a_kernel_must_not_do_with_an_mbarrier_is_found(kind, body, text):
    result = launch(body, torch.randn(64), torch.zeros(64))
    assert kind in find_kinds(result)
    assert any(re.search(text, f.text) for f in result.findings), [f.text for f in result.findings]


PIPELINE = """
@%p1 mbarrier.init.shared.b64 [%r2], 1; @%p1 mbarrier.init.shared.b64 [%r2+8], 1;
@%p1 mbarrier.init.shared.b64 [%r2+16], 32; @%p1 mbarrier.init.shared.b64 [%r2+24], 32; bar.sync 0;
mov.u32 %r10, 0; setp.lt.u32 %p3, %t, 32; @%p3 bra CONSUME;
and.b32 %r20, %t, 31; setp.ne.u32 %p4, %r20, 0; @%p4 bra END;
PRODUCE:
and.b32 %r11, %r10, 1; shl.b32 %r12, %r11, 3; add.s32 %r12, %r12, %r2; shl.b32 %r13, %r11, 9; add.s32 %r13, %r13, %r1;
shr.u32 %r14, %r10, 1; and.b32 %r14, %r14, 1; xor.b32 %r15, %r14, 1;
EMPTY: mbarrier.try_wait.parity.shared.b64 %p2, [%r12+16], %r15; @!%p2 bra EMPTY;
mbarrier.arrive.expect_tx.shared.b64 _, [%r12], 128;
cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r13], [%a0], 128, [%r12];
add.s64 %a0, %a0, 128; add.s32 %r10, %r10, 1; setp.lt.u32 %p5, %r10, 7; @%p5 bra PRODUCE;
bra END;
CONSUME: mad.wide.u32 %d1, %t, 4, %a1;
NEXT:
and.b32 %r11, %r10, 1; shl.b32 %r12, %r11, 3; add.s32 %r12, %r12, %r2; shl.b32 %r13, %r11, 9; add.s32 %r13, %r13, %r1;
shr.u32 %r14, %r10, 1; and.b32 %r14, %r14, 1;
FULL: mbarrier.try_wait.parity.shared.b64 %p2, [%r12], %r14; @!%p2 bra FULL;
shl.b32 %r16, %t, 2; add.s32 %r16, %r16, %r13; ld.shared.b32 %r17, [%r16]; st.global.b32 [%d1], %r17;
mbarrier.arrive.shared.b64 %d5, [%r12+16];
add.s64 %d1, %d1, 128; add.s32 %r10, %r10, 1; setp.lt.u32 %p5, %r10, 7; @%p5 bra NEXT;
END:
"""


@MODES
@pytest.mark.parametrize("reverse", [False, True])
def test_a_producer_and_a_consumer_pass_two_buffers_to_and_fro(late, reverse):
    x, out = torch.randn(7 * 32), torch.zeros(7 * 32)
    result = launch(PIPELINE, x, out, late=late, reverse=reverse)
    assert not result.findings and out.equal(x)


def test_a_producer_that_does_not_wait_for_an_empty_buffer_is_a_race():
    lines = [line for line in PIPELINE.splitlines() if not line.startswith("EMPTY")]
    result = launch("\n".join(lines), torch.randn(7 * 32), torch.zeros(7 * 32))
    assert "race" in find_kinds(result)


@MODES
def test_an_arrival_returns_a_token_to_wait_with(late):
    body = INIT + "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 256;\n"
    body += "@%p1 mbarrier.arrive.shared.b64 %d3, [%r2]; @%p1 st.shared.b64 [%r1+1024], %d3;\n"
    body += f"@%p1 {BULK_LOAD} [%r1], [%a0], 256, [%r2]; bar.sync 0; ld.shared.b64 %d3, [%r1+1024];\n"
    body += "WAIT: mbarrier.test_wait.shared.b64 %p2, [%r2], %d3; @!%p2 bra WAIT;\n"
    x, out = torch.randn(64), torch.zeros(64)
    result = launch(body + READ, x, out, late=late)
    assert not result.findings and out.equal(x)


@MODES
def test_an_mbarrier_counts_copies_of_cp_async(late):
    body = "@%p1 mbarrier.init.shared.b64 [%r2], 64; bar.sync 0;" + OWN + "mad.wide.u32 %d2, %t, 4, %a0;\n"
    body += "cp.async.ca.shared.global [%r6], [%d2], 4; cp.async.mbarrier.arrive.noinc.shared.b64 [%r2];\n" + WAIT
    body += "xor.b32 %r8, %r5, 252; add.s32 %r8, %r8, %r1; ld.shared.b32 %r7, [%r8]; st.global.b32 [%d1], %r7;"
    x, out = torch.randn(64), torch.zeros(64)
    result = launch(body, x, out, late=late)
    assert not result.findings and out.equal(x.flip(0))
    result = launch(body.replace(WAIT, "bar.sync 0;"), x, out.zero_(), late=late)
    assert find_kinds(result) == {"race"} and out.equal(x.flip(0)) is not late


# ---- bulk stores ----------------------------------------------------------------------------------------------------

FILL = OWN + "mad.wide.u32 %d2, %t, 4, %a0; ld.global.b32 %r7, [%d2]; st.shared.b32 [%r6], %r7;\n"
FENCE, COMMIT = "fence.proxy.async.shared::cta; bar.sync 0;\n", "cp.async.bulk.commit_group;\n"
STORE = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%a1], [%r1], 256;\n"
WAIT_STORE = "cp.async.bulk.wait_group.read 0;\n"
OVERWRITE = "bar.sync 0; st.shared.b32 [%r6], 7;\n"


@MODES
def test_a_bulk_store(late):
    x, out = torch.randn(64), torch.zeros(64)
    result = launch(FILL + FENCE + STORE + COMMIT + WAIT_STORE + OVERWRITE, x, out, late=late)
    assert not result.findings and out.equal(x) and result.counters["store_bytes"] == 256


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("proxy", FILL + "bar.sync 0;" + STORE + COMMIT + WAIT_STORE),
        ("proxy", FILL + "@%p1 fence.proxy.async.shared::cta; bar.sync 0;" + STORE + COMMIT + WAIT_STORE),
        ("race", FILL + FENCE + STORE + COMMIT + OVERWRITE),
        ("race", FILL + "fence.proxy.async;" + STORE + COMMIT + WAIT_STORE),
    ],
)
def test_a_bulk_store_without_fence_barrier_or_wait_is_found(kind, body):
    assert kind in find_kinds(launch(body, torch.randn(64), torch.zeros(64)))


@pytest.mark.parametrize(
    ("name", "dtype"), [("f32", torch.float32), ("noftz.bf16", torch.bfloat16), ("noftz.f16", torch.float16)]
)
@MODES
def test_a_reducing_bulk_store_adds(name, dtype, late):
    x, out = torch.randn(256 // dtype.itemsize).to(dtype), torch.randn(256 // dtype.itemsize).to(dtype)
    want = out + x
    reduce = f"@%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.{name} [%a1], [%r1], 256;\n"
    result = launch(
        FILL + FENCE + reduce + COMMIT + WAIT_STORE, x.view(torch.float32), out.view(torch.float32), late=late
    )
    assert not result.findings and out.equal(want)


# ---- tiles of tensors -----------------------------------------------------------------------------------------------


def place_tile(tile, swizzle):
    """Return the 16-byte pieces of a tile (rows, bytes) where a swizzle puts them, by row and piece of a row."""
    pieces = tile.contiguous().view(torch.uint8).reshape(-1, tile.shape[-1] * tile.element_size() // 16, 16)
    rows, columns = np.arange(len(pieces))[:, None], np.arange(pieces.shape[1])[None, :]
    per_line = 128 // (16 * pieces.shape[1])  # rows of a tile in 128 bytes
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    placed = torch.empty_like(pieces)
    placed[rows, columns ^ (rows // per_line & mask)] = pieces
    return placed.reshape(-1)


def cut(x, box, start):
    """Return the tile of x at start; what lies outside is 0."""
    tile = torch.zeros(box, dtype=x.dtype)
    inside = [(max(0, s), min(n, s + b)) for s, n, b in zip(start, x.shape, box, strict=True)]
    source = tuple(slice(low, max(low, high)) for low, high in inside)
    target = tuple(slice(low - s, max(low, high) - s) for (low, high), s in zip(inside, start, strict=True))
    tile[target] = x[source]
    return tile


MAP = "mov.b64 %d10, m0; cvta.param.u64 %d10, %d10;\n"
TILE_CASES = [
    ((50, 72), (16, 64), (20, 8), 128),
    ((50, 72), (16, 64), (40, 40), 128),
    ((50, 72), (8, 64), (-3, -7), 128),
    ((50, 72), (16, 32), (20, 8), 64),
    ((50, 72), (16, 16), (49, 71), 32),
    ((50, 72), (16, 24), (1, 3), 0),
    ((300,), (64,), (250,), 0),
    ((3, 10, 40), (2, 4, 32), (2, 7, 16), 64),
    ((2, 3, 4, 5, 16), (1, 2, 2, 3, 16), (1, 2, 1, 3, 0), 32),
]


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "box", "start", "swizzle"), TILE_CASES)
def test_a_tile_is_loaded_and_stored(shape, box, start, swizzle, dtype, late):
    if dtype is torch.float32:  # the same bytes in a row
        box = (*box[:-1], box[-1] // 2)
    x = torch.randn(shape).to(dtype)
    padded = torch.randn(*shape[:-1], shape[-1] + 16 // dtype.itemsize).to(dtype)
    back, untouched = padded[..., : shape[-1]], padded.clone()
    n = torch.Size(box).numel() * dtype.itemsize
    out = torch.zeros(n, dtype=torch.uint8)
    at = "{" + ", ".join(map(str, reversed(start))) + "}"
    rank = len(shape)
    body = MAP + MAP.replace("%d10", "%d11").replace("m0", "m1") + INIT + EXPECT.format(n)
    load = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes"
    body += f"@%p1 {load} [%r1], [%d10, {at}], [%r2];\n" + WAIT
    body += f"mov.u32 %r5, %t; LOOP: setp.ge.u32 %p3, %r5, {n // 4}; @%p3 bra DONE; shl.b32 %r6, %r5, 2;\n"
    body += "add.s32 %r7, %r6, %r1; ld.shared.b32 %r8, [%r7]; cvt.u64.u32 %d1, %r6; add.s64 %d1, %d1, %a0;\n"
    body += "st.global.b32 [%d1], %r8; add.s32 %r5, %r5, 64; bra LOOP; DONE:\n"
    body += f"@%p1 cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [%d11, {at}], [%r1];\n"
    body += COMMIT + "cp.async.bulk.wait_group 0;\n"
    maps = [encode_tensor_map(t, box, swizzle) for t in (x, back)]
    module = make_kernel(ADDRESSES + body, params=1, shared=8192, target="sm_90a", maps=2)
    result = module.launch(
        "k", 1, (out, *maps), num_warps=2, tensors={"x": x, "back": back}, options=Options(late=late)
    )
    assert not result.findings
    tile = cut(x, box, start)
    assert out.equal(place_tile(tile, swizzle))
    region = tuple(slice(max(0, s), max(0, s + b)) for s, b in zip(start, box, strict=True))
    untouched[..., : shape[-1]][region] = x[region]
    assert padded.equal(untouched)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("has 2 axes", {"rank": 3}),
        ("over the swizzle's", {"box": (8, 128)}),
        ("no multiple of 16", {"box": (8, 12)}),
        ("shared address is no multiple of 128", {"to": "%r1+16"}),
        ("address is no multiple of 16", {"skip": 1}),
    ],
)
def test_a_tensor_map_that_no_copy_takes_is_found(text, change):
    change = {"rank": 2, "box": (8, 64), "to": "%r1", "skip": 0} | change
    x = torch.zeros(16, 136).bfloat16()[:, change["skip"] :][:, :128]
    at = "{" + ", ".join("0" * change["rank"]) + "}"
    load = f"cp.async.bulk.tensor.{change['rank']}d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
    body = MAP + INIT + f"@%p1 {load} [{change['to']}], [%d10, {at}], [%r2];\n"
    module = make_kernel(ADDRESSES + body, params=0, shared=8192, target="sm_90a", maps=1)
    result = module.launch("k", 1, (encode_tensor_map(x, change["box"], 128),), num_warps=1, tensors={"x": x})
    assert find_kinds(result) == {"descriptor"} and text in result.findings[0].text


@pytest.mark.parametrize("arguments", [((4, 4, 2), {}), ((4,), {}), ((4, 4), {"swizzle_bytes": 16})])
def test_what_no_tensor_map_can_describe_is_refused(arguments):
    box, options = arguments
    with pytest.raises(ValueError, match="tensor map: shape"):
        encode_tensor_map(torch.zeros(8, 8), box, **options)


# ---- named barriers and the rest ------------------------------------------------------------------------------------


def test_named_barriers_order_those_who_arrive():
    # Warps 0 and 1 meet at barrier 1; warps 2 and 3 arrive at barrier 2, where warps 0 and 1 wait for their words.
    body = OWN + "st.shared.b32 [%r6], %t; setp.lt.u32 %p3, %t, 64; @!%p3 bar.arrive 2, 128; @!%p3 bra END;\n"
    body += "bar.sync 1, 64; xor.b32 %r8, %r5, 128; add.s32 %r8, %r8, %r1; ld.shared.b32 %r9, [%r8];\n"
    body += "bar.sync 2, 128; add.s32 %r8, %r8, 256; ld.shared.b32 %r10, [%r8]; add.s32 %r9, %r9, %r10;\n"
    body += "st.global.b32 [%d1], %r9; END:\n"
    out = torch.zeros(64, dtype=torch.int32)
    x = torch.zeros(1)
    for reverse in (False, True):
        result = launch(body, x, out.zero_(), warps=4, reverse=reverse)
        assert not result.findings and out.tolist() == [2 * (i ^ 32) + 64 for i in range(64)]
    for barrier in ("bar.sync 1, 64;", "bar.sync 2, 128;"):
        assert {"race", "uninitialised"} & find_kinds(launch(body.replace(barrier, ""), x, out, warps=4))
    never = launch(body.replace("bar.arrive 2, 128", "bar.arrive 3, 128"), x, out, warps=4)
    assert "barrier" in find_kinds(never) and "waits for ever" in never.findings[0].text


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("bar.red.popc.u32 %r7, 0, %p3;", 40),
        ("bar.red.popc.u32 %r7, 0, !%p3;", 24),
        ("bar.red.and.pred %p4, 0, %p3; selp.b32 %r7, 1, 0, %p4;", 0),
        ("bar.red.or.pred %p4, 0, %p3; selp.b32 %r7, 1, 0, %p4;", 1),
    ],
)
def test_a_barrier_reduces_a_predicate(text, want):
    out = torch.zeros(64, dtype=torch.int32)
    body = OWN + f"setp.lt.u32 %p3, %t, 40; {text} st.global.b32 [%d1], %r7;"
    assert not launch(body, torch.zeros(1), out).findings and out.tolist() == [want] * 64


def test_one_lane_of_a_warp_is_elected():
    out = torch.zeros(64, dtype=torch.int32)
    body = OWN + "setmaxnreg.inc.sync.aligned.u32 232; griddepcontrol.wait;\n"
    body += "elect.sync _|%p3, -1; selp.b32 %r7, 1, 0, %p3; st.global.b32 [%d1], %r7;"
    assert not launch(body, torch.zeros(1), out).findings
    assert out.nonzero().flatten().tolist() == [0, 32]
