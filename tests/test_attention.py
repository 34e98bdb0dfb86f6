"""Attention in Triton against softmax over a matrix of what is visible, in fp64: output and every gradient."""

import json
import math
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import shared, worst
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.common import INTERPRETED, LAUNCH
from kernels.rope import rope_ref

op = import_module("kernels.attention")  # kernels.attention is the function
plans = import_module("kernels.documents")

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="bf16 and full sizes need a GPU")
runs = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter")
pytestmark = runs


quick = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate])


def table(documents):
    return torch.tensor(documents, dtype=torch.int32).reshape(-1, 4)


LAYOUTS = {  # (start, end, prefix start, prefix end) of each, and rows
    "one": ([[0, 100, 0, 0]], 100),
    "none": ([], 20),
    "empty and single": ([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1], [1, 2, 0, 1], [2, 40, 0, 0]], 40),
    "tiny": ([[i, i + 1 + i % 2, 0, 0] for i in range(0, 60, 2)], 64),
    "gaps": ([[3, 20, 0, 0], [25, 26, 0, 0], [40, 75, 3, 20]], 90),
    "shared": ([[0, 20, 0, 0], *([20 + 9 * i, 29 + 9 * i, 0, 20] for i in range(14)), [146, 150, 0, 0]], 150),
    "far, nested and overlapping": (
        [[0, 10, 0, 0], [12, 40, 2, 5], [40, 47, 12, 40], [47, 60, 20, 33], [60, 61, 30, 47], [61, 100, 0, 10]],
        100,
    ),
    "prefix over padding": ([[0, 3, 0, 0], [8, 30, 0, 6], [30, 41, 2, 7]], 41),
    "long prefix": ([[0, 70, 0, 0], [70, 100, 0, 70], [100, 128, 0, 70]], 128),
}


