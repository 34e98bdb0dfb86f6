"""Peers lay attention out as the case does, and give its results; one that cannot take part says why."""

import sys
from types import SimpleNamespace

import pytest
import torch

from kernels.measure import cases as bench_cases
from kernels.measure import peers as bench_peers
from kernels.measure.documents import draw_alpaca_rows, pack_equal, pack_whole, pack_with_shared_prefixes
from kernels.measure.truth import as_tuple, copy_as_leaves
from kernels.ops import attention, rms_norm, rope, swiglu
from tests.helpers.run import worst


@pytest.mark.parametrize(
    ("layout", "heads", "kv_heads", "peers"),
    [
        ("unshared", 2, 2, ("SDPA flash", "SDPA nested", "FlexAttention")),
        ("unshared", 2, 1, ("SDPA flash", "FlexAttention")),
        ("shared", 2, 2, ("FlexAttention",)),
        ("equal", 2, 2, ("SDPA flash",)),
    ],
)
def test_peers_lay_attention_out_as_it_is(monkeypatch, layout, heads, kv_heads, peers):
    monkeypatch.setattr(bench_peers, "require_cuda", lambda what: None)
    rows = draw_alpaca_rows(400)
    documents, n_rows = {
        "unshared": pack_whole(rows), "shared": pack_with_shared_prefixes(rows), "equal": pack_equal(8, 24),
    }[layout]  # fmt: skip
    case = bench_cases.attention_case(
        "", documents, n_rows, heads, kv_heads, 16, packed=layout != "equal", prefix=layout == "shared"
    )
    assert len(documents) >= 3
    inputs = case.inputs("cpu", torch.float32)
    upstream = (torch.randn(n_rows, heads, 16),)
    for who in peers:
        ready = bench_peers.PEERS["attention"][who](case, inputs, upstream)
        for leaf, t in zip((*ready.leaves, *ready.upstream), (inputs.q, inputs.k, inputs.v, *upstream), strict=True):
            assert torch.equal(ready.canonical(leaf), t), who
        if who != "SDPA nested":  # which runs causally on CUDA alone
            for leaf in ready.leaves:
                leaf.requires_grad_(False)  # FlexAttention has no backward on a CPU
            assert worst(ready.canonical(ready.run()) - case.reference(inputs)) < 1e-5, who


# ---- who cannot take part -------------------------------------------------------------------------------------------

PACKED, PREFIX = [(0, 3, 0, 0), (3, 8, 0, 0)], [(0, 3, 0, 0), (3, 8, 0, 3)]
NO_PREFIX, NO_CUDA = "cannot share a prefix between documents", "{} runs on CUDA alone"
NEEDS_CUDA = {
    "SDPA flash": None, "SDPA cuDNN": NO_CUDA.format("cuDNN"),
    "SDPA nested": NO_CUDA.format("causal SDPA of nested tensors"), "varlen_attn": NO_CUDA.format("varlen_attn"),
    "FlexAttention": NO_CUDA.format("the backward of FlexAttention"),
}  # fmt: skip
REASONS = {  # of attention without CUDA
    "packed": (
        bench_cases.attention_case("", PACKED, 8, 2, 2, 16, packed=True),
        {},
    ),
    "grouped": (
        bench_cases.attention_case("", PACKED, 8, 2, 1, 16, packed=True),
        {"SDPA nested": "nested SDPA takes no grouped queries"},
    ),
    "a prefix": (
        bench_cases.attention_case("", PREFIX, 8, 2, 2, 16, packed=True, prefix=True),
        dict.fromkeys(("SDPA flash", "SDPA cuDNN", "SDPA nested", "varlen_attn"), NO_PREFIX),
    ),
    "equal": (
        bench_cases.attention_case("", [(0, 4, 0, 0), (4, 8, 0, 0)], 8, 2, 2, 16),
        {
            "SDPA nested": "documents of equal length need no nested tensor",
            "FlexAttention": "FlexAttention is measured on packed documents",
        },
    ),
}


