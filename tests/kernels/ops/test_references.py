"""Each op's reference against its formula, written another way in fp64, and every gradient against autograd's."""

import math

import pytest
import torch

import kernels
from engine.model.config import RopeScaling
from tests.helpers.run import worst

DOCUMENTS = [  # start, end, prefix start, prefix end
    [[0, 7, 0, 0]],
    [[0, 3, 0, 0], [3, 4, 0, 0], [4, 11, 0, 0]],
    [[0, 3, 0, 0], [3, 6, 0, 3], [6, 6, 0, 0], [6, 7, 0, 3], [7, 12, 0, 0]],  # two share a prefix, one is empty
    [[1, 4, 0, 0], [6, 9, 0, 0]],  # rows of no document before, between and after
]


def visible(documents, n):
    """(n, n) bool: which key each query sees."""
    seen = torch.zeros(n, n, dtype=torch.bool)
    for start, end, prefix_start, prefix_end in documents:
        for row in range(start, end):
            seen[row, prefix_start:prefix_end] = True
            seen[row, start : row + 1] = True
    return seen


@pytest.mark.parametrize("documents", DOCUMENTS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_attention_is_softmax_over_what_is_visible(documents, heads):
    n, dh = 12, 8
    q, k, v = (torch.randn(n, h, dh, dtype=torch.float64, requires_grad=True) for h in (*heads, heads[1]))
    seen = visible(documents, n)
    wide_k, wide_v = (t.repeat_interleave(heads[0] // heads[1], dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, wide_k) / math.sqrt(dh)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)  # a row that sees nothing gives zeros
    truth = torch.einsum("hij,jhd->ihd", weights, wide_v)
    ours = kernels.attention(q, k, v, torch.tensor(documents, dtype=torch.int32))
    assert worst(ours - truth) < 1e-12
    upstream = torch.randn_like(truth)
    for ours_grad, true_grad in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(truth, (q, k, v), upstream), strict=True
    ):
        assert worst(ours_grad - true_grad) < 1e-12


def test_rms_norm():
    x, w = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    truth = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w
    assert worst(kernels.rms_norm(x, w, 1e-3) - truth) < 1e-12
    weight = torch.randn(3, 8, dtype=torch.float64)
    assert worst(kernels.norm_linear(x, w, weight, 1e-3)[0] - truth @ weight.T) < 1e-12
    y, s = kernels.norm_linear(x / 4, w, weight, 1e-3, residual=x * 3 / 4)
    assert worst(y - truth @ weight.T) < 1e-12 and worst(s - x) < 1e-12


def test_rms_norm_takes_its_statistics_in_fp32():
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # the sum of squares is far over fp16
    assert kernels.rms_norm(x, torch.ones(4096, dtype=torch.float16)).eq(1).all()


def test_rope_is_a_complex_rotation():
    dh, positions = 16, torch.tensor([0, 1, 2, 300, 4000])
    cos, sin = kernels.rope_cos_sin(positions, kernels.rope_frequencies(dh, 10000.0))
    q, k = torch.randn(5, 3, dh, dtype=torch.float64), torch.randn(5, 1, dh, dtype=torch.float64)
    for x, y in zip((q, k), kernels.rope(q, k, cos, sin), strict=True):
        angle = positions[:, None, None].double() / 10000.0 ** (torch.arange(0, dh, 2) / dh)
        z = torch.complex(x[..., : dh // 2], x[..., dh // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        assert worst(y - torch.cat((z.real, z.imag), -1)) < 1e-3  # fp32 angles: 4000 * 2^-24 radians and their cosines


def test_rope_keeps_position_4000_apart_from_4001_in_bf16():
    x = torch.ones(2, 1, 8, dtype=torch.bfloat16)
    cos, sin = kernels.rope_cos_sin(torch.tensor([4000, 4001]), kernels.rope_frequencies(8, 10000.0))
    q, _ = kernels.rope(x, x, cos, sin)
    assert worst(q[0] - q[1]) > 0.1


def test_llama3_scaling():
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    plain, scaled = kernels.rope_frequencies(128, 500000.0), kernels.rope_frequencies(128, 500000.0, scaling)
    wavelength = 2 * math.pi / plain
    assert scaled[wavelength < 8192 / 4].equal(plain[wavelength < 8192 / 4])
    assert worst(scaled[wavelength > 8192] - plain[wavelength > 8192] / 8) < 1e-12
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any() and (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


def test_swiglu():
    gate, up = torch.randn(2, 5, 6, dtype=torch.float64)
    truth = gate / (1 + (-gate).exp()) * up
    gate_up = torch.cat((gate, up), -1)
    assert worst(kernels.swiglu(gate_up) - truth) < 1e-12
    w = torch.randn(4, 6, dtype=torch.float64)
    assert worst(kernels.swiglu_linear(gate_up, w) - truth @ w.T) < 1e-12


@pytest.mark.parametrize("weighted", [False, True])
def test_linear_cross_entropy(weighted):
    x, w = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    targets = torch.tensor([0, 8, 3, 3, 1, 7])  # the first and the last id too
    weights = torch.rand(6, dtype=torch.float64) if weighted else None
    nll = -(x @ w.T).log_softmax(-1)[range(6), targets]
    truth = (nll * weights).sum() if weighted else nll.sum()
    assert worst(kernels.linear_cross_entropy(x, w, targets, weights) - truth) < 1e-12


def test_linear_cross_entropy_of_nothing_is_zero():
    x = torch.randn(0, 4, requires_grad=True)
    loss = kernels.linear_cross_entropy(x, torch.randn(9, 4), torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0


def test_linear_cross_entropy_sums_bf16_in_fp32():
    x, w = torch.randn(64, 32, dtype=torch.bfloat16), torch.randn(500, 32, dtype=torch.bfloat16)
    targets = torch.randint(500, (64,))
    truth = torch.nn.functional.cross_entropy((x @ w.T).double(), targets, reduction="sum")
    ours = kernels.linear_cross_entropy(x, w, targets)
    assert ours.dtype == torch.float32 and abs(ours.item() / truth.item() - 1) < 1e-5


@pytest.mark.parametrize("n", [0, 1, 7, 300_001])  # empty, and more than one chunk
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(n, weight_decay):
    p = torch.nn.Parameter(torch.randn(n))
    ours = p.detach().clone()
    state = kernels.adamw_state(ours)
    theirs = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay, foreach=False)
    for step in range(1, 6):
        p.grad = torch.randn(n)
        kernels.adamw(
            ours, p.grad, state, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=weight_decay, step=step
        )
        theirs.step()
    assert worst(ours - p.detach()) <= 1e-6


def test_adamw_master_carries_what_bf16_rounds_away():
    param = torch.ones(8, dtype=torch.bfloat16)
    state = kernels.adamw_state(param, master="fp32")
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    for step in range(1, 101):
        kernels.adamw(param, torch.ones(8, dtype=torch.bfloat16), state, step=step, **settings)
        assert param.equal(state.master.bfloat16())
    assert abs(state.master[0].item() - 0.99) < 1e-4  # 100 steps of 1e-4, each under half a bf16 unit of 1


def test_grad_norm_is_torchs_and_lets_nan_through():
    grads = [torch.randn(3, 4), torch.randn(5), torch.zeros(2)]
    assert worst(kernels.grad_norm(grads) - torch.nn.utils.get_total_norm(grads)) < 1e-6
    assert torch.isnan(kernels.grad_norm([*grads, torch.tensor([math.nan])]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: kernels.rms_norm(t(2, 16), t(8)), r"weight is \(8,\), x ends in 16"),
        (lambda t: kernels.rms_norm(t(2, 8), t(8).double()), "weight is torch.float64"),
        (lambda t: kernels.norm_linear(t(2, 8), t(8), t(4, 9)), r"weight is \(4, 9\)"),
        (lambda t: kernels.rope(t(3, 2, 8), t(3, 2, 8), t(3, 8), t(3, 8)), r"wanted cos and sin \(3, 4\)"),
        (lambda t: kernels.attention(t(4, 3, 8), t(4, 2, 8), t(4, 2, 8), t(1, 4)), "H a multiple of K"),
        (lambda t: kernels.attention(t(4, 2, 8), t(4, 2, 8), t(4, 2, 8), t(1, 3)), r"wanted \(N, 4\)"),
        (lambda t: kernels.swiglu(t(2, 3)), "wanted an even number"),
        (lambda t: kernels.linear_cross_entropy(t(2, 4), t(9, 4), t(3)), r"targets \(3,\)"),
        (lambda t: kernels.grad_norm([]), "no gradients given"),
        (lambda t: kernels.rms_norm(t(2, 8), t(8), impl="magic"), "impl is 'magic', wanted one of"),
    ],
)
def test_what_does_not_fit_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros)
