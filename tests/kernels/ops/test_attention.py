"""Attention in Triton against softmax over a matrix of what is visible, in fp64: output and every gradient."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.measure.alpaca import alpaca_lengths
from kernels.ops import attention as op
from kernels.ops import attention_plan as plans
from kernels.ops import attention_ref as ref
from kernels.ops.common import INTERPRETED, LAUNCH
from kernels.ops.rope import rope_ref
from tests.helpers.kernels import CHIP, DEVICE, check_sectors, needs_counters, needs_gpu, needs_kernels
from tests.helpers.run import worst

# The interpreter reckons with what is in the padding, as a GPU does silently.
pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
# On a GPU what ships comes first, and fp32 only for heads of up to 16: its exact products unroll into FMAs, and one
# shape of Dh=128 takes 46 s to compile. The interpreter computes bf16 wrongly.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]


def crossed(*heads):
    """Return (heads, dh, dtype) for each (heads, dh) and each of DTYPES that it is tested in.

    On the PTX machine, where a shape takes three seconds to compile, fp16 is tested with the first alone.
    """
    if CHIP:
        return [(*heads[0], torch.float16), *((h, dh, torch.bfloat16) for h, dh in heads)]
    return [(h, dh, t) for t in DTYPES for h, dh in heads if INTERPRETED or dh <= 16 or t != torch.float32]


TILES = {  # no size of one kernel is the other's
    "attention": {
        "forward": {"BLOCK_M": 64, "BLOCK_N": 32},
        "dq": {"BLOCK_M": 64, "BLOCK_N": 32},
        "dkdv": {"BLOCK_M": 32, "BLOCK_N": 64, "part": 2},
        "sum": {"ROWS": 8},
    }
}

quick = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate])


@pytest.fixture(autouse=True)
def poisoned():
    """Whatever is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def table(documents):
    return torch.tensor(documents, dtype=torch.int32).reshape(-1, 4)


LAYOUTS = {  # (start, end, prefix start, prefix end) of each, and rows
    "one": ([[0, 100, 0, 0]], 100),
    "none": ([], 20),
    "empty and single": ([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1], [1, 2, 0, 1], [2, 40, 0, 0]], 40),
    "tiny": ([[i, i + 1 + i % 2, 0, 0] for i in range(0, 40, 2)], 44),
    "gaps": ([[3, 20, 0, 0], [25, 26, 0, 0], [36, 62, 3, 20]], 66),
    "shared": ([[0, 20, 0, 0], *([20 + 9 * i, 29 + 9 * i, 0, 20] for i in range(8)), [92, 96, 0, 0]], 96),
    "far, nested and overlapping": (
        [[0, 10, 0, 0], [12, 40, 2, 5], [40, 47, 12, 40], [47, 60, 20, 33], [60, 61, 30, 47], [61, 90, 0, 10]],
        90,
    ),
    "prefix over padding": ([[0, 3, 0, 0], [8, 30, 0, 6], [30, 41, 2, 7]], 41),
    "long prefix": ([[0, 33, 0, 0], [33, 98, 0, 33]], 98),
    "long shared prefix": ([[0, 40, 0, 0], [40, 80, 0, 40], [80, 98, 0, 40]], 98),
    "all kinds": ([[0, 8, 0, 0], [8, 14, 0, 8], [14, 20, 0, 8], [20, 27, 0, 8], [30, 82, 0, 20]], 82),
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


def random_qkv(n, heads, kv_heads, dh, device, dtype=DTYPES[0], n_queries=None):
    shapes = ((n if n_queries is None else n_queries, heads), (n, kv_heads), (n, kv_heads))
    return [torch.randn(rows, h, dh, device=device).to(dtype) for rows, h in shapes]


def check(documents, n, heads=(2, 2), dh=16, device="cpu", dtype=DTYPES[0]):
    q, k, v = random_qkv(n, *heads, dh, device, dtype)
    upstream = torch.randn_like(q)
    ours = with_gradients(partial(op.attention, documents=table(documents), impl="triton"), (q, k, v), upstream)
    compare(ours, (q, k, v), upstream, visible(documents, n))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    check(*LAYOUTS[layout], heads=(1, 1), device=device)


@pytest.mark.parametrize(
    ("heads", "dh", "dtype"),
    crossed(((2, 2), 64), ((4, 2), 128), ((3, 1), 40), ((1, 1), 80), ((2, 1), 5), ((1, 1), 200)),
    ids=str,
)
def test_heads(heads, dh, dtype, device):
    check([[0, 5, 0, 0], [5, 25, 0, 5], [28, 40, 0, 5]], 40, heads, dh, device, dtype)


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(sign, device):
    """Of some hundreds, where exp overflows, ever larger or ever smaller from key to key. In fp16, as lse is fp32."""
    k = torch.rand(70, 1, 16, device=device) * torch.linspace(1, 9, 70, device=device)[:, None, None]
    q, v = sign * k.flip(0) * 4, torch.randn(70, 1, 16, device=device)
    q, k, v, upstream = (t.half() for t in (q, k, v, torch.randn_like(q)))
    documents = [[0, 8, 0, 0], [8, 70, 0, 8]]
    attend = partial(op.attention, documents=table(documents), impl="triton")
    for keys in (k, k.flip(0)):
        compare(with_gradients(attend, (q, keys, v), upstream), (q, keys, v), upstream, visible(documents, 70))


