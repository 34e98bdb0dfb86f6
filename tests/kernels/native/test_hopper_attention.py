"""The forward of attention in CUDA C++ for sm_90a, on the PTX machine, against fp64."""

import math
import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch

from kernels.compiled.cuda_simulation import cuda_on_machine
from kernels.ops import attention, attention_hopper
from kernels.ops.attention_hopper import GROUPS
from kernels.ops.attention_plan import attention_plan
from kernels.ops.attention_ref import attention_ref
from tests.helpers.native import needs_nvcc

BF16, FP16 = torch.bfloat16, torch.float16


def behind_a_prefix(first: int, length: int, n: int) -> list[tuple[int, int, int, int]]:
    """A document of `first` rows, and n of `length` rows that all read it as their prefix."""
    return [(0, first, 0, 0), *((first + i * length, first + (i + 1) * length, 0, first) for i in range(n))]


class Case(NamedTuple):
    """One call. T rows, of which those of no document are NaN; q, k and v are views of one tensor."""

    documents: list
    n_rows: int
    heads: int = 1
    kv_heads: int = 1
    dim: int = 64
    dtype: torch.dtype = BF16
    step: int = 1  # queries of every step-th row

    def make(self, device="cpu"):
        """q, k, v, the documents and the rows of the queries."""
        draw = torch.Generator().manual_seed(0)
        qkv = torch.randn(self.n_rows, self.heads + 2 * self.kv_heads, self.dim, generator=draw).to(self.dtype)
        padding = torch.ones(self.n_rows, dtype=torch.bool)
        for start, end, *_ in self.documents:
            padding[start:end] = False
        qkv[padding] = math.nan
        q, k, v = qkv.to(device).split((self.heads, self.kv_heads, self.kv_heads), 1)
        rows = torch.arange(0, self.n_rows, self.step)
        return q[rows] if self.step > 1 else q, k, v, torch.tensor(self.documents, dtype=torch.int32), rows

    def plan(self, device="cpu"):
        *_, documents, rows = self.make()
        return attention_plan(documents, self.n_rows, self.dim, device, "cuda", rows if self.step > 1 else None)


CASES = {
    "one document, Dh 128": Case([(0, 300, 0, 0)], 300, dim=128),
    "one document, Dh 64": Case([(0, 256, 0, 0)], 256),
    "packed": Case([(0, 40, 0, 0), (40, 130, 0, 0), (130, 131, 0, 0), (131, 290, 0, 0)], 290, 2, 1, 128),
    "documents of length 1": Case([(i, i + 1, 0, 0) for i in range(0, 150, 2)], 150, 1, 1, 64, FP16),
    "behind a prefix": Case(behind_a_prefix(40, 29, 11), 400, 3, 1, 64),
    "behind a long prefix": Case(behind_a_prefix(150, 20, 8), 340, 2, 2, 128),
    "prefixes of all kinds": Case(
        [(0, 10, 0, 0), (12, 40, 2, 5), (40, 47, 12, 40), (47, 60, 20, 33), (60, 61, 30, 47), (61, 90, 0, 10)],
        90, 2, 1, 128, FP16,
    ),
    "most rows of no document": Case([(190, 197, 0, 0)], 500, 2, 1, 64),
    "fewer rows than a tile": Case([(0, 3, 0, 0)], 5, 1, 1, 128),
    "queries of some rows": Case(behind_a_prefix(50, 33, 6), 270, 2, 1, 128, BF16, 3),
}  # fmt: skip


def on_machine(case, **options):
    """o, lse and the machine's result of the launch."""
    q, k, v, *_ = case.make()
    plan = case.plan()
    with cuda_on_machine("sm_90", **options) as launches:
        o, lse = attention_hopper.forward(q, k, v, plan.limits, *plan.hopper)
    assert len(launches) == 1
    return o, lse, launches[0]


def truth_of(case):
    """o and lse in fp64, from the limits of each query."""
    q, k, v, *_ = case.make()
    first, last, prefix, prefix_end = case.plan().limits[:, :, None].long()
    keys = torch.arange(case.n_rows)
    seen = (keys >= first) & (keys < last) | (keys >= prefix) & (keys < prefix_end)
    q, k, v = (t.double().nan_to_num(0) for t in (q, k, v))
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(case.dim)
    lse = scores.masked_fill(~seen, -math.inf).logsumexp(-1).masked_fill(~seen.any(1), math.inf)
    return torch.einsum("hij,jhd->ihd", (scores - lse[..., None]).exp() * seen, v), lse / math.log(2)


