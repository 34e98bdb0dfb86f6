"""Attention of one query a sequence in CUDA C++, on the PTX machine, against fp64."""

import math
import re
from typing import NamedTuple

import pytest
import torch

from kernels.compiled.cuda_simulation import cuda_on_machine
from kernels.ops.decode_attention import DecodeCache, decode_attention, decode_attention_ref
from tests.helpers.native import needs_nvcc

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """Shapes of one call. room: keys that a sequence has room for. page: 0 for a static cache."""

    dtype: torch.dtype
    dim: int
    heads: int
    kv_heads: int
    lengths: tuple[int, ...]
    room: int
    prefix: int = 0
    page: int = 0

    def make(self):
        """Queries and a cache. What no sequence may read is NaN."""
        draw = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, self.dim, generator=draw).to(self.dtype)

        batch, table = len(self.lengths), None
        q = random(batch, self.heads)
        if self.page:
            n = -(-self.room // self.page)
            table = torch.randperm(batch * n + 2, generator=draw)[: batch * n].view(batch, n).int()
            k, v = (random(batch * n + 2, self.page, self.kv_heads) for _ in range(2))
        else:
            k, v = (random(batch, self.room, self.kv_heads) for _ in range(2))
        for b, length in enumerate(self.lengths):
            for t in (k, v):
                if table is None:
                    t[b, length:] = math.nan
                else:
                    rows = t[table[b].long()].flatten(0, 1)
                    rows[length:] = math.nan
                    t[table[b].long()] = rows.unflatten(0, (-1, self.page))
        prefix = [random(self.prefix, self.kv_heads) if self.prefix else None for _ in range(2)]
        return q, DecodeCache(k, v, torch.tensor(self.lengths), table, *prefix)


CASES = {
    "smollm2": Case(BF16, 64, 9, 3, (0, 1, 200, 64, 63, 100, 16), 200, prefix=40),
    "llama3": Case(BF16, 128, 8, 2, (150, 3), 300, prefix=70, page=16),
    "long prefix": Case(FP16, 128, 4, 1, (0, 1, 200), 256, prefix=300, page=64),
    "one sequence, many splits": Case(BF16, 64, 2, 1, (700,), 1000),
    "head size 80": Case(FP16, 80, 4, 4, (70, 33, 48), 80, prefix=33, page=16),
    "head size 96, 16 to a group": Case(BF16, 96, 16, 1, (100, 7), 128, prefix=17, page=32),
    "fp32": Case(FP32, 80, 4, 2, (70, 0, 3), 80, prefix=40, page=16),
    "fp32, static": Case(FP32, 128, 2, 1, (90,), 100),
}


def on_machine(q, cache, **options):
    """The result, and the machine's result of the launch."""
    with cuda_on_machine("sm_80", **options) as launches:
        out = decode_attention(q, cache, "cuda")
    assert len(launches) == 1
    return out, launches[0]


def widened(q, cache):
    """The same numbers in fp64."""
    fields = (t.double() if t is not None and t.is_floating_point() else t for t in vars(cache).values())
    return q.double(), DecodeCache(*fields)


def by_torch(q, cache):
    """torch's own attention, in the dtype of the inputs, sequence by sequence."""
    out = torch.zeros_like(q)
    for b in range(len(q)):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in cache.read(b))
        if k.shape[1]:
            out[b] = torch.nn.functional.scaled_dot_product_attention(q[b][:, None], k, v)[:, 0]
    return out


@needs_nvcc
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_error_is_within_twice_torchs(case):
    """Early and late give equal bits, without a finding, though all else in the cache is NaN."""
    q, cache = case.make()
    out, late = on_machine(q, cache, late=True, reverse=True)
    again, early = on_machine(q, cache)
    assert not late.findings and not early.findings and out.equal(again)
    truth = decode_attention_ref(*widened(q, cache))
    error, theirs = ((one.double() - truth).abs().max() for one in (out, by_torch(q, cache)))
    assert error <= 2 * theirs + 1e-7
    if not case.prefix:
        assert not out[cache.lengths == 0].any()