def test_products_of_fp16_may_pass_65504(device):
    """o do, 100 000 up and down from column to column, and a delta of 0."""
    q, k = (t.half() for t in random_qkv(20, 1, 1, 16, device)[:2])
    v = torch.full_like(q, 200.0)
    v[..., ::2] *= -1
    attend = partial(op.attention, documents=table([[0, 20, 0, 0]]), impl="triton")
    _, dq, dk, dv = with_gradients(attend, (q, k, v), torch.full_like(q, 500.0))
    assert dq.eq(0).all() and dk.eq(0).all() and dv.isfinite().all()


@st.composite
def layouts(draw):
    documents, row = [], draw(st.integers(0, 3))
    while row < 90 and draw(st.integers(0, 6)):
        length = draw(st.sampled_from([0, 1, 2, 7, 16, 33, 70]))
        prefix = draw(st.sampled_from([0, 0, 1, 2]))
        bounds = (0, 0)
        if prefix == 1 and documents:  # an earlier document, whole
            bounds = draw(st.sampled_from(documents))[:2]
        elif prefix == 2 and row:
            low = draw(st.integers(0, row - 1))
            bounds = (low, draw(st.integers(low, row)))
        for _ in range(draw(st.sampled_from([1, 1, 6])) if length < 10 else 1):
            documents.append((row, row + length, *bounds))
            row += length
        row += draw(st.sampled_from([0, 0, 0, 1, 20]))
    return documents, row + draw(st.integers(0, 20))


def some_rows(n, seed, share):
    return np.flatnonzero(np.random.default_rng(seed).random(n) < share)


@settings(quick, max_examples=9)
@given(layouts())
def test_any_layout(layout):
    torch.manual_seed(0)
    check(*layout, heads=(1, 1), dh=8, device="cuda" if torch.cuda.is_available() else "cpu")


@settings(quick, max_examples=6)
@given(layouts(), st.integers(0, 2**32), st.sampled_from([0.05, 0.5, 0.95]))
def test_any_subset_of_queries(layout, seed, share):
    documents, n = layout
    rows = torch.from_numpy(some_rows(n, seed, share))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = random_qkv(n, 1, 1, 8, device, n_queries=len(rows))
    upstream, seen = torch.randn_like(q), visible(documents, n)[rows]
    for impl, where in (("triton", q.device), ("ref", "cpu")):
        plan = op.attention_plan(table(documents), n, 8, where, impl, rows)
        if seen.any():
            ours = with_gradients(partial(op.attention, documents=plan, impl=impl), (q, k, v), upstream)
            compare(ours, (q, k, v), upstream, seen)
        else:
            assert op.attention(q, k, v, plan, impl).eq(0).all()


def framed(t, fill=math.nan):
    """t as a view into the midst of a tensor full of NaN, and that tensor."""
    rows, heads, dh = t.shape
    frame = t.new_full((rows + 70, heads + 2, dh + 3), fill)
    view = frame[3 : rows + 3, 1:-1, 2 : dh + 2]
    return view.copy_(t), frame


def test_views_are_taken_as_they_are_and_nothing_around_them_is_touched(device):
    documents, n = LAYOUTS["all kinds"]
    q, k, v = random_qkv(n, 4, 2, 5, device)
    plan, do = op.attention_plan(table(documents), n, 5, device, "triton"), torch.randn_like(q)
    o, lse = op.forward(q, k, v, *plan[:3])
    wanted = [torch.empty_like(t) for t in (q, k, v)]
    op.backward(q, k, v, o, lse, do, *wanted, *plan[:8], [])
    (q, k, v, do), _ = zip(*map(framed, (q, k, v, do)), strict=True)
    views, frames = zip(*(framed(torch.zeros_like(t), 7.0) for t in (q, k, v)), strict=True)
    again, lse_again = op.forward(q, k, v, *plan[:3])
    assert again.equal(o) and lse_again.equal(lse)
    op.backward(q, k, v, framed(o)[0], lse, do, *views, *plan[:8], [])
    for view, frame, want in zip(views, frames, wanted, strict=True):
        assert view.equal(want)
        view.fill_(7)
        assert frame.eq(7).all()


