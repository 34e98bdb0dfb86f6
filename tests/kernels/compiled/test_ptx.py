"""The PTX machine's checks, counters and errors, by kernels written by hand."""

import pytest
import torch

from kernels.compiled import machine_library
from kernels.compiled.ptx import Module, PtxError, find_extent
from tests.helpers.hand_ptx import find_kinds, make_kernel

OWN_WORD = "shl.b32 %r1, %t, 2; mov.u32 %r2, memory; add.s32 %r1, %r1, %r2;\n"  # %r1: the thread's, in shared memory


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("shared", OWN_WORD + "st.shared.b32 [%r1+192], %t;"),
        ("misaligned", OWN_WORD + "st.shared.b32 [%r2+2], 7;"),
        ("uninitialised", OWN_WORD + "ld.shared.b32 %r3, [%r1];"),
        ("race", OWN_WORD + "st.shared.b32 [%r2], %t;"),
        ("converged", "setp.lt.u32 %p1, %t, 5; @%p1 shfl.sync.bfly.b32 %r3, %t, 1, 31, -1;"),
        ("global", "st.global.b32 [%a0+256], %t;"),
        ("barrier", "setp.lt.u32 %p1, %t, 32; @%p1 bar.sync 0;"),
        ("barrier", "setp.lt.u32 %p1, %t, 16; @%p1 bar.sync 0;"),
    ],
)
def test_what_a_kernel_must_not_do_is_found(kind, body):
    result = make_kernel(body, params=1, shared=256).launch("k", 1, (torch.zeros(64),), num_warps=2)
    assert find_kinds(result) == {kind}


@pytest.mark.parametrize(
    ("instruction", "n_bytes"),
    [
        ("ld.global.b16 %h1, [%a0];", 2), ("ld.global.b32 %r1, [%a0];", 4), ("ld.global.b64 %d1, [%a0];", 8),
        ("ld.global.v2.b32 {%r1, %r2}, [%a0];", 8), ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a0];", 16),
        ("st.global.b16 [%a0], %h1;", 2), ("st.global.v4.b32 [%a0], {%r1, %r2, %r3, %r4};", 16),
        ("atom.global.add.u32 %r1, [%a0], 1;", 4), ("red.global.add.f64 [%a0], %d1;", 8),
        ("cp.async.cg.shared.global [memory], [%a0], 16; cp.async.wait_all;", 16),
    ],
)  # fmt: skip
def test_an_access_of_which_one_byte_lies_past_a_tensor_is_found(instruction, n_bytes):
    module = make_kernel(f"setp.eq.u32 %p1, %t, 0; @!%p1 bra END; {instruction} END:", params=1, shared=64)
    fits, short = (torch.zeros(n_bytes - less, dtype=torch.uint8) for less in (0, 1))
    assert not module.launch("k", 1, (fits,), num_warps=1).findings
    assert find_kinds(module.launch("k", 1, (short,), num_warps=1)) == {"global"}


@pytest.mark.parametrize(("tensors", "name"), [(["weights"], "weights"), ([], "an argument")])
def test_an_access_past_a_tensor_tells_its_name(tensors, name):
    memory = torch.zeros(64)
    given = memory[:16]
    result = make_kernel("st.global.b32 [%a0+80], 7;", params=1).launch(
        "k", 1, (given,), num_warps=1, tensors=dict.fromkeys(tensors, given)
    )
    (finding,) = result.findings
    assert finding.text.endswith(f"16 bytes after the end of {name}") and finding.kind == "global"


def test_a_tensor_beside_the_arguments_may_be_reached():
    """By its address within a table, say."""
    table, reached = torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    table[0] = reached.data_ptr()
    module = make_kernel("ld.global.b64 %d1, [%a0]; st.global.b32 [%d1+12], 7;", params=1)
    assert not module.launch("k", 1, (table,), num_warps=1, tensors={"reached": reached}).findings
    assert reached.tolist() == [0, 0, 0, 7]
    assert find_kinds(module.launch("k", 1, (table,), num_warps=1)) == {"global"}


@pytest.mark.parametrize(
    ("size", "stride", "first", "extent"),
    [
        ((4, 8), (8, 1), 0, (0, 32)), ((4, 3), (8, 1), 0, (0, 32)), ((4, 3), (8, 1), 5, (5, 32)),
        ((2, 3), (8, 1), 8, (8, 24)), ((3,), (4,), 1, (1, 13)), ((), (), 31, (31, 32)),
    ],
)  # fmt: skip
def test_a_view_reaches_to_its_last_rows_padding_and_never_past_its_memory(size, stride, first, extent):
    memory = torch.zeros(32)
    start, end = find_extent(memory.as_strided(size, stride, first))
    assert ((start - memory.data_ptr()) / 4, (end - memory.data_ptr()) / 4) == extent


def test_accesses_that_barriers_order_are_no_finding():
    body = OWN_WORD + "st.shared.b32 [%r1], %t; bar.sync 0; ld.shared.b32 %r3, [%r2+128]; bar.sync 0;"
    body += "st.shared.b32 [%r2+128], %r3;"
    result = make_kernel(body, params=1, shared=256).launch("k", 1, (torch.zeros(64),), num_warps=2)
    assert not result.findings and result.counters["barriers"] == 2