def check(case, o, lse):
    """o is within twice torch's error, lse within 2e-6 of it; a row that sees nothing gives zeros and infinity."""
    want, want_lse = truth_of(case)
    q, k, v, documents, rows = case.make()
    theirs = attention_ref(q, k, v, documents, rows if case.step > 1 else None)
    error, torchs = ((one.double() - want).abs().max() for one in (o, theirs))
    assert error <= 2 * torchs + 1e-7
    sees = want_lse[0].isfinite()
    assert (lse - want_lse)[:, sees].abs().max() < 2e-6 * max(1, want_lse[:, sees].abs().max())
    assert not o[~sees].any() and lse[:, ~sees].eq(math.inf).all()


@needs_nvcc
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_error_is_within_twice_torchs(case):
    """Early and late give equal bits, without a finding. Two blocks take turns at the items."""
    o, lse, early = on_machine(case, reverse=True)
    again, lse_again, late = on_machine(case, late=True)
    assert not early.findings and not late.findings
    assert o.equal(again) and lse.equal(lse_again)
    check(case, o, lse)


@needs_nvcc
@pytest.mark.parametrize("dim", [64, 128])
def test_a_warpgroup_multiplies_what_its_queries_see_and_keys_are_copied_once_for_all(dim):
    case = Case(behind_a_prefix(40, 60, 6), 400, 2, 1, dim)
    plan = case.plan()
    _, _, result = on_machine(case)
    listed = plan.hopper[1][:-1, 2]
    sees = sum(int(((listed >> 2 * group & 3) > 0).sum()) for group in range(GROUPS[dim]))
    assert 0 < sees < GROUPS[dim] * len(listed)
    assert result.counters["multiply_adds"] == case.heads * sees * 64 * 64 * case.dim * 2
    assert plan.hopper[0][:, [4, 6]].sum() == 0  # no blocks beside the listed ones
    inside = sum(min(64, case.n_rows - int(start)) for start in plan.hopper[1][:-1, 0] >> 1)  # rows of the tensor
    copied = result.counters["load_bytes"] - case.heads * 2 * inside * case.dim * 2 - case.heads * 400 * case.dim * 2
    assert 0 <= copied < 0.1 * result.counters["load_bytes"]  # limits and lists


@needs_nvcc
def test_results_are_stored_in_whole_sectors_and_shared_memory_has_no_conflicts():
    _, _, result = on_machine(Case([(0, 256, 0, 0)], 256, 2, 1, 128))
    assert result.counters["store_bytes"] == 32 * result.counters["store_sectors"] == 2 * 256 * (2 * 128 + 4)
    assert result.counters["shared_cycles"] == result.counters["shared_ideal_cycles"]


@needs_nvcc
def test_offsets_beyond_32_bits():
    """Values lie 2^25 elements from row to row, and 36 of them beside rows of no document."""
    case = Case([(0, 100, 0, 0)], 101)
    q, k, v, *_ = case.make()
    far = torch.empty(100 * 2**25 + 64, dtype=BF16).as_strided((101, 1, 64), (2**25, 64, 1))
    far.copy_(v)
    plan = case.plan()
    with cuda_on_machine("sm_90") as launches:
        o, _ = attention_hopper.forward(q, k, far, plan.limits, *plan.hopper)
    assert not launches[0].findings and o.equal(on_machine(case)[0])


@needs_nvcc
@pytest.mark.parametrize(
    ("kinds", "pattern", "replacement"),
    [
        ({"race"}, r"mbarrier\.try_wait[^;]*;", "setp.eq.u32 p, 0, 0;"),
        ({"registers"}, r"wgmma\.wait_group[^;]*;", ""),
        ({"registers"}, r"wgmma\.fence\.sync\.aligned;", ""),
        ({"proxy"}, r"fence\.proxy\.async[^;]*;", ""),
        ({"race"}, r"bar\.sync\s+0;", ""),
        ({"race"}, r"cp\.async\.bulk\.wait_group\.read 0;", ""),
        ({"mbarrier"}, r"mbarrier\.arrive\.shared::cta\.b64 _[^;]*;", ""),
        ({"descriptor"}, r"(cp\.async\.bulk\.tensor\.4d\.shared\S* \[%r\d+)\]", r"\1+16]"),
    ],
)
def test_planted_faults_are_found(kinds, pattern, replacement):
    def edit(ptx):
        changed = re.sub(pattern, replacement, ptx)
        assert changed != ptx
        return changed

    case = CASES["behind a long prefix"]
    found = {finding.kind for late in (False, True) for finding in on_machine(case, edit=edit, late=late)[2].findings}
    assert found >= kinds