def ready_of(case, who):
    """Return the case's inputs, upstream gradients and the peer, prepared on them."""
    inputs = copy_as_leaves(case, case.inputs("cpu", torch.float32))
    upstream = tuple(torch.randn(t.shape) for t in as_tuple(case.reference(inputs)))
    return inputs, upstream, bench_peers.PEERS[case.op][who](case, inputs, upstream)


def reason(who, case):
    """Return why a peer takes no part in a case, None if it does."""
    try:
        ready_of(case, who)
    except bench_peers.Absent as absent:
        return str(absent)
    return None


@pytest.mark.parametrize("kind", REASONS)
def test_what_keeps_a_peer_of_attention_out_is_said(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case, reasons = REASONS[kind]
    assert {who: reason(who, case) for who in bench_peers.PEERS["attention"]} == NEEDS_CUDA | reasons


@pytest.mark.parametrize("is_installed", [False, True])
def test_peers_of_other_ops_need_their_package_and_cuda(is_installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: name if is_installed else None)
    why = "{} is installed; it runs on CUDA alone" if is_installed else "{} is not installed"
    packages = {
        "liger-kernel": "liger_kernel", "liger-kernel merged": "liger_kernel", "bitsandbytes": "bitsandbytes",
        "cut-cross-entropy": "cut_cross_entropy", "cut-cross-entropy, exact": "cut_cross_entropy",
        "flashoptim 32": "flashoptim", "flashoptim 24": "flashoptim", "bitsandbytes 8-bit": "bitsandbytes",
        "torchao 8-bit": "torchao",
    }  # fmt: skip
    wanted = {who: why.format(package) for who, package in packages.items()}
    wanted["torch.compile"] = "torch.compile here runs on CUDA alone"
    for case in bench_cases.toy_cases():
        if case.op != "attention" and case.main:
            for who in bench_peers.PEERS[case.op]:
                if who != "ours, in place":
                    assert reason(who, case) == wanted.get(who), (case.op, who)


def test_what_is_tried_at_one_shape_is_not_tried_at_another(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: fn)
    for main in (False, True):
        said = reason("torch.compile", bench_cases.swiglu_case(4, 8, main))
        assert said == (
            None if main else "torch.compile is tried at one shape an op: compiling takes longer than measuring"
        )
    case = bench_cases.adamw_case((4, 8), "split", "fp32")
    assert reason("torch fused, fp32", case) == "other optimizers are timed once, beside the main mode"
    assert reason("F.rms_norm", bench_cases.rms_norm_case(4, 8)) is None
    assert reason("F.rms_norm", bench_cases.rms_norm_case(4, 8, residual=True)) == "F.rms_norm adds no residual"


# ---- what peers are given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_torchs_varlen_attention_is_given_where_documents_end(kv_heads, window, monkeypatch):
    """And is causal, by the name that its torch has for that."""
    given = []

    def by_window(q, k, v, ends_q, ends_k, longest_q, longest_k, *, window_size=(-1, -1), enable_gqa=False):
        given.append((ends_q, ends_k, longest_q, longest_k, window_size, enable_gqa))
        return attention.attention_ref(q, k, v, torch.tensor(PACKED, dtype=torch.int32))

    def by_flag(q, k, v, ends_q, ends_k, longest_q, longest_k, *, is_causal=False):
        return by_window(q, k, v, ends_q, ends_k, longest_q, longest_k, window_size=(-1, 0 if is_causal else -1))

    module = SimpleNamespace(varlen_attn=by_window if window else by_flag)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(bench_peers, "require_cuda", lambda what: None)
    case = bench_cases.attention_case("", PACKED, 8, 2, kv_heads, 16, packed=True)
    if kv_heads == 1 and not window:
        with pytest.raises(
            bench_peers.Absent, match=f"torch {torch.__version__} takes no grouped queries".replace("+", r"\+")
        ):
            ready_of(case, "varlen_attn")
        return
    inputs, upstream, ready = ready_of(case, "varlen_attn")
    assert worst(ready.run() - case.reference(inputs)) < 1e-6 and ready.upstream == upstream
    ((ends_q, ends_k, *rest),) = given
    assert ends_q.tolist() == ends_k.tolist() == [0, 3, 8] and ends_q.dtype == torch.int32
    assert rest == [5, 5, (-1, 0), kv_heads == 1]


def stand_in_for_liger():
    """Return liger-kernel's functions as formulas, which take what its own take."""

    def norm(x, weight, eps, offset, mode, in_place):
        assert (offset, mode, in_place) == (0.0, "llama", False)
        return rms_norm.rms_norm_ref(x, weight, eps)

    def norm_of_sum(x, residual, weight, eps, offset, mode, in_place):
        return norm(x + residual, weight, eps, offset, mode, in_place), x + residual

    def rotate(q, k, cos, sin):  # (1, H, T, Dh) and (1, T, Dh), as transformers rotates
        def turn(x):
            half = x.shape[-1] // 2
            return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]

        return turn(q), turn(k)

    def losses(x, weight, targets, bias, class_weight, ignore_index, z_loss, smoothing, reduction):
        assert (bias, class_weight, ignore_index, z_loss, smoothing) == (None, None, -100, 0.0, 0.0)
        return torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction=reduction), None

    functions = {
        "LigerRMSNormFunction": norm, "LigerFusedAddRMSNormFunction": norm_of_sum, "LigerRopeFunction": rotate,
        "LigerSiLUMulFunction": lambda gate, up: torch.nn.functional.silu(gate) * up,
        "LigerFusedGateUpSiLUMulFunction": swiglu.swiglu_ref, "LigerFusedLinearCrossEntropyFunction": losses,
    }  # fmt: skip
    return SimpleNamespace(**{name: SimpleNamespace(apply=function) for name, function in functions.items()})