@needs_nvcc
def test_a_prefix_is_read_once_for_sixty_four_rows():
    """Eight sequences of 8 heads ask for the prefix's bytes once; sectors are whole; no sequence waits for a bank."""
    q, cache = Case(BF16, 128, 8, 1, (16,) * 8, 64, prefix=256).make()
    _, shared = on_machine(q, cache)
    own = DecodeCache(cache.k, cache.v, cache.lengths)
    _, alone = on_machine(q, own)
    prefix_bytes = 2 * 256 * 128 * 2
    others = 3 * q.numel() * 2 + 2 * 4 * 5 * q.numel()  # queries again, partial results of five parts
    more = shared.counters["load_bytes"] - alone.counters["load_bytes"]
    assert prefix_bytes < more < prefix_bytes + others
    assert shared.counters["load_bytes"] >= 0.9 * 32 * shared.counters["load_sectors"]
    assert all(access.cycles <= 2 * access.ideal_cycles for access in shared.slow if "ld.shared" in access.instruction)


@needs_nvcc
def test_offsets_beyond_32_bits():
    """Two pages of a cache lie 2^31 elements apart, and nobody touches what lies between."""
    q, cache = Case(BF16, 64, 2, 1, (20,), 32, page=16).make()
    far = []
    for t in (cache.k, cache.v):
        rows = torch.empty(2**31 + 4096, dtype=BF16).as_strided((2, 16, 1, 64), (2**31, 64, 64, 1))
        rows.copy_(t[cache.table[0].long()])
        far.append(rows)
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    out, result = on_machine(q, DecodeCache(far[0], far[1], cache.lengths, table))
    assert not result.findings and out.equal(on_machine(q, cache)[0])


@needs_nvcc
def test_planted_faults_are_found():
    q, cache = CASES["smollm2"].make()

    def kinds(pattern, replacement):
        def edit(ptx):
            changed = re.sub(pattern, replacement, ptx)
            assert changed != ptx
            return changed

        _, result = on_machine(q, cache, edit=edit, late=True)
        return {finding.kind for finding in result.findings}

    assert kinds(r"bar(rier)?\.(cta\.)?sync[^;]*;", "") >= {"race"}
    assert kinds(r"cp\.async\.wait_all;", "") >= {"race"}
    assert kinds(r"(ld\.global\.v4\.u32 \{[^}]*\}, \[%rd\d+)\]", r"\1+65536]") >= {"global"}
    assert kinds(r"(ld\.shared\.v4\.u32 \{[^}]*\}, \[%r\d+)\]", r"\1+65536]") >= {"shared"}


def test_the_reference_is_torchs_attention():
    for case in (CASES["llama3"], CASES["smollm2"]):
        q, cache = widened(*case.make())
        assert torch.allclose(decode_attention(q, cache), by_torch(q, cache), atol=1e-12)