def test_any_strides(device):
    documents, n = LAYOUTS["gaps"]
    wide = torch.randn(n, 10, 24, device=device)
    q, k, v = wide[..., :16].split((1, 4, 2, 3), dim=1)[1:]
    v = v[:, :-1].transpose(0, 1).contiguous().transpose(0, 1)
    upstream = torch.randn(n, 1, 1, device=device).expand(n, 4, 16)
    attend = partial(op.attention, documents=table(documents), impl="triton")
    ours = with_gradients(attend, (q, k, v), upstream)
    plain = with_gradients(attend, [t.contiguous() for t in (q, k, v)], upstream.contiguous())
    last = with_gradients(attend, [t.mT.contiguous().mT for t in (q, k, v)], upstream.mT.contiguous().mT)
    for a, b, c in zip(ours, plain, last, strict=True):
        assert a.equal(b) and c.equal(b)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU see test_offsets_beyond_2_to_the_31")
@pytest.mark.parametrize("far", ["rows", "rows of a whole block", "heads"])
def test_offsets_are_64_bit(far):
    """Rows or heads of every tensor lie so far apart that the last is beyond 2^31, in memory never touched."""
    documents = [[0, 66, 0, 0], *([66 + 5 * i, 71 + 5 * i, 60, 64 + i % 2] for i in range(5))]
    n, h, row, head, rows = 91, 1, 1 << 25, 64, None
    if far == "rows of a whole block":
        documents, n, rows = [[64, 98, 0, 0]], 98, torch.tensor([97])
    elif far == "heads":
        documents, n, h, row, head = [[i, i + 4, 0, i % 8 and 4] for i in range(0, 20, 4)], 20, 3, 64, 1 << 30
    size = (n - 1) * row + (h - 1) * head + 64
    memory = torch.from_numpy(np.empty(size, np.float16))  # torch.empty would fill it, see poisoned
    q, k, v, do, o, *gradients = (memory.as_strided((n, h, 8), (row, head, 1), 8 * i) for i in range(8))
    if rows is not None:
        q, do, o, gradients[0] = (t[: len(rows)] for t in (q, do, o, gradients[0]))
    for t in (q, k, v, do):
        t.copy_(torch.randn(t.shape))
    plan = op.attention_plan(table(documents), n, 8, "cpu", "triton", rows)
    assert (plan.n_slots > 0) == (rows is None) and plan.query_items[:, 6].any() == (rows is not None)
    out, lse = op.forward(q, k, v, *plan[:3])
    op.backward(q, k, v, o.copy_(out), lse, do, *gradients, *plan[:8], [])
    seen = visible(documents, n)
    compare((out, *gradients), (q, k, v), do, seen if rows is None else seen[rows])


@pytest.mark.parametrize("layout", ["gaps", "tiny", "all kinds", "none"])
def test_padding_is_never_read(layout, device):
    documents, n = LAYOUTS[layout]
    n += 20
    seen = visible(documents, n)
    padding = ~(seen.any(0) | seen.any(1)).to(device)
    q, k, v = random_qkv(n, 1, 1, 16, device)
    upstream = torch.randn_like(q)
    attend = partial(op.attention, documents=table(documents), impl="triton")
    clean = with_gradients(attend, (q, k, v), upstream)
    poison = torch.tensor([math.nan, math.inf, -math.inf, 1e38], device=device).repeat(4).to(q.dtype)
    for t in (q, k, v, upstream):
        t[padding] = poison
    poisoned = with_gradients(attend, (q, k, v), upstream)
    for name, a, b in zip(("o", "dq", "dk", "dv"), poisoned, clean, strict=True):
        assert a.equal(b), name
        assert a[padding].eq(0).all(), name


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_in_a_document_comes_out(which, device):
    qkv = dict(zip("qkv", random_qkv(40, 1, 1, 16, device), strict=True))
    qkv[which][10] = math.nan
    out = op.attention(**qkv, documents=table([[0, 5, 0, 0], [5, 40, 0, 0]]), impl="triton")
    assert out[10 : 11 if which == "q" else 40].isnan().all()
    assert which != "q" or out[11:].isfinite().all()  # k and v: of neighbours too, where a tile holds them