@pytest.mark.parametrize(
    ("case", "who"),
    [
        (bench_cases.rms_norm_case(4, 8), "liger-kernel"),
        (bench_cases.rms_norm_case(4, 8, residual=True), "liger-kernel"),
        (bench_cases.rms_norm_case(4, 8), "F.rms_norm"),
        (bench_cases.rope_case(5, 2, 1, 8), "liger-kernel"),
        (bench_cases.swiglu_case(4, 8), "liger-kernel"),
        (bench_cases.swiglu_case(4, 8), "liger-kernel merged"),
        (bench_cases.linear_cross_entropy_case(5, 8, 12), "liger-kernel"),
        (bench_cases.linear_cross_entropy_case(5, 8, 12), "cut-cross-entropy"),
        (bench_cases.linear_cross_entropy_case(5, 8, 12), "cut-cross-entropy, exact"),
        (bench_cases.grad_norm_case([(3, 5), (7,)], ""), "torch foreach"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.op} {x.shape}",
)
def test_a_peer_computes_the_op_and_its_gradients(case, who, monkeypatch):
    """By stand-ins for the packages, which hold the formulas. What a peer writes over are copies."""
    options = []

    def cut(x, weight, targets, reduction, **more):
        options.append(more)
        return torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction=reduction)

    packages = {"liger_kernel": stand_in_for_liger(), "cut_cross_entropy": SimpleNamespace(linear_cross_entropy=cut)}
    monkeypatch.setattr(bench_peers, "import_peer", lambda package, module=None: packages[package])
    inputs, upstream, ready = ready_of(case, who)

    out, want = as_tuple(ready.run()), as_tuple(case.reference(inputs))
    assert len(out) == len(want)
    assert all(worst(ready.canonical(a) - b) < 1e-5 for a, b in zip(out, want, strict=True))
    if case.grads:
        grads = torch.autograd.grad(out, ready.leaves, ready.upstream)
        truth = torch.autograd.grad(want, [getattr(inputs, name) for name in case.grads], upstream)
        assert all(worst(ready.canonical(a) - b) < 1e-5 for a, b in zip(grads, truth, strict=True))
    if "cut" in who:
        assert options == [{"filter_eps": None} if "exact" in who else {}]
    if case.op == "rope":
        mine = {t.data_ptr() for t in (inputs.q, inputs.k, *upstream)}
        assert not mine & {t.data_ptr() for t in (*ready.leaves, *ready.upstream)}