@pytest.mark.parametrize("dim", [64, 128])
def test_flags_say_what_queries_see(dim):
    """Against limits and documents, row by row and key by key, for documents that are drawn at random."""
    draw = np.random.default_rng(0)
    for _ in range(30):
        bounds = np.unique(draw.integers(0, 700, 14))
        documents = []
        for start, end in pairwise(bounds):
            if draw.random() < 0.8:
                prefix = sorted(draw.integers(0, start + 1, 2)) if draw.random() < 0.5 else [0, 0]
                documents.append((int(start), int(end), *map(int, prefix)))
        rows = torch.from_numpy(np.flatnonzero(draw.random(700) < draw.choice([0.3, 1.0])))
        plan = attention_plan(torch.tensor(documents).view(-1, 4), 700, dim, "cpu", "cuda", rows)
        check_flags(plan, len(rows), GROUPS[dim])


def check_flags(plan, n_queries, groups):
    """Each key that a query sees is listed for its warpgroup once; flags say no more than there is."""
    keys, counts = torch.arange(plan.n_rows), torch.zeros(n_queries, plan.n_rows, dtype=torch.int32)
    limits = plan.limits.long()
    items, blocks = plan.hopper
    full = [
        [tile, 2 * (first + 64 * i), first + 64 * (i + 1), 2 * 21]
        for tile, *_, prefix, n_prefix, own, n_own in items.tolist()
        for first, n in ((prefix, n_prefix), (own, n_own))
        for i in range(n)
    ]
    listed = [[item[0], *block[:3]] for item in items.tolist() for block in blocks[item[1] : item[2]].tolist()]
    for tile, code, end, flags in listed + full:
        start, kind = code >> 1, code & 1
        for group in range(groups):
            queries = torch.arange(n_queries)[(tile * groups + group) * 64 :][:64]
            lo, hi = limits[2 * kind, queries, None], limits[2 * kind + 1, queries, None]
            sees = (keys >= lo) & (keys < hi) & (keys >= start) & (keys < end)
            if [tile, code, end, flags] in full:
                sees = torch.ones(len(queries), 1, dtype=torch.bool) & (keys >= start) & (keys < end)
            said = flags >> 2 * group & 3
            assert said == (2 if len(queries) and sees[:, start : start + 64].all() and sees.any() else int(sees.any()))
            counts[queries] += sees.int()
        assert (flags & 64 > 0) == (not plan.seen[start : start + 64].all())
    first, last, prefix, prefix_end = limits[:, :, None]
    assert counts.equal(((keys >= first) & (keys < last) | (keys >= prefix) & (keys < prefix_end)).int())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(5, 1, 64)},
            r"takes bf16 and fp16, q is torch.float32; pass impl='auto'",
        ),
        ({"q": torch.zeros(5, 1, 80, dtype=BF16)}, "takes heads of 64 and 128, Dh is 80; pass impl='auto'"),
        (
            {"k": torch.zeros(5, 1, 68, dtype=BF16)[..., :64]},
            "k begins at .* with strides .68, 68, 1.; pass impl='auto'",
        ),
        (
            {"v": torch.zeros(5, 1, 72, dtype=BF16)[..., 4:68]},
            "v begins at .*8 with strides .72, 72, 1.; pass impl='auto'",
        ),
        (
            {"plan": Case([(0, 3, 0, 0)], 5).plan()._replace(hopper=None)},
            "this plan is not for impl='cuda', wanted one of",
        ),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    q, k, v, documents, _ = Case([(0, 3, 0, 0)], 5).make()
    given = {"q": q, "k": k, "v": v, "plan": documents} | change
    given |= {name: torch.zeros_like(given["q"]) for name in ("k", "v") if "q" in change}
    with pytest.raises(ValueError, match=message):
        attention.attention(given["q"], given["k"], given["v"], given["plan"], "cuda")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_other_cards_than_sm_90_are_refused_by_name(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if capability == (9, 0):
        attention_hopper.check_attention_by_cuda(64, BF16, torch.device("cuda"))
    else:
        said = rf"runs on sm_90 alone, this card is sm_{capability[0]}{capability[1]}; pass impl='auto'"
        with pytest.raises(ValueError, match=said):
            attention_hopper.check_attention_by_cuda(64, BF16, torch.device("cuda"))
    attention_hopper.check_attention_by_cuda(128, FP16, torch.device("cpu"))  # the PTX machine


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a GPU of sm_90"
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_gpu_gives_the_same(case):
    q, k, v, *_ = case.make("cuda")
    plan = case.plan("cuda")
    o, lse = attention_hopper.forward(q, k, v, plan.limits, *plan.hopper)
    check(case, o.cpu(), lse.cpu())
    again = attention_hopper.forward(q, k, v, plan.limits, *plan.hopper)
    assert again[0].equal(o) and again[1].equal(lse)