@pytest.mark.parametrize(("stride", "cycles"), [(4, 1), (8, 2), (128, 32), (132, 1), (0, 1)])
def test_bank_conflicts_are_counted(stride, cycles):
    body = f"mul.lo.s32 %r1, %t, {stride}; mov.u32 %r2, memory; add.s32 %r1, %r1, %r2; st.shared.b32 [%r1], 7;"
    result = make_kernel(body, params=1, shared=8192).launch("k", 1, (torch.zeros(1),), num_warps=1)
    assert (result.counters["shared_cycles"], result.counters["shared_ideal_cycles"]) == (cycles, 1)
    assert [access.cycles for access in result.slow] == [cycles] * (cycles > 1)


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (16, 16), (32, 32), (0, 1)])
def test_sectors_are_counted(stride, sectors):
    x = torch.zeros(1024)
    body = f"mad.wide.u32 %d1, %t, {stride}, %a0; ld.global.b32 %r1, [%d1];"
    aligned = x[-x.data_ptr() % 32 // 4 :]
    result = make_kernel(body, params=1).launch("k", 1, (aligned,), num_warps=1)
    assert result.counters["load_sectors"] == sectors
    assert [access.sectors for access in result.slow] == [sectors] * (stride != 4)


@pytest.mark.parametrize(
    "text", ["tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;", "add.rz.f64 %d1, %d1, %d2;"]
)
def test_an_unknown_instruction_is_named(text):
    with pytest.raises(PtxError, match=f"{text.split()[0]}"):
        make_kernel(text)


WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10,%r11,%r12,%r13}, {%r14,%r15,%r16,%r17}, %d1, "
WGMMA += "1, 1, 1, 0;\n"
FENCE, DONE = "wgmma.fence.sync.aligned;\n", "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (FENCE + WGMMA + DONE + "mov.b32 %r15, 0; mov.b32 %r5, %r10;", None),
        ("mov.b32 %r15, 0;" + FENCE + WGMMA + WGMMA + DONE, None),
        (FENCE + "add.s32 %r9, %r1, %r2; mov.b32 %r15, 0;" + WGMMA + DONE, "after the wgmma.fence"),
        (FENCE + "mov.b32 %r12, 0;" + WGMMA + DONE, "after the wgmma.fence"),
        (
            FENCE + "LOOP: " + WGMMA + DONE + "mov.b32 %r15, 0; @%p1 bra LOOP;",
            "after the wgmma.fence",
        ),  # from turn to turn
        (FENCE + WGMMA + "mov.b32 %r5, %r12;" + DONE, "reads: the result of a wgmma that no wait has finished"),
        (FENCE + WGMMA + "mov.b32 %r12, 0;" + DONE, "writes: an operand of a wgmma that no wait has finished"),
        (FENCE + WGMMA + "mov.b32 %r15, 0;" + DONE, "writes: an operand of a wgmma that no wait has finished"),
    ],
)
def test_registers_of_wgmma_are_left_alone_between_its_fence_and_its_wait(body, text):
    start = "setp.lt.u32 %p1, %t, 0; mul.wide.u32 %d1, %t, 0; shl.b32 %r1, %t, 2; mov.u32 %r2, memory;\n"
    start += "add.s32 %r1, %r1, %r2; st.shared.b32 [%r1], 0; fence.proxy.async; bar.sync 0;\n"
    result = make_kernel(start + body, params=0, shared=512, target="sm_90a").launch("k", 1, ())
    assert [text is not None and text in finding.text for finding in result.findings] == [True] * bool(text)


def test_a_launch_that_does_not_fit_is_refused():
    module = make_kernel("", params=1)
    with pytest.raises(PtxError, match="k: 2 arguments, wanted 1 of"):
        module.launch("k", 1, (None, None))
    with pytest.raises(PtxError, match="other: no such kernel, wanted one of k"):
        module.launch("other", 1, ())
    for block in ((1025,), (32, 33), (8, 8, 17), (0,), (32, 0)):
        with pytest.raises(PtxError, match="k: a block has 1 to 1024 threads"):
            module.launch("k", 1, (None,), block=block)
    assert module.launch("k", 1, (None,), block=(8, 8, 16)).counters["lanes"] % 1024 == 0
    with pytest.raises(PtxError, match="a tensor on meta, wanted one on the CPU"):
        module.launch("k", 1, (torch.empty(1, device="meta"),))


def test_a_machine_that_cannot_be_loaded_says_so(monkeypatch):
    monkeypatch.setattr(machine_library, "ABI_VERSION", 0)
    with pytest.raises(PtxError, match=r"PTX machine: .* has ABI \d+, wanted 0.*only running compiled kernels"):
        machine_library.load_library.__wrapped__()


def test_text_that_is_no_ptx_is_refused():
    with pytest.raises(PtxError, match="line 1"):
        Module("hello")