def test_an_older_liger_kernel_takes_gate_and_up_apart(monkeypatch):
    ops = stand_in_for_liger()
    del ops.LigerFusedGateUpSiLUMulFunction
    monkeypatch.setattr(bench_peers, "import_peer", lambda *names: ops)
    case = bench_cases.swiglu_case(4, 8)
    assert reason("liger-kernel merged", case) == "this liger-kernel takes gate and up apart only"
    assert reason("liger-kernel", case) is None


def test_our_rotation_in_place_writes_over_copies(monkeypatch):
    def rotate(q, k, cos, sin, inverse):
        for x, turned in zip((q, k), rope.rope_ref(q, k, cos, -sin if inverse else sin), strict=True):
            x.copy_(turned)

    monkeypatch.setattr(bench_peers.rope, "rotate", rotate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = bench_cases.rope_case(5, 2, 1, 8)
    monkeypatch.setattr(bench_peers, "INTERPRETED", False)
    assert reason("ours, in place", case) == "kernels run on CUDA, or in Triton's interpreter"
    monkeypatch.setattr(bench_peers, "INTERPRETED", True)
    inputs, upstream, ready = ready_of(case, "ours, in place")
    want = case.reference(inputs)
    truth = torch.autograd.grad(want, (inputs.q, inputs.k), upstream)
    before = [t.detach().clone() for t in (inputs.q, inputs.k, *upstream)]
    for got, right in ((ready.run(), want), (ready.back(), truth)):
        assert all(worst(a - b) < 1e-6 for a, b in zip(got, right, strict=True))
    assert all(map(torch.equal, (inputs.q, inputs.k, *upstream), before))


OPTIMIZERS = {  # the stand-in's package, the class it is, and the settings it gets beside AdamW's own
    "flashoptim 32": ("FlashAdamW", {"master_weight_bits": 32}),
    "flashoptim 24": ("FlashAdamW", {"master_weight_bits": 24}), "bitsandbytes 8-bit": ("AdamW8bit", {}),
    "torchao 8-bit": ("AdamW8bit", {"bf16_stochastic_round": True}),
    "torch fused, fp32": (None, {}), "torch fused, all bf16": (None, {}),
}  # fmt: skip


@pytest.mark.parametrize("who", OPTIMIZERS)
def test_another_optimizer_takes_a_step_of_adamw(who, monkeypatch):
    """The first one from zero, p (1 - lr decay) - lr g / (|g| + eps), in the peer's dtype and on a copy."""
    name, settings = OPTIMIZERS[who]
    given = []

    def make(params, **more):
        given.append({key: value for key, value in more.items() if key not in ("lr", "betas", "eps", "weight_decay")})
        return torch.optim.AdamW(params, **{key: more[key] for key in ("lr", "betas", "eps", "weight_decay")})

    if name:
        package = SimpleNamespace(**{name: make}, optim=SimpleNamespace(**{name: make}))
        monkeypatch.setattr(bench_peers, "import_peer", lambda *names: package)
    case = bench_cases.adamw_case((4, 8), "split", "fp32", main=True)
    case.sizes["settings"].update(lr=0.25, weight_decay=0.5)
    inputs = case.inputs("cpu", torch.float32)
    before, dtype = inputs.param.clone(), torch.float32 if who == "torch fused, fp32" else torch.bfloat16
    found = bench_peers.PEERS["adamw"][who](case, inputs, ()).run()
    p, g = inputs.param.to(dtype), inputs.grad.to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    want = p.double() * 0.875 - 0.25 * g.double() / (g.double().abs() + 1e-8)
    assert found.dtype == dtype and not found.requires_grad and worst(found.double() - want) < tolerance
    assert inputs.param.equal(before) and given == ([settings] if name else [])


@pytest.mark.parametrize("who", ["FLASH_ATTENTION", "CUDNN_ATTENTION"])
def test_sdpa_is_asked_for_by_the_backend_of_its_name(who, monkeypatch):
    """Once for each run, which is causal and groups the queries where there are fewer keys."""
    import torch.nn.attention as torchs
    from torch.nn.attention import SDPBackend

    real, asked, given = torchs.sdpa_kernel, [], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def attention_of(*args, **named):
        given.append(named)
        return attend(*args, **named)

    monkeypatch.setattr(torchs, "sdpa_kernel", lambda backend: asked.append(backend) or real(SDPBackend.MATH))
    monkeypatch.setattr(bench_peers.F, "scaled_dot_product_attention", attention_of)
    monkeypatch.setattr(bench_peers, "require_cuda", lambda what: None)
    for kv_heads in (2, 1):
        case = bench_cases.attention_case("", PACKED, 8, 2, kv_heads, 16, packed=True)
        inputs = copy_as_leaves(case, case.inputs("cpu", torch.float32))
        ready = bench_peers.sdpa(who)(case, inputs, (torch.randn(8, 2, 16),))
        assert worst(ready.canonical(ready.run()) - case.reference(inputs)) < 1e-5
    assert asked == [getattr(SDPBackend, who)] * 2
    assert given == [{"is_causal": True, "enable_gqa": grouped} for grouped in (False, True)]


def test_torch_compiles_a_reference_once_a_case(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda fn, **named: compiled.append(named) or (lambda i: fn(i) * 2))
    case = bench_cases.swiglu_case(4, 8, main=True)
    inputs, upstream, ready = ready_of(case, "torch.compile")
    again = bench_peers.compiled(case, inputs, upstream)
    assert compiled == [{"dynamic": False}] * 2 and case.memo["compiled"](inputs).equal(2 * case.reference(inputs))
    assert ready.run().equal(again.run()) and ready.upstream is upstream


def test_a_package_is_imported_where_it_can_run(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bench_peers.importlib, "import_module", lambda name: asked.append(name) or name)
    assert bench_peers.import_peer("a") == "a" and bench_peers.import_peer("a", "a.b") == "a.b"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(bench_peers.Absent, match="what runs on CUDA alone"):
        bench_peers.require_cuda("what")
    assert asked == ["a", "a.b"]


def test_each_peer_is_of_its_package_and_module(monkeypatch):
    asked = []

    def absent(*names):
        asked.append(names)
        raise bench_peers.Absent("no")

    monkeypatch.setattr(bench_peers, "import_peer", absent)
    for case in bench_cases.toy_cases():
        for who in bench_peers.PEERS.get(case.op, {}):
            if case.main and who not in ("torch.compile", "bare GEMM", "ours, in place") and case.op != "attention":
                asked.append(who)
                reason(who, case)
    liger = ("liger_kernel", "liger_kernel.ops")
    assert asked == [
        "F.rms_norm", "liger-kernel", liger, "liger-kernel", liger, "liger-kernel", liger, "liger-kernel merged",
        ("liger_kernel", "liger_kernel.ops.swiglu"), "liger-kernel", liger, "cut-cross-entropy", ("cut_cross_entropy",),
        "cut-cross-entropy, exact", ("cut_cross_entropy",), "torch foreach", "bitsandbytes",
        ("bitsandbytes", "bitsandbytes.functional"), "torch fused, fp32", "torch fused, all bf16", "flashoptim 32",
        ("flashoptim",), "flashoptim 24", ("flashoptim",), "bitsandbytes 8-bit", ("bitsandbytes",), "torchao 8-bit",
        ("torchao", "torchao.optim"),
    ]  # fmt: skip
