"""The orders that wgmma needs: in short texts, and in what attention compiles to under both Tritons."""

import json
import sys
from pathlib import Path

import pytest
import torch

from kernels.compiled.async_order import find_unordered
from kernels.ops import async_proxy, attention, common
from tests.helpers.compiler import run_compiler

OLDEST = Path(sys.prefix) / "triton-3.6"  # put there by `make test`
WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0,%r1,%r2,%r3}, {%r4,%r5,%r6,%r7}, %rd1, 1, 1, 1, 0;"
FENCE = "fence.proxy.async.shared::cta;"
IN_ORDER = ["cp.async.wait_group 2;", "bar.sync 0;", FENCE, "cvt.rn.bf16x2.f32 %r4, %r9, %r8;", "wgmma.fence;", WGMMA]


def found_in(*lines):
    """Return what each matrix instruction reads without an order: "shared memory" or a register."""
    return [phrase.split(" reads ")[1].split(" written ")[0] for phrase in find_unordered("\n".join(lines))]


def test_the_order_of_what_triton_ships_is_accepted():
    assert found_in(*IN_ORDER) == []
    assert found_in(*IN_ORDER[:3], "wgmma.fence;", WGMMA, WGMMA) == []  # products in a row share a fence


@pytest.mark.parametrize(
    "write",
    [
        "cp.async.wait_group 0;", "cp.async.wait_all;", "st.shared.b32 [%r1], %r2;", "@%p1 st.shared.b32 [%r1], %r2;",
        "st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};", "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r1], {%r2, %r3};",
    ],
)  # fmt: skip
def test_a_write_of_shared_memory_without_a_proxy_fence_is_found(write):
    assert found_in(FENCE, write, "bar.sync 0;", "wgmma.fence;", WGMMA) == ["shared memory"]
    assert found_in(write, f"{FENCE} mov.b32 %r1, 0;", "wgmma.fence;", WGMMA) == []  # two instructions in one line


def test_a_register_written_after_the_fence_is_found():
    assert found_in(*IN_ORDER[:4], WGMMA) == ["%r4"]
    assert found_in("wgmma.fence;", "ldmatrix.x4.shared.b16 {%r4, %r5, %r90, %r91}, [%r2];", WGMMA) == ["%r4", "%r5"]
    assert found_in("wgmma.fence;", "mov.b32 %r44, %r4;", WGMMA) == []  # read, and another's name


def test_a_write_counts_on_any_path():
    loop = ["$L1:", WGMMA, "cp.async.wait_group 0;", "@%p1 bra $L1;", "ret;"]
    assert found_in(FENCE, *loop) == ["shared memory"]  # in the second round
    assert found_in(FENCE, *loop[:3], FENCE, *loop[3:]) == []
    around = ["cp.async.wait_group 0;", "@%p1 bra $L1;", FENCE, "$L1:", WGMMA]
    assert found_in(*around) == ["shared memory"]
    assert found_in("bra.uni $L1;", "cp.async.wait_group 0;", "$L1:", WGMMA) == []  # nothing reaches the wait


def test_sm_100_is_refused_under_a_triton_without_its_fences(monkeypatch):
    gpu = torch.device("cuda")
    heads = torch.empty(1, 1, 64, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(common, "chip_override", "sm_100")
    monkeypatch.setattr(async_proxy, "TRITON", (3, 8))
    with pytest.raises(
        RuntimeError, match=r"attention: Triton .* of sm_100 needs; wanted Triton 3\.9 or newer, or fp32"
    ):
        async_proxy.adds_orders("attention", gpu)
    assert not attention._config("forward", heads)["ORDERS"]  # recorded for the gate, never launched
    monkeypatch.setattr(async_proxy, "TRITON", (3, 9))
    assert not async_proxy.adds_orders("attention", gpu)


def test_only_old_tritons_on_sm_90_add_the_orders(monkeypatch):
    def added(chip, version):
        monkeypatch.setattr(common, "chip_override", chip)
        monkeypatch.setattr(async_proxy, "TRITON", version)
        return async_proxy.adds_orders("attention", torch.device("cuda"))

    assert added("sm_90", (3, 6)) and added("sm_90", (3, 7)) and not added("sm_90", (3, 8))
    assert not added("sm_80", (3, 6))
    heads = torch.empty(1, 1, 64, device="meta")
    monkeypatch.setattr(common, "chip_override", "sm_90")
    monkeypatch.setattr(async_proxy, "TRITON", (3, 6))
    assert not attention._config("forward", heads)["ORDERS"]  # fp32 does not use wgmma
    assert attention._config("forward", heads.bfloat16())["ORDERS"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_attention_reads_in_order_on_sm_90(version):
    if version == "3.6" and not OLDEST.exists():
        pytest.skip(f"needs Triton 3.6 in {OLDEST}: pip install --no-deps --target {OLDEST} triton==3.6.0")
    done = run_compiler("tests.helpers.attention_orders", path=[OLDEST] if version == "3.6" else ())
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    for name in ("shipped", "shipped, late"):
        assert seen[name] == {"proxy": [], "other": [], "text": []}, (version, name)
    assert seen["equal"] == {"late": True, "without orders": True}
    for kernel in ("_forward_kernel", "_dq_kernel", "_dkdv_kernel"):  # both see that the fences are gone
        assert kernel in seen["without fences"]["proxy"] and kernel in seen["without fences"]["text"]
    if version == "3.6":  # what Triton makes of the kernels without the orders of async_proxy.py
        assert set(seen["without orders"]["proxy"]) == {"_forward_kernel", "_dq_kernel", "_dkdv_kernel"}
        assert set(seen["without orders"]["text"]) == {"_forward_kernel", "_dq_kernel", "_dkdv_kernel"}
        assert "_dkdv_kernel" in seen["without orders"]["other"]  # a register