def test_same_bits_every_time(device, monkeypatch):
    """Backward again and with twice the upstream gradient, dk and dv in one pass or in two; nothing that is given or
    saved is written."""
    documents, n = LAYOUTS["all kinds"]
    q, k, v = (t.requires_grad_() for t in random_qkv(n, 2, 1, 16, device))
    upstream, plan = torch.randn_like(q), op.attention_plan(table(documents), n, 16, device, "triton")
    assert not INTERPRETED or plan.n_slots  # small tiles are the interpreter's
    given = [t.detach().clone() for t in (q, k, v, upstream, *plan[:7])]
    out = op.attention(q, k, v, plan, "triton")
    gradients = torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)
    first = [t.clone() for t in gradients]
    for t in gradients:
        t.zero_()  # the caller's
    config = op.launch_config
    for passes in [1, 2] * (10 if q.is_cuda else 1):
        monkeypatch.setattr(
            op, "launch_config", lambda *a, n=passes: config(*a) | ({"passes": n} if a[1] == "dkdv" else {})
        )
        doubled = torch.autograd.grad(out, (q, k, v), 2 * upstream, retain_graph=True)
        assert all(a.equal(2 * b) for a, b in zip(doubled, first, strict=True))
    assert all(a.equal(b) for a, b in zip(given, (q, k, v, upstream, *plan[:7]), strict=True))
    assert q.is_cuda or out.equal(op.attention(q, k, v, plan, "triton"))


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("layout", ["all kinds", "gaps", "none"])
def test_operators_and_their_twins(layout, share, device):
    """lse against fp64, and what the operators do on CPU tensors outside the interpreter; padding is NaN."""
    documents, n = LAYOUTS[layout]
    seen = visible(documents, n)
    rows = torch.from_numpy(some_rows(n, 0, share))
    q, k, v = random_qkv(n, 4, 2, 8, device, torch.float32)
    do = torch.randn_like(q)
    cos, sin = rotation(n, 8, device)
    angles = [cos[rows], sin[rows], cos, sin] if share < 1 else []
    for t in (q, k, v, do):
        t[~(seen.any(0) | seen.any(1)).to(device)] = math.nan
    q, do, seen = q[rows], do[rows], seen[rows].to(device)
    plan = op.attention_plan(table(documents), n, 8, device, "triton", rows)
    (o, lse), (o_twin, lse_twin) = op.forward(q, k, v, *plan[:3]), ref.forward_cpu(q, k, v, *plan[:3])
    wide_q, wide_k = q.double().nan_to_num(0), k.double().nan_to_num(0).repeat_interleave(2, dim=1)
    scores = torch.einsum("ihd,jhd->hij", wide_q, wide_k) / math.sqrt(8)
    true_lse = scores.masked_fill(~seen, -math.inf).logsumexp(-1) / math.log(2)
    true_lse = true_lse.masked_fill(~seen.any(1), math.inf)
    for got in (lse, lse_twin):
        assert got.isinf().equal(true_lse.isinf()) and worst((got - true_lse).nan_to_num(0)) < 2e-6
    assert worst(o_twin - o) < 1e-6
    ours, twins = ([torch.empty_like(t) for t in (q, k, v)] for _ in range(2))
    op.backward(q, k, v, o, lse, do, *ours, *plan[:8], angles)
    ref.backward_cpu(q, k, v, o, lse, do, *twins, *plan[:8], angles)
    for a, b in zip(ours, twins, strict=True):
        assert worst(a - b) <= 2e-6 * max(1, worst(b))


def test_operators_are_registered(device):
    documents, n = LAYOUTS["prefix over padding"]
    plan = op.attention_plan(table(documents), n, 8, device, "triton")
    q, k, v = random_qkv(n, 2, 1, 8, device)
    torch.library.opcheck(op.forward, (q, k, v, *plan[:3]))
    args = q, k, v, *op.forward(q, k, v, *plan[:3]), torch.randn_like(q), *(torch.empty_like(t) for t in (q, k, v))
    torch.library.opcheck(op.backward, (*args, *plan[:8], []))
    torch.library.opcheck(op.backward, (*args, *plan[:8], rotation(n, 8, device)))


# ---- rope and attention in one --------------------------------------------------------------------------------------


