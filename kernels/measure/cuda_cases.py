"""The cases of kernels.simulate for csrc/cuda, where nvcc is there to compile it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from kernels.measure.cases import BenchCase
from kernels.native.library import ROOT
from kernels.native.toolchain import MissingCompiler, find_nvcc
from kernels.ops.decode_attention import DecodeCache, decode_attention

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def has_nvcc() -> bool:
    """Return whether csrc/cuda is here, as in a checkout, and nvcc to compile it."""
    try:
        find_nvcc()
    except MissingCompiler:
        return False
    return (ROOT / "csrc" / "cuda").exists()


def as_cuda(case: BenchCase) -> BenchCase:
    """Return a case of an op that has impl="cuda", run by csrc/cuda; what that does not compute, by Triton."""
    return replace(case, op=f"{case.op}_cuda", ours=lambda i, impl: case.ours(i, "cuda"))


def decode_case(heads: int, kv_heads: int, dim: int, lengths: list[int], prefix: int, page: int) -> BenchCase:
    """Return a case of decoding attention. Keys and values beyond a sequence's length are NaN. page: 0 for static."""
    batch, room = len(lengths), -(-max(lengths) // 16) * 16

    def inputs(device, dtype):
        def random(*shape):
            return torch.randn(*shape, dim).to(dtype)

        k, v = (random(batch, room, kv_heads) for _ in range(2))
        for b, length in enumerate(lengths):
            k[b, length:] = v[b, length:] = math.nan
        table = None
        if page:
            table = torch.randperm(batch * room // page).view(batch, -1).int()
            places = table.flatten().long().argsort()
            k, v = (t.view(-1, page, kv_heads, dim)[places].contiguous() for t in (k, v))
        kept = SimpleNamespace(q=random(batch, heads), k=k, v=v, lengths=torch.tensor(lengths), table=table)
        kept.prefix_k, kept.prefix_v = (random(prefix, kv_heads) if prefix else None for _ in range(2))
        return kept

    def cache_of(i: Any) -> DecodeCache:
        return DecodeCache(i.k, i.v, i.lengths, i.table, i.prefix_k, i.prefix_v)

    def reference(i):  # torch's own attention, sequence by sequence
        out = []
        for b in range(batch):
            keys, values = (t.repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for t in cache_of(i).read(b))
            out.append(torch.nn.functional.scaled_dot_product_attention(i.q[b][:, None], keys, values)[:, 0])
        return torch.stack(out)

    def ours(i, impl):
        return decode_attention(i.q, cache_of(i), "cuda")

    layout = f"pages of {page}" if page else "static"
    label = f"B={batch} H={heads} K={kv_heads} Dh={dim} P={prefix} {layout}"
    return BenchCase("decode_attention", label, inputs, reference, ours, (), {})


def decode_cases() -> Iterator[tuple[BenchCase, torch.dtype]]:
    """Yield the cases of decoding attention, and their dtypes."""
    lengths = [1, 90, 17, 64, 200, 3]
    yield decode_case(9, 3, 64, lengths, 40, 0), BF16
    yield decode_case(4, 1, 128, lengths, 40, 16), BF16
    yield decode_case(2, 2, 80, lengths, 0, 16), FP16
    yield decode_case(16, 1, 96, lengths, 70, 0), BF16
    yield decode_case(2, 1, 128, lengths[:3], 9, 0), FP32