def visible(documents, n):
    """(n, n) bool: which key each query sees."""
    seen = torch.zeros(n, n, dtype=torch.bool)
    for start, end, prefix_start, prefix_end in documents:
        seen[start:end, prefix_start:prefix_end] = True
        seen[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return seen


def dense(q, k, v, seen):
    """What attention is, of any dtype; a row that sees nothing gives zeros, and what nobody sees touches nothing."""
    seen = seen.to(q.device)
    q, k, v = q * seen.any(1)[:, None, None], k * seen.any(0)[:, None, None], v * seen.any(0)[:, None, None]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(~seen.any(1)[:, None], 0)
    weights = scores.softmax(-1) * seen.any(1)[:, None]
    return torch.einsum("hij,jhd->ihd", weights, v)


def with_gradients(attend, inputs, upstream):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = attend(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


def compare(ours, inputs, upstream, seen):
    """Our errors at most twice those of the dense formula in the same dtype, both against it in fp64."""
    truth = with_gradients(partial(dense, seen=seen), [t.double() for t in inputs], upstream)
    theirs = with_gradients(partial(dense, seen=seen), inputs, upstream)
    for name, a, b, true in zip(("o", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
        assert a.shape == true.shape and a.dtype == inputs[0].dtype, name
        limit = 2 * worst(b.double() - true) + 1e-6 * max(1, worst(true))
        assert worst(a.double() - true) <= limit, name


def random_qkv(n, heads, kv_heads, dh, device, dtype=torch.float32, n_queries=None):
    shapes = ((n if n_queries is None else n_queries, heads), (n, kv_heads), (n, kv_heads))
    return [torch.randn(rows, h, dh, device=device).to(dtype) for rows, h in shapes]


def check(documents, n, heads=(2, 2), dh=16, device="cpu", dtype=torch.float32):
    q, k, v = random_qkv(n, *heads, dh, device, dtype)
    upstream = torch.randn_like(q)
    ours = with_gradients(partial(op.attention, documents=table(documents), impl="triton"), (q, k, v), upstream)
    compare(ours, (q, k, v), upstream, visible(documents, n))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    check(*LAYOUTS[layout], heads=(2, 1), device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "dh"), [((2, 2), 64), ((4, 2), 128), ((3, 1), 40), ((1, 1), 80), ((2, 1), 5), ((1, 1), 200)], ids=str
)
def test_heads(heads, dh, dtype, device):
    check([[0, 5, 0, 0], [5, 30, 0, 5], [33, 50, 0, 5]], 50, heads, dh, device, dtype)


@st.composite
def layouts(draw):
    documents, row = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(0, 8))):
        length = draw(st.sampled_from([0, 1, 2, 7, 16, 33, 70]))
        prefix = draw(st.sampled_from([0, 0, 1, 2]))
        bounds = (0, 0)
        if prefix == 1 and documents:  # an earlier document, whole
            bounds = draw(st.sampled_from(documents))[:2]
        elif prefix == 2 and row:
            low = draw(st.integers(0, row - 1))
            bounds = (low, draw(st.integers(low, row)))
        documents.append((row, row + length, *bounds))
        row += length + draw(st.sampled_from([0, 0, 0, 1, 20]))
        if row > 90:
            break
    return documents, row + draw(st.integers(0, 20))


@settings(quick, max_examples=20)
@given(layouts())
def test_any_layout(layout):
    torch.manual_seed(0)
    check(*layout, heads=(1, 1), dh=8, device="cuda" if torch.cuda.is_available() else "cpu")


@settings(quick, max_examples=10)
@given(layouts(), st.integers(0, 2**32), st.sampled_from([0.05, 0.5, 0.95]))
def test_any_subset_of_queries(layout, seed, share):
    documents, n = layout
    rows = torch.from_numpy(np.flatnonzero(np.random.default_rng(seed).random(n) < share))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = random_qkv(n, 1, 1, 8, device, n_queries=len(rows))
    plan = op.attention_plan(table(documents), n, 8, q.device, "triton" if INTERPRETED else "auto", rows)
    upstream, seen = torch.randn_like(q), visible(documents, n)[rows]
    compare(
        with_gradients(lambda *qkv: op.attention(*qkv, plan, "triton"), (q, k, v), upstream), (q, k, v), upstream, seen
    )
    plan = op.attention_plan(table(documents), n, 8, "cpu", "ref", rows)
    if seen.any():
        ours = with_gradients(lambda *qkv: op.attention(*qkv, plan, "ref"), (q, k, v), upstream)
        compare(ours, (q, k, v), upstream, seen)
    else:
        assert not op.attention(q, k, v, plan, "ref").any()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_views_are_taken_as_they_are(heads, device):
    documents, n = LAYOUTS["shared"]
    wide = torch.randn(n, 2 + sum(heads) + heads[1], 24, device=device)
    q, k, v = wide[..., :16].split((1, *heads, heads[1] + 1), dim=1)[1:]
    v = v[:, :-1].transpose(0, 1).contiguous().transpose(0, 1)
    upstream = torch.randn(heads[0], n, 16, device=device).transpose(0, 1)
    attend = partial(op.attention, documents=table(documents), impl="triton")
    ours = with_gradients(attend, (q, k, v), upstream)
    plain = with_gradients(attend, [t.contiguous() for t in (q, k, v)], upstream.contiguous())
    assert all(a.equal(b) for a, b in zip(ours, plain, strict=True))
    last = with_gradients(attend, [t.mT.contiguous().mT for t in (q, k, v)], upstream.mT.contiguous().mT)
    assert all(a.equal(b) for a, b in zip(last, plain, strict=True))
    ones = with_gradients(attend, (q, k, v), torch.ones((), device=device).expand(n, heads[0], 16))
    assert all(a.isfinite().all() for a in ones)


@pytest.mark.parametrize("layout", ["gaps", "tiny", "shared", "none"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_padding_is_never_read(layout, poison, device):
    documents, n = LAYOUTS[layout]
    n += 20
    seen = visible(documents, n)
    padding = ~(seen.any(0) | seen.any(1)).to(device)
    q, k, v = random_qkv(n, 2, 1, 16, device)
    upstream = torch.randn_like(q)
    attend = partial(op.attention, documents=table(documents), impl="triton")
    clean = with_gradients(attend, (q, k, v), upstream)
    for t in (q, k, v, upstream):
        t[padding] = poison
    poisoned = with_gradients(attend, (q, k, v), upstream)
    for name, a, b in zip(("o", "dq", "dk", "dv"), poisoned, clean, strict=True):
        assert a.equal(b), name
        assert a[padding].eq(0).all(), name


def test_nan_in_a_document_comes_out(device):
    q, k, v = random_qkv(40, 1, 1, 16, device)
    v[10] = math.nan
    out = op.attention(q, k, v, table([[0, 5, 0, 0], [5, 40, 0, 0]]), "triton")
    assert out[10:].isnan().all()  # of rows before it and of neighbours too, where a tile holds them


def test_same_bits_every_time(device):
    documents, n = LAYOUTS["shared"]
    q, k, v = random_qkv(n, 2, 1, 16, device)
    upstream = torch.randn_like(q)
    attend = partial(op.attention, documents=table(documents), impl="triton")
    first = with_gradients(attend, (q, k, v), upstream)
    for _ in range(20 if q.is_cuda else 1):
        assert all(a.equal(b) for a, b in zip(with_gradients(attend, (q, k, v), upstream), first, strict=True))


# ---- rope and attention in one --------------------------------------------------------------------------------------


def rotation(n, dh, device):
    angles = torch.rand(n, dh // 2, device=device) * 6
    return angles.cos(), angles.sin()


def rope_then_attention(qkv, cos, sin, seen, heads):
    q, k, v = qkv.split((heads[0], heads[1], heads[1]), dim=1)
    return dense(*rope_ref(q, k, cos.to(q.dtype), sin.to(q.dtype)), v, seen)


@pytest.mark.parametrize("impl", ["triton", "ref"])
@pytest.mark.parametrize(("heads", "dh"), [((2, 2), 16), ((4, 1), 64), ((2, 1), 24)], ids=str)
def test_rope_attention(heads, dh, impl, device):
    documents, n = LAYOUTS["gaps"]
    qkv = torch.randn(n, heads[0] + 2 * heads[1], dh, device=device)
    upstream, (cos, sin), seen = (
        torch.randn(n, heads[0], dh, device=device),
        rotation(n, dh, device),
        visible(documents, n),
    )

    def ours(qkv):
        return op.rope_attention(qkv.clone(), cos, sin, table(documents), heads[0], impl)

    reference = partial(rope_then_attention, cos=cos, sin=sin, seen=seen, heads=heads)
    truth = with_gradients(reference, [qkv.double()], upstream)
    theirs = with_gradients(reference, [qkv], upstream)
    for a, b, true in zip(with_gradients(ours, [qkv], upstream), theirs, truth, strict=True):
        assert worst(a - true) <= 2 * worst(b - true) + 1e-6 * worst(true)


def test_rope_attention_consumes_its_input(device):
    cos, sin = rotation(20, 16, device)
    x = torch.randn(20, 3, 16, device=device, requires_grad=True)
    qkv = x.exp()  # saves its output
    before, version = qkv.detach().clone(), qkv._version
    out = op.rope_attention(qkv, cos, sin, table([[0, 20, 0, 0]]), 1, "triton")
    assert qkv._version > version
    q, k = rope_ref(before[:, :1], before[:, 1:2], cos, sin)
    assert worst(qkv.detach()[:, :2] - torch.cat((q, k), 1)) < 1e-5 and qkv[:, 2:].equal(before[:, 2:])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Layer(torch.nn.Module):
    """Projection, rope_attention and back, as a model has them."""

    def __init__(self, plan, cos, sin):
        super().__init__()
        self.wqkv, self.wo = torch.nn.Linear(32, 4 * 16, bias=False), torch.nn.Linear(32, 32, bias=False)
        self.rest = (cos, sin, plan, 2, "triton")

    def forward(self, x):
        qkv = self.wqkv(x).view(len(x), 4, 16)
        return x + self.wo(op.rope_attention(qkv, *self.rest).flatten(1))


@pytest.mark.parametrize("how", ["checkpoint", "compile"])
def test_recomputed_and_compiled(how, device):
    documents, n = LAYOUTS["gaps"]
    plan = op.attention_plan(table(documents), n, 16, device, "triton")
    layer = Layer(plan, *rotation(n, 16, device)).to(device)
    x, upstream = torch.randn(n, 32, device=device), torch.randn(n, 32, device=device)
    wanted = with_gradients(lambda x, *_: layer(x), [x], upstream), [p.grad for p in layer.parameters()]
    layer(x).backward(upstream)
    wanted = wanted[0], [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    if how == "checkpoint":
        run = partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
    else:
        run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = with_gradients(run, [x], upstream)
    run(x.clone().requires_grad_()).backward(upstream)
    for a, b in zip((*got, *(p.grad for p in layer.parameters())), (*wanted[0], *wanted[1]), strict=True):
        assert worst(a - b) <= 1e-6 * worst(b)


# ---- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[0, 5, 0, 0], [4, 8, 0, 0]], r"documents\[1\] is \[4, 8, 0, 0\], wanted .* with 5 <= start"),
        ([[4, 8, 0, 0], [0, 4, 0, 0]], r"documents\[1\]"),
        ([[3, 2, 0, 0]], r"documents\[0\]"),
        ([[-1, 2, 0, 0]], r"documents\[0\]"),
        ([[0, 11, 0, 0]], "end <= 10"),
        ([[0, 4, 0, 0], [4, 8, 2, 5]], "a prefix of rows before the start"),
        ([[2, 4, -1, 2]], "a prefix of rows before the start"),
        ([[2, 4, 2, 1]], "a prefix of rows before the start"),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "ref"])
def test_documents_that_do_not_fit(documents, message, impl, device):
    q = torch.zeros(10, 1, 16, device=device)
    with pytest.raises(ValueError, match=message):
        op.attention(q, q, q, table(documents), impl)


def test_what_else_does_not_fit(device):
    q, documents = torch.zeros(10, 2, 16, device=device), table([[0, 10, 0, 0]])
    plan = op.attention_plan(documents, 10, 16, device, "triton")
    cos, sin = rotation(10, 16, device)
    for call, message in [
        (lambda: op.attention(q, q, q, plan, "ref"), "this plan is for the kernels"),
        (lambda: op.attention(q, q[:9], q[:9], plan, "triton"), "the plan is for 10 rows of heads of 16"),
        (lambda: op.attention(*[q[..., :8]] * 3, plan, "triton"), "the plan is for 10 rows of heads of 16"),
        (lambda: op.attention(q[:9], q, q, plan, "triton"), "q has 9 rows, the plan is for 10"),
        (lambda: op.attention(q[:9], q, q, documents, "ref"), "q has 9 rows"),
        (lambda: op.attention(q, q.double(), q, documents), "wanted one dtype"),
        (lambda: op.attention(*[torch.zeros(2, 1, 300, device=device)] * 3, table([]), "triton"), "Dh=300 is over 256"),
        (lambda: op.attention_plan(documents, 10, 16, device, query_rows=torch.tensor([1, 1])), "query_rows must"),
        (lambda: op.attention_plan(documents, 10, 16, device, query_rows=torch.tensor([10])), "query_rows reach 10"),
        (lambda: op.rope_attention(q, cos, sin, documents, 1), r"wanted \(T, H \+ 2K, Dh\)"),
        (
            lambda: op.rope_attention(torch.zeros(10, 3, 8, device=device), cos, sin, documents, 1),
            r"wanted cos and sin",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_no_rows(device):
    for n_queries in (0, 1):
        n = n_queries
        q, k, v = (torch.randn(n, 2, 16, device=device, requires_grad=True) for _ in range(3))
        out = op.attention(q, k, v, table([[0, 0, 0, 0]]), "triton")
        out.sum().backward()
        assert out.shape == q.grad.shape == k.grad.shape == (n, 2, 16) and not out.any() and not k.grad.any()
    k = torch.randn(8, 2, 16, device=device, requires_grad=True)
    plan = op.attention_plan(table([[0, 8, 0, 0]]), 8, 16, device, "triton", torch.zeros(0, dtype=torch.int64))
    op.attention(k[:0], k, k, plan, "triton").sum().backward()
    assert k.grad.eq(0).all()


def test_reference_plan_is_the_documents():
    documents = table([[0, 4, 0, 0]])
    assert op.attention_plan(documents, 4, 16, "cpu").equal(documents)  # auto, on a CPU


def test_a_shared_prefix_is_split():
    """An Alpaca micro-batch at a GPU's tile sizes: no part walks more than 16 blocks, each block is walked once."""
    documents = np.array([[0, 35, 0, 0], *([35 + 95 * i, 130 + 95 * i, 0, 35] for i in range(130))])
    n = documents[-1, 1]
    (_, _, _, seen, items, blocks, splits), n_slots = plans.build(documents, n, np.arange(n), (64, 64, 32, 64, 16))
    assert seen.all() and len(splits) == 1 and splits[0, 2] == n_slots > 20
    assert (items[:, 2] - items[:, 1]).max() <= 16
    walked = np.concatenate([np.arange(lo, hi) for lo, hi in items[:, 1:3]])
    assert sorted(walked) == list(range(len(blocks) - 1))
    assert sorted(items[items[:, 5] >= 0, 5]) == list(range(n_slots))
    cost = items[:, 2] - items[:, 1] + items[:, 4]
    assert (np.diff(cost) <= 0).all()  # longest first


def test_a_long_document_is_mostly_unmasked():
    n = 4096
    documents, rows = np.array([[0, n, 0, 0]]), np.arange(n)
    (_, items, blocks, _, keys, key_blocks, _), _ = plans.build(documents, n, rows, (64, 64, 64, 64, 16))
    assert len(blocks) - 1 == len(items) and items[:, 6].sum() == 63 * 64 // 2
    assert len(key_blocks) - 1 <= 2 * len(keys) and keys[:, 4].sum() >= 62 * 63 // 2


def test_forward_and_dq_share_tiles():
    launch = json.loads((LAUNCH / "attention.json").read_text())
    for chip, sizes in launch["forward"].items():
        for size, config in sizes.items():
            other = launch["dq"][chip][size]
            assert (config["BLOCK_M"], config["BLOCK_N"]) == (other["BLOCK_M"], other["BLOCK_N"])
        assert sizes.keys() == launch["dkdv"][chip].keys()


# ---- full sizes -----------------------------------------------------------------------------------------------------


def alpaca(n_rows):
    """Documents of Alpaca's lengths behind one shared prefix of 35 rows, up to n_rows."""
    rng, documents, row = np.random.default_rng(0), [[0, 35, 0, 0]], 35
    lengths = np.array(json.loads(shared("alpaca_lengths.json").read_text())["rows"])[:, :2].sum(1) - 35
    for length in rng.permutation(lengths):
        if row + length > n_rows:
            return documents
        documents.append([row, row + int(length), 0, 35])
        row += int(length)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "dh"), [((8, 8), 128), ((8, 2), 64), ((4, 2), 80), ((2, 2), 256)], ids=str)
@pytest.mark.parametrize("layout", ["alpaca", "one"])
def test_full_size(layout, heads, dh, dtype):
    n = 4096
    check(alpaca(n) if layout == "alpaca" else [[0, n, 0, 0]], n, heads, dh, "cuda", dtype)


@gpu
def test_same_bits_every_time_at_full_size():
    q, k, v = random_qkv(8192, 8, 8, 128, "cuda", torch.bfloat16)
    attend = partial(op.attention, documents=table(alpaca(8192)), impl="triton")
    first = with_gradients(attend, (q, k, v), q)
    for _ in range(20):
        assert all(a.equal(b) for a, b in zip(with_gradients(attend, (q, k, v), q), first, strict=True))


@gpu
def test_offsets_beyond_2_to_the_31():
    n, h, dh = 2**19 + 300, 32, 128  # rows x stride of q alone passes 2^31
    last = [[n - 300, n - 100, 0, 0], [n - 100, n, n - 300, n - 290]]
    big = torch.empty(n, h + 2, dh, device="cuda", dtype=torch.bfloat16)
    big[-300:] = torch.randn(300, h + 2, dh, device="cuda")
    small = big[-300:].clone()
    upstream = torch.zeros(n, h, dh, device="cuda", dtype=torch.bfloat16)
    upstream[-300:] = torch.randn(300, h, dh, device="cuda")
    ours = with_gradients(
        partial(op.attention, documents=table(last), impl="triton"), big.split((h, 1, 1), 1), upstream
    )
    shifted = [[0, 200, 0, 0], [200, 300, 0, 10]]
    theirs = with_gradients(
        partial(op.attention, documents=table(shifted), impl="triton"), small.split((h, 1, 1), 1), upstream[-300:]
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a[-300:].equal(b) and not a[:-300].any()  # the same tiles, as 2^19 is a multiple of theirs