def rotation(n, dh, device):
    angles = torch.rand(n, dh // 2, device=device) * 6
    return angles.cos(), angles.sin()


def rope_then_attention(qkv, cos, sin, seen, heads):
    q, k, v = qkv.split((heads[0], heads[1], heads[1]), dim=1)
    return dense(*rope_ref(q, k, cos.to(q.dtype), sin.to(q.dtype)), v, seen)


@pytest.mark.parametrize("impl", ["triton", "ref"])
@pytest.mark.parametrize(
    ("heads", "dh", "dtype"),
    [((2, 2), 16, torch.float32), ((4, 1), 64, torch.float16), ((2, 1), 24, DTYPES[0])],
    ids=str,
)
def test_rope_attention(heads, dh, dtype, impl, device):
    documents, n = LAYOUTS["prefix over padding"]
    qkv = torch.randn(n, heads[0] + 2 * heads[1], dh, device=device).to(dtype)
    upstream = torch.randn(n, heads[0], dh, device=device).to(dtype)
    (cos, sin), seen = rotation(n, dh, device), visible(documents, n)

    def ours(qkv):
        return op.rope_attention(qkv.clone(), cos, sin, table(documents), heads[0], impl)

    reference = partial(rope_then_attention, cos=cos, sin=sin, seen=seen, heads=heads)
    truth = with_gradients(reference, [qkv.double()], upstream)
    theirs = with_gradients(reference, [qkv], upstream)
    for a, b, true in zip(with_gradients(ours, [qkv], upstream), theirs, truth, strict=True):
        assert a.dtype == dtype and worst(a - true) <= 2 * worst(b - true) + 1e-6 * worst(true)


@pytest.mark.parametrize(("dh", "share"), [(16, 1.0), (16, 0.9), (64, 0.9), (24, 0.9)])
def test_rope_attention_of_some_rows_behind_a_prefix_in_parts(dh, share, device):
    """Gradients of q, of keys in one part and of keys in several are rotated back; half a head of 24 is no tile."""
    documents, n = LAYOUTS["shared"]
    rows = torch.from_numpy(some_rows(n, 1, share))
    plan = op.attention_plan(table(documents), n, dh, device, "triton", rows)
    assert plan.n_slots or not INTERPRETED  # small tiles are the interpreter's
    dtype = DTYPES[1]
    q, k, v = random_qkv(n, 4, 2, dh, device, dtype, len(rows))
    (cos, sin), seen, upstream = rotation(n, dh, device), visible(documents, n)[rows], torch.randn_like(q)

    def ours(q, kv):
        return op.rope_attention_rows(q.clone(), kv.clone(), cos, sin, rows.to(device), plan, "triton")

    def reference(q, kv):
        k, v = kv.chunk(2, dim=1)
        q = rope_ref(q, q, cos[rows].to(q.dtype), sin[rows].to(q.dtype))[0]
        return dense(q, rope_ref(k, k, cos.to(k.dtype), sin.to(k.dtype))[0], v, seen)

    inputs = [q, torch.cat((k, v), 1)]
    truth = with_gradients(reference, [t.double() for t in inputs], upstream)
    theirs = with_gradients(reference, inputs, upstream)
    for a, b, true in zip(with_gradients(ours, inputs, upstream), theirs, truth, strict=True):
        assert a.dtype == dtype and worst(a - true) <= 2 * worst(b - true) + 1e-6 * worst(true)


@needs_counters
@pytest.mark.parametrize("dh", [64, 128])
def test_partial_sums_and_tables_are_moved_in_whole_sectors(dh):
    documents = table([[0, 64, 0, 0], *([64 + 32 * i, 96 + 32 * i, 0, 64] for i in range(38))])  # a prefix in parts
    qkv, (cos, sin) = torch.randn(1280, 3, dh).bfloat16().requires_grad_(), rotation(1280, dh, "cpu")

    def run():
        op.rope_attention(qkv * 1, cos, sin, documents, 1, "triton").sum().backward()

    check_sectors(run, "_rotate_kernel", "_forward_kernel", "_dq_kernel", "_sum_kernel")


def test_rope_attention_consumes_its_input(device):
    cos, sin = rotation(20, 16, device)
    x = torch.randn(20, 3, 16, device=device, requires_grad=True)
    qkv = x.exp()  # saves its output
    before, version = qkv.detach().clone(), qkv._version
    out = op.rope_attention(qkv, cos, sin, table([[0, 20, 0, 0]]), 1, "triton")
    assert qkv._version > version
    q, k = rope_ref(before[:, :1], before[:, 1:2], cos, sin)
    assert worst(qkv.detach()[:, :2] - torch.cat((q, k), 1)) < 1e-5 and qkv[:, 2:].equal(before[:, 2:])
    upstream = torch.randn(20, 1, 1, device=device).expand(out.shape)
    first, again = (torch.autograd.grad(out, qkv, t, retain_graph=True)[0] for t in (upstream, upstream.contiguous()))
    assert first.equal(again) and qkv[:, 2:].equal(before[:, 2:])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(upstream)


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
    documents, n = LAYOUTS["prefix over padding"]
    plan = op.attention_plan(table(documents), n, 16, device, "triton")
    layer = Layer(plan, *rotation(n, 16, device)).to(device)
    x, upstream = torch.randn(n, 32, device=device), torch.randn(n, 32, device=device)

    def all_of(run):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        return out, *torch.autograd.grad(out, (leaf, *layer.parameters()), upstream)

    if how == "checkpoint":
        run = partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
    else:
        run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(all_of(run), all_of(layer), strict=True):
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
        ([[2, 4, 9, 9]], "a prefix of rows before the start"),  # an empty one too
        ([[2, 4, 99, 99]], "a prefix of rows before the start"),
        ([[0, 4, 0, 0], [4, 8, 0, 5]], "a prefix of rows before the start"),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "ref"])
def test_documents_that_do_not_fit(documents, message, impl, device):
    q = torch.zeros(10, 1, 16, device=device)
    with pytest.raises(ValueError, match=message):
        op.attention(q, q, q, table(documents), impl)