def bf16(*shape):
    return torch.zeros(*shape, dtype=BF16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([1, 2])}, r"lengths are \(2,\) torch.int64, wanted \(1,\) int64"),
        ({"table": torch.zeros(1, 1, dtype=torch.int64)}, "the table is torch.int64, wanted contiguous int32"),
        ({"v": torch.zeros(1, 24, 2, 64)}, "v is .*float32 on cpu, wanted rows of 64 torch.bfloat16"),
        ({"prefix_k": torch.zeros(3, 2, 64, dtype=BF16)}, "k and v differ, wanted equal shapes and strides"),
        ({"k": bf16(1, 24, 2, 128)[..., :64]}, "k and v differ, wanted equal shapes and strides"),
        ({"v": bf16(1, 25, 2, 64)[:, 1:]}, "k and v differ, wanted equal shapes and strides"),
        ({"k": bf16(3, 24, 2, 64), "table": torch.tensor([[2]], dtype=torch.int32)}, "k and v differ, wanted equal"),
        ({"prefix_k": bf16(3, 2, 64), "prefix_v": bf16(2, 2, 64)}, "k and v differ, wanted equal shapes and strides"),
        ({"prefix_k": bf16(3, 1, 64), "prefix_v": bf16(3, 1, 64)}, "a prefix of 1 key heads, wanted 2, as in k"),
        ({"q": bf16(2, 4, 64), "lengths": torch.tensor([3, 4])}, "a cache of 1 sequences, wanted 2"),
        ({"q": bf16(2, 4, 64), "table": torch.zeros(1, 1, dtype=torch.int32)}, "a cache of 1 sequences, wanted 2"),
        ({"table": torch.zeros(1, 2, dtype=torch.int32)}, "pages of 24 keys, wanted a multiple of 16"),
        ({"q": torch.zeros(1, 4, 64).double()}, "q is .* torch.float64, wanted bf16, fp16 or fp32 and a head size"),
        ({"q": bf16(1, 4, 32)}, r"q is \(1, 4, 32\) torch.bfloat16, wanted bf16, fp16 or fp32 and a head size"),
        ({"q": bf16(1, 3, 64)}, "3 query heads to 2 key heads, wanted a whole group of at most 16"),
        ({"q": bf16(1, 34, 64)}, "34 query heads to 2 key heads, wanted a whole group of at most 16"),
        ({"q": bf16(1, 4, 128)[..., :64]}, r"q has strides \(512, 128, 1\), wanted heads next to each other"),
        ({"k": bf16(1, 24, 64, 2).mT}, "k is .*, wanted rows of 64"),
        ({"v": bf16(1, 24, 2, 32)}, "v is .*, wanted rows of 64"),
        ({"k": bf16(1, 24, 2, 64).to("meta")}, "k is .* on meta, wanted rows of 64 torch.bfloat16 on cpu"),
        ({"k": bf16(1 + 24 * 128)[1:].view(1, 24, 2, 64)}, "k begins at .*, wanted multiples of 16 bytes"),
        ({"v": bf16(1, 24, 2, 68)[..., :64]}, "v begins at .* with strides .*, wanted multiples of 16 bytes"),
        ({"lengths": torch.zeros(1, dtype=torch.int64, device="meta")}, "lengths on meta, wanted all on cpu"),
        ({"table": torch.zeros(1, 1, dtype=torch.int32, device="meta")}, "table on meta, wanted all on cpu"),
        ({"q": bf16(2, 4, 64), "k": bf16(2, 24, 2, 64), "v": bf16(2, 24, 2, 64), "lengths": torch.arange(4)[::2]},
         r"lengths are \(2,\) torch.int64, wanted \(2,\) int64, contiguous"),
        ({"lengths": torch.tensor([3], dtype=torch.int32)}, r"lengths are \(1,\) torch.int32, wanted \(1,\) int64"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(change, message):
    k = torch.zeros(1, 24, 2, 64, dtype=BF16)
    given = {"k": k, "v": torch.zeros_like(k), "lengths": torch.tensor([3])} | change
    q = given.pop("q", bf16(1, 4, 64))
    with pytest.raises(ValueError, match=message):
        decode_attention(q, DecodeCache(**given), "cuda")
    with pytest.raises(ValueError, match="impl is 'magic'"):
        decode_attention(q, DecodeCache(**given), "magic")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_gpu_gives_the_same(case):
    q, cache = case.make()
    on_gpu = DecodeCache(*(t if t is None else t.cuda() for t in vars(cache).values()))
    truth = decode_attention_ref(*widened(q, cache))
    out = decode_attention(q.cuda(), on_gpu, "cuda")
    error, theirs = ((one.double().cpu() - truth).abs().max() for one in (out, by_torch(q, cache)))
    assert error <= 2 * theirs + 1e-7 and decode_attention(q.cuda(), on_gpu, "cuda").equal(out)