@pytest.mark.parametrize(
    "changes",
    [
        {"q": (3, 2, 8)}, {"q": (4, 2, 16)}, {"q": (3, 3, 16)}, {"q": (3, 16)},
        {"kv": (10, 3, 16)}, {"kv": (10, 0, 16)}, {"kv": (10, 64)}, {"cos": (9, 8)}, {"cos": (10, 7)}, {"sin": (9, 8)},
        {"sin": (10, 7)}, {"rows": (2,)}, {"rows": (3, 1)}, {"q": "strided"}, {"kv": "strided"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_queries_of_some_rows_that_do_not_fit_are_refused(changes, impl, device):
    shapes = {"q": (3, 2, 16), "kv": (10, 4, 16), "cos": (10, 8), "sin": (10, 8), "rows": (3,)}
    plan = op.attention_plan(table([[0, 10, 0, 0]]), 10, 16, device, "ref", torch.tensor([1, 4, 9]))
    given = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    given["rows"] = torch.tensor([1, 4, 9], device=device)
    assert op.rope_attention_rows(**given, documents=plan, impl="ref").shape == shapes["q"]
    for name, change in changes.items():
        given[name] = (
            given[name].transpose(0, 2).contiguous().transpose(0, 2)
            if change == "strided"
            else torch.zeros(change, dtype=given[name].dtype, device=device)
        )
    with pytest.raises(ValueError, match=r"rope_attention_rows: q .*; wanted contiguous \(U, H, Dh\), \(T, 2K, Dh\)"):
        op.rope_attention_rows(**given, documents=plan, impl=impl)


def test_what_else_does_not_fit(device):
    q, documents = torch.zeros(10, 2, 16, device=device), table([[0, 10, 0, 0]])
    plan = op.attention_plan(documents, 10, 16, device, "triton")
    cos, sin = rotation(10, 16, device)
    shapes, rows, tables = "wanted q .T, H, Dh. and", "query_rows must", "wanted cos and sin"

    def planned(*rows, documents=documents):
        return lambda: op.attention_plan(documents, 10, 16, device, query_rows=torch.tensor(rows))

    def rope(qkv, cos=cos, sin=sin, n_heads=1):
        return lambda: op.rope_attention(qkv, cos, sin, documents, n_heads)

    qkv = torch.zeros(10, 3, 16, device=device)
    for call, message in [
        (lambda: op.attention(q, q, q, plan, "ref"), "this plan is for the kernels"),
        (lambda: op.attention(q, q[:9], q[:9], plan, "triton"), "the plan is for 10 rows of heads of 16"),
        (lambda: op.attention(*[q[..., :8]] * 3, plan, "triton"), "the plan is for 10 rows of heads of 16"),
        (lambda: op.attention(q[:9], q, q, plan, "triton"), "q has 9 rows, the plan is for 10"),
        (lambda: op.attention(q[:9], q, q, documents, "ref"), "q has 9 rows"),
        (lambda: op.attention(q, q.double(), q, documents), "wanted one dtype"),
        (lambda: op.attention(*[torch.zeros(2, 1, 300, device=device)] * 3, table([]), "triton"), "Dh=300 is over 256"),
        (lambda: op.attention(q, q[:, :, :8], q[:, :, :8], documents), shapes),
        (lambda: op.attention(q, q, q[:9], documents), shapes),
        (lambda: op.attention(q[:, :1], q, q, documents), shapes),
        (lambda: op.attention(q, q[:, :0], q[:, :0], documents), shapes),
        (lambda: op.attention(q[0], q[0], q[0], documents), shapes),
        (lambda: op.attention(q, q, q.double(), documents), "wanted one dtype"),
        (lambda: op.attention(q, q, q, documents.float()), r"wanted \(N, 4\) integers"),
        (lambda: op.attention(q, q, q, documents[:, :3]), r"wanted \(N, 4\) integers"),
        (lambda: op.attention(q, q, q, documents[0]), r"wanted \(N, 4\) integers"),
        (planned(1, 1), rows),
        (planned(2, 1), rows),
        (planned(-1, 1), rows),
        (planned([1, 2]), rows),
        (planned(10), "query_rows reach 10"),
        (rope(qkv[:, :2]), r"wanted \(T, H \+ 2K, Dh\)"),
        (rope(qkv[:, :, :8]), "not contiguous"),
        (rope(qkv[0]), r"wanted \(T, H \+ 2K, Dh\)"),
        (rope(torch.zeros(10, 7, 16, device=device), n_heads=3), r"wanted \(T, H \+ 2K, Dh\)"),
        (rope(torch.zeros(10, 4, 16, device=device)), r"wanted \(T, H \+ 2K, Dh\)"),
        (rope(qkv, cos[:9], sin[:9]), tables),
        (rope(qkv, cos[:, :7]), tables),
        (rope(qkv, cos, sin[:, :7]), tables),
        (rope(torch.zeros(10, 3, 17, device=device)), tables),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_no_rows(device):
    for n_queries in (0, 1):
        n = n_queries
        q, k, v = (t.requires_grad_() for t in random_qkv(n, 2, 2, 16, device))
        out = op.attention(q, k, v, table([[0, 0, 0, 0]]), "triton")
        out.sum().backward()
        assert out.shape == q.grad.shape == k.grad.shape == (n, 2, 16) and not out.any() and not k.grad.any()
    k = torch.randn(8, 2, 16, device=device).to(DTYPES[0]).requires_grad_()
    plan = op.attention_plan(table([[0, 8, 0, 0]]), 8, 16, device, "triton", torch.zeros(0, dtype=torch.int64))
    op.attention(k[:0], k, k, plan, "triton").sum().backward()
    assert k.grad.eq(0).all()


def test_reference_plan_is_the_documents():
    documents, rows = table([[0, 4, 0, 0]]), torch.tensor([1, 3], dtype=torch.int32)
    assert op.attention_plan(documents, 4, 16, "cpu").equal(documents)  # auto, on a CPU
    plan = op.attention_plan(documents, 4, 16, "cpu", query_rows=rows)
    assert plan.documents.equal(documents) and plan.query_rows.tolist() == [1, 3]
    q, k = torch.randn(2, 1, 16), torch.randn(4, 1, 16)
    assert worst(op.attention(q, k, k, plan) - dense(q, k, k, visible(documents, 4)[[1, 3]])) < 1e-6


def test_a_plan_is_int32_on_lines_of_its_own(device):
    documents, n = LAYOUTS["all kinds"]
    plan = op.attention_plan(table(documents), n, 16, device, "triton")
    tiles = plans.tile_sizes(16, torch.device(device))
    assert tiles == (64, 32, 32, 64, 2) or not INTERPRETED
    sections, _ = plans.build_lists(np.array(documents), n, np.arange(n), tiles)
    for t, section in zip(plan[:7], sections, strict=True):
        assert t.dtype == torch.int32 and t.storage_offset() % 32 == 0 and t.is_contiguous()
        assert t.tolist() == section.tolist()
    assert plan.n_rows == n and plan.head_dim == 16 and plan.n_slots == plan.splits[:, 2].sum()


def meetings(items, blocks, own, prefix, size, block, full):
    """How often a plan has each row of its tiles meet each row of its blocks; own, prefix: (rows of tiles, rows of
    blocks), who sees whom; full: an item's pairs of start and number of blocks that the whole tile sees."""
    times = np.zeros(own.shape, int)
    for item in items:
        tile = slice(item[0] * size, (item[0] + 1) * size)
        for code, end in blocks[item[1] : item[2]]:
            assert 0 < end - code // 2 <= block
            times[tile, code // 2 : end] += (own, prefix)[code % 2][tile, code // 2 : end]
        for start, n in full(item):
            assert n == 0 or 0 <= start <= times.shape[1] - n * block
            times[tile, start : start + n * block] += 1
    return times


def assert_holds_seen_rows_alone(blocks, seen):
    assert all(seen[code // 2 : end].all() for code, end in blocks[:-1])


SIZES = [(32, 16, 16, 32, 2), (16, 16, 16, 16, 1), (64, 64, 32, 64, 32), (16, 64, 64, 16, 3)]


@settings(quick, max_examples=300)
@given(layouts(), st.integers(0, 2**32), st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0, 1.0]), st.sampled_from(SIZES))
def test_a_plan_has_every_key_meet_every_query_that_sees_it_once(layout, seed, share, tiles):
    documents, n = layout
    rows = some_rows(n, seed, share)
    table = np.array(documents, np.int64).reshape(-1, 4)
    (limits, items, blocks, seen, key_items, key_blocks, splits), n_slots = plans.build_lists(table, n, rows, tiles)
    keys = np.arange(n)
    own, prefix = (
        (keys >= lo[:, None]) & (keys < hi[:, None]) for lo, hi in ((limits[0], limits[1]), (limits[2], limits[3]))
    )
    wanted = visible(documents, n).numpy()[rows]
    assert ((own | prefix) == wanted).all() and not (own & prefix).any()
    asks = [d for d in table if ((rows >= d[0]) & (rows < d[1])).any()]
    assert seen.tolist() == [any(d[0] <= i < d[1] or d[2] <= i < d[3] for d in asks) for i in range(n)]
    assert_holds_seen_rows_alone(blocks, seen)
    assert_holds_seen_rows_alone(key_blocks, wanted.any(1))
    # over queries
    assert sorted(items[:, 0]) == list(range(-(-len(rows) // tiles[0])))
    once = meetings(items, blocks, own, prefix, tiles[0], tiles[1], lambda i: (i[3:5], i[5:7]))
    assert (once == wanted).all()
    assert (np.diff(items[:, 2] - items[:, 1] + items[:, 4] + items[:, 6]) <= 0).all()  # longest first
    # over keys
    once = meetings(key_items, key_blocks, own.T, prefix.T, tiles[3], tiles[2], lambda i: (i[3:5],))
    assert (once == wanted.T).all()
    assert (np.diff(key_items[:, 2] - key_items[:, 1] + key_items[:, 4]) <= 0).all()
    assert (key_items[:, 2] - key_items[:, 1] <= tiles[4]).all()
    times = np.bincount(key_items[:, 0], minlength=-(-n // tiles[3]))
    assert (times >= 1).all() and sorted(splits[:, 0]) == np.flatnonzero(times > 1).tolist()
    slots = {tile: list(range(first, first + n)) for tile, first, n in splits}
    assert sorted(slot for of_tile in slots.values() for slot in of_tile) == list(range(n_slots))
    for tile in range(len(times)):
        assert sorted(key_items[key_items[:, 0] == tile, 5]) == slots.get(tile, [-1])


def test_a_shared_prefix_is_split():
    """An Alpaca micro-batch at a GPU's tile sizes: no part walks more than 16 blocks, each block is walked once."""
    documents = np.array([[0, 35, 0, 0], *([35 + 95 * i, 130 + 95 * i, 0, 35] for i in range(130))])
    n = documents[-1, 1]
    (_, _, _, seen, items, blocks, splits), n_slots = plans.build_lists(
        documents, n, np.arange(n), (64, 64, 32, 64, 16)
    )
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
    (_, items, blocks, _, keys, key_blocks, _), _ = plans.build_lists(documents, n, rows, (64, 64, 64, 64, 16))
    assert len(blocks) - 1 == len(items) and items[:, 6].sum() == 63 * 64 // 2
    assert len(key_blocks) - 1 <= 2 * len(keys) and keys[:, 4].sum() >= 62 * 63 // 2


def planned(*documents):
    """query_items, query_blocks, key_items and key_blocks of all rows, at a GPU's tile sizes."""
    n = documents[-1][1]
    sections, _ = plans.build_lists(np.array(documents), n, np.arange(n), (64, 64, 32, 64, 16))
    return sections[1], sections[2], sections[4], sections[5]


def test_what_a_whole_tile_sees_is_not_listed():
    items, *_ = planned([0, 1, 0, 0], [1, 4096, 0, 0])
    assert items[:, 6].sum() == 63 * 64 // 2  # up to the first query's own key
    for n in range(64, 200):
        _, _, keys, _ = planned([0, n, 0, 0])
        assert keys[keys[:, 0] == 0, 4].sum() == (n - 63) // 32  # query 63 is the first to see all 64 keys
    for prefix, n in ([0, 128], 2), ([0, 127], 0), ([1, 128], 0):
        items, *_ = planned([0, 128, 0, 0], [128, 150, 0, 128], [150, 192, *prefix])
        assert items[items[:, 0] == 2, 4] == n


def test_neighbours_are_one_block():
    _, blocks, _, key_blocks = planned([0, 40, 0, 0], [40, 50, 0, 5], [50, 64, 5, 10])
    assert len(blocks) - 1 == 2 and len(key_blocks) - 1 == 3  # own and prefix
    _, _, _, key_blocks = planned([0, 40, 0, 0], [40, 64, 20, 20])
    assert len(key_blocks) - 1 == 2
    _, _, _, key_blocks = planned([0, 128, 0, 0], *([i, i + 8, 0, 128] for i in range(128, 160, 8)))
    assert [(code, end) for code, end in key_blocks[:-1] if code % 2] == [(257, 160)] * 2  # a block a tile


def test_forward_and_dq_share_tiles():
    launch = json.loads((LAUNCH / "attention.json").read_text())
    for chip, sizes in launch["forward"].items():
        for size, config in sizes.items():
            other = launch["dq"][chip][size]
            assert (config["BLOCK_M"], config["BLOCK_N"]) == (other["BLOCK_M"], other["BLOCK_N"])
        assert sizes.keys() == launch["dkdv"][chip].keys()


# ---- full sizes; on the PTX machine kernels.simulate runs these heads, with documents of each kind ------------------


def alpaca(n_rows):
    """Documents of Alpaca's lengths behind one shared prefix of 35 rows, up to n_rows."""
    rng, documents, row = np.random.default_rng(0), [[0, 35, 0, 0]], 35
    lengths = alpaca_lengths().prompt + alpaca_lengths().response - 35
    for length in rng.permutation(lengths):
        if row + length > n_rows:
            return documents
        documents.append([row, row + int(length), 0, 35])
        row += int(length)


@needs_gpu
@pytest.mark.parametrize("layout", ["alpaca", "one"])
@pytest.mark.parametrize(
    ("heads", "dh", "dtype"), crossed(((8, 8), 128), ((8, 2), 64), ((4, 2), 80), ((2, 2), 256)), ids=str
)
def test_full_size(layout, heads, dh, dtype):
    n = 4096
    check(alpaca(n) if layout == "alpaca" else [[0, n, 0, 0]], n, heads, dh, DEVICE, dtype)


@needs_gpu
def test_same_bits_every_time_at_full_size():
    n, heads = 8192, 8
    q, k, v = random_qkv(n, heads, heads, 128, DEVICE, torch.bfloat16)
    attend = partial(op.attention, documents=table(alpaca(n)), impl="triton")
    first = with_gradients(attend, (q, k, v), q)
    for _ in range(20):
        assert all(a.equal(b) for a, b in zip(with_gradients(attend, (q, k, v), q), first, strict=True))


@needs_gpu
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
