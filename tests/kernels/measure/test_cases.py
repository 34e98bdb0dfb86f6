"""The work that benchmarks count for each op, by hand."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.measure import cases as bench_cases
from kernels.measure import peers as bench_peers
from kernels.measure.cases import Work
from kernels.measure.truth import as_tuple, copy_as_leaves
from kernels.ops import adamw, grad_norm, linear_cross_entropy
from tests.helpers.run import worst

BF16 = torch.bfloat16

DOCUMENTS = [(0, 3, 0, 0), (3, 5, 0, 3)]  # the second sees the first whole


def test_attention_counts_what_a_query_sees():
    # 3 rows see 9/2 pairs; 2 rows see 2 * 3 of the prefix and 4/2 of their own. 4 FLOPs a pair, head and dimension.
    assert bench_cases.attention_flops(DOCUMENTS, n_heads=2, head_dim=8) == 4 * (4.5 + 6 + 2) * 2 * 8
    work = bench_cases.attention_work(DOCUMENTS, 5, 2, 1, 8)
    assert work["fwd"] == Work(800, 2 * 80 + 2 * 40)  # q, o; k, v
    assert work["bwd"] == Work(2000, 4 * 80 + 4 * 40)  # q, o, do, dq; k, v, dk, dv
    (case,) = [c for c in bench_cases.full_cases() if c.shape == "dense s=4096 H=32 Dh=128"]
    assert case.work["fwd"].flops == 4 * 4 * 4096**2 / 2 * 32 * 128


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (bench_cases.rms_norm_case(3, 5), (0, 2 * 15 + 5, 0), (0, 3 * 15 + 10, 0)),
        (bench_cases.rms_norm_case(3, 5, residual=True), (0, 4 * 15 + 5, 0), (0, 4 * 15 + 10, 0)),
        (bench_cases.rope_case(3, 2, 1, 4), (0, 2 * 36, 48), (0, 2 * 36, 48)),
        (bench_cases.swiglu_case(3, 5), (0, 45, 0), (0, 75, 0)),
        (bench_cases.norm_linear_case(3, 5, 7), (210, 15 + 35 + 21, 0), (420, 30 + 70 + 21, 0)),
        # gate_up 30, weight 35, output 21; dy 21, gate_up and its gradient 30 each, weight twice
        (bench_cases.swiglu_linear_case(3, 5, 7), (210, 30 + 35 + 21, 0), (420, 21 + 60 + 70, 0)),
        (bench_cases.linear_cross_entropy_case(3, 5, 7), (210, 15 + 35, 0), (420, 30 + 70, 0)),
    ],
    ids=lambda x: x.op if isinstance(x, bench_cases.BenchCase) else "",
)
def test_work_by_hand(case, forward, backward):
    assert tuple(case.work["fwd"]) == forward and tuple(case.work["bwd"]) == backward


def test_bytes_a_parameter():
    assert bench_cases.grad_norm_case([(2, 3), (4,)], "").work["fwd"] == Work(0, 10)
    assert bench_cases.nf4_case(3, 100).work["fwd"] == Work(0, 300, 150 + 5 + 4)  # codes, maxima, their maxima
    assert bench_cases.adamw_case((2, 3), "split", "fp32").work["fwd"].bytes == 26 * 6  # w, low, g, m, v; w, low, m, v
    assert bench_cases.adamw_case((2, 3), "split", "8bit").work["fwd"].bytes == pytest.approx(14.0625 * 6)
    assert bench_cases.adamw_case((2, 3), None, "fp32").work["fwd"].bytes == 28 * 6


TOYS = list(bench_cases.toy_cases())


@pytest.mark.parametrize("case", TOYS, ids=lambda case: f"{case.op} {case.shape}")
def test_a_case_calls_its_op_with_what_the_reference_takes(case):
    """In fp64, with the gradients of all inputs that have one."""
    inputs = case.inputs("cpu", torch.float32)
    if case.grads:
        inputs = copy_as_leaves(case, inputs, torch.float64)
    theirs, ours = copy_as_leaves(case, inputs), copy_as_leaves(case, inputs)
    want, found = (as_tuple(case.results(i, out)) for i, out in (
        (theirs, case.reference(theirs)), (ours, case.ours(ours, "ref")),
    ))  # fmt: skip
    assert [t.shape for t in found] == [t.shape for t in want]
    assert all(worst(a.double() - b.double()) < 1e-6 for a, b in zip(found, want, strict=True))
    upstream = [torch.randn_like(t) for t in want] if case.grads else []
    if case.grads:
        for out, i in ((want, theirs), (found, ours)):
            torch.autograd.backward(out, upstream)
            assert all(getattr(i, name).grad is not None for name in case.grads)
        assert all(worst(getattr(ours, name).grad - getattr(theirs, name).grad) < 1e-6 for name in case.grads)


def test_a_case_of_a_norm_is_the_formula():
    """With a residual, of the sum, which is returned too."""
    for case in TOYS:
        if case.op == "rms_norm":
            i = copy_as_leaves(case, case.inputs("cpu", torch.float32), torch.float64)
            s = i.x if i.residual is None else i.x + i.residual
            y = s / (s.square().mean(-1, keepdim=True) + 1e-5).sqrt() * i.weight
            found = as_tuple(case.reference(i))
            assert all(worst(a - b) < 1e-9 for a, b in zip(found, (y, s)[: len(found)], strict=True))
            assert len(found) == 1 + (i.residual is not None)


def test_attention_is_planned_once_for_inputs(monkeypatch):
    planned, real = [], bench_cases.attention.attention_plan
    monkeypatch.setattr(bench_cases.attention, "attention_plan", lambda *a: planned.append(a) or real(*a))
    for case in TOYS:
        if "attention" in case.op:
            planned.clear()
            for inputs in (case.inputs("cpu", torch.float32) for _ in range(2)):
                for _ in range(3):
                    case.ours(inputs, "ref")
            assert len(planned) == 2, case.shape


@pytest.mark.parametrize("cases", [bench_cases.toy_cases, bench_cases.full_cases])
def test_each_op_has_one_main_shape(cases):
    """At which torch.compile and other optimizers are tried. Of RoPE and attention as one op there are no peers."""
    mains = [case.op for case in cases() if case.main]
    assert sorted(mains) == sorted({case.op for case in cases()} - {"rope_attention"})


@pytest.mark.parametrize("case", [case for case in TOYS if "bare GEMM" in bench_peers.PEERS.get(case.op, {})])
def test_the_bare_product_is_that_of_the_op(case):
    """As many FLOPs as the op counts, of the op's weight; its gradients are those of both factors."""
    inputs = case.inputs("cpu", torch.float32)
    ready = bench_peers.bare_gemm(case, inputs, ())
    x, w = ready.leaves
    assert torch.equal(w, inputs.weight) and case.work["fwd"].flops == 2 * len(x) * len(w) * w.shape[1]
    assert worst(ready.run() - torch.einsum("td,nd->tn", x, w)) < 1e-4
    assert ready.upstream[0].shape == (len(x), len(w)) and x.requires_grad and w.requires_grad


def test_a_timed_update_computes_no_master():
    """Splitting the parameter and joining it again would move 16 bytes a parameter beside the 14 that AdamW moves."""
    case = bench_cases.adamw_case((4, 1088), "split", "8bit")
    inputs = copy_as_leaves(case, case.inputs("cpu", torch.float32))
    ready = bench_peers.plain(lambda case, i: case.reference(i))(case, inputs, ())
    out = ready.run()
    assert out is inputs.param and out.dtype == torch.bfloat16
    master, *_ = ready.results(out)
    assert master.dtype == torch.float32


def test_references_on_a_gpu_take_few_launches():
    """Counted on tensors without storage: chunks for a CPU's cache made 15,141 calls for one LLaMA-7B matrix."""

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 1
            return func(*args, **(kwargs or {}))

    def count(run):
        with Count() as counted:
            run()
        return counted.n

    case = bench_cases.adamw_case((22016, 4096), "split", "fp32")
    param, grad, m, v = (torch.empty(22016, 4096, device="meta", dtype=t) for t in (BF16, BF16, *[torch.float32] * 2))
    state = adamw.AdamWState(m, v, low=torch.empty(22016, 4096, device="meta", dtype=torch.int16))
    update = partial(adamw.adamw, param, grad, state, step=2, impl="ref", **case.sizes["settings"])
    assert count(update) < 200
    assert count(lambda: grad_norm.grad_norm_ref([grad])) < 20
    logits, targets = torch.empty(8192, 32000, device="meta", dtype=BF16), torch.empty(8192, device="meta", dtype=int)
    assert count(lambda: linear_cross_entropy._losses_ref(logits, targets, -100, 0.0, 0.0)) < 60


def test_the_gradients_of_a_norm_are_those_of_its_name():
    """Of four layers of LLaMA-7B: wqkv, wo, w13, w2 and two norms each, by its shapes."""
    (case,) = [case for case in bench_cases.full_cases() if case.op == "grad_norm"]
    grads = case.inputs("meta", torch.bfloat16).grads
    assert case.shape == "24 tensors, 4 layers of 7b" and len(grads) == 24
    assert sum(g.numel() for g in grads) == 4 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)


# ---- the tables -----------------------------------------------------------------------------------------------------


def told(case):
    """Return a case and the shapes of its inputs as text. The inputs are made without storage."""
    sizes = {name: value for name, value in case.sizes.items() if name != "documents"}
    lines = [f"{case.op} {case.shape}{', main' * case.main}: {'/'.join(case.passes)}, d({', '.join(case.grads)})"]
    lines += [f"  {kind} {work.flops:.0f} FLOPs, {work.elements} elements, {work.bytes} bytes"
              for kind, work in case.work.items()]  # fmt: skip
    lines += [f"  {sizes}"] * bool(sizes) + ["  a truth of its own"] * (case.truth is not None)
    if case.op != "nf4":
        for name, t in sorted(vars(case.inputs("meta", torch.bfloat16)).items()):
            tensors = t if isinstance(t, list) else [*t.values()] if isinstance(t, dict) else [t]
            shapes = [f"{tuple(x.shape)} {str(x.dtype)[6:]} {x.device}" for x in tensors if x is not None]
            lines += [f"  {name}: {', '.join(dict.fromkeys(shapes))}"] * bool(shapes)
    return "\n".join(lines)


@pytest.mark.parametrize("table", ["toy", "full"])
def test_the_cases_are_those_that_were(table, snapshot, monkeypatch):
    monkeypatch.setattr(bench_cases.adamw, "adamw", lambda *args, **named: None)
    cases = list({"toy": bench_cases.toy_cases, "full": bench_cases.full_cases}[table]())
    middle = len(cases) // 2
    assert "\n".join(map(told, cases[:middle])) + "\n" == snapshot(name=f"{table} 1")
    assert "\n".join(map(told, cases[middle:])) + "\n" == snapshot(name=f"{table} 2")


@pytest.mark.parametrize("case", TOYS, ids=lambda case: f"{case.op} {case.shape}")
def test_the_impl_that_is_asked_for_reaches_the_op(case):
    inputs = case.inputs("cpu", torch.float32)
    for attempt in range(2):
        with pytest.raises(ValueError, match="impl is 'other'"):
            case.ours(inputs, "other")
        assert not getattr(inputs, "cache", None) or attempt, "no plan was made by another impl"
        if attempt == 0:
            case.ours(inputs, "ref")  # attention has a plan from here on


def test_inputs_are_spread_as_a_layer_has_them():
    """Weights that keep the size of what they multiply; positions from 0 to 127; states that are not zero."""
    torch.manual_seed(0)

    def made(case, dtype=torch.float32):
        return case.inputs("cpu", dtype)

    norm, gate = made(bench_cases.norm_linear_case(4, 64, 96)), made(bench_cases.swiglu_linear_case(4, 64, 96))
    head = made(bench_cases.linear_cross_entropy_case(300, 64, 96))
    for weight in (norm.weight, gate.weight, head.weight):
        assert weight.shape == (96, 64) and abs(weight.std() - 1 / 8) < 0.01
    assert norm.norm.min() >= 0.5 and norm.norm.max() < 1.5 and norm.norm.unique().numel() == 64
    assert norm.residual is None and made(bench_cases.norm_linear_case(4, 64, 96, residual=True)).residual is not None
    assert head.targets.min() >= 0 and head.targets.max() < 96 and head.targets.unique().numel() > 80
    for case in (bench_cases.rope_case(130, 1, 1, 8), bench_cases.rope_attention_case("", DOCUMENTS, 130, 1, 1, 8)):
        i = made(case, torch.float64)
        angles = (torch.arange(130) % 128)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
        assert worst(i.cos - angles.cos()) < 1e-4 and worst(i.sin - angles.sin()) < 1e-4
    qkv = made(bench_cases.rope_attention_case("", DOCUMENTS, 5, 3, 1, 8), torch.float16).qkv
    assert qkv.shape == (5, 5, 8) and qkv.dtype == torch.float16
    state = made(bench_cases.adamw_case((4, 1088), "split", "8bit"))
    assert all((t != 0).any() for t in state.state.values()) and state.param.dtype == torch.bfloat16


def test_a_loss_and_rotated_attention_are_the_formulas():
    case = bench_cases.linear_cross_entropy_case(5, 8, 12)
    i = copy_as_leaves(case, case.inputs("cpu", torch.float32), torch.float64)
    want = torch.nn.functional.cross_entropy(i.x @ i.weight.T, i.targets, reduction="sum")
    assert worst(case.reference(i) - want) < 1e-9
    case = bench_cases.grad_norm_case([(300, 70), (5,)], "")
    i = case.inputs("cpu", torch.bfloat16)
    exact = torch.cat([g.flatten() for g in i.grads]).double().norm()
    assert case.truth(i).dtype == torch.float64 and worst(case.truth(i) - exact) < 1e-9


@pytest.mark.parametrize(("master", "states"), [("split", "8bit"), ("fp32", "fp32"), (None, "bf16")])
def test_the_second_step_of_adamw_is_taken_with_the_settings(master, states, monkeypatch):
    """The first one, on another gradient, made the states; what is checked is the master and what is kept."""
    given = []
    monkeypatch.setattr(bench_cases.adamw, "adamw", lambda *args, **named: given.append((args, named)))
    case = bench_cases.adamw_case((4, 1088), master, states)
    i = case.inputs("cpu", torch.float32)
    assert case.ours(i, "triton") is case.reference(i) is case.truth(i) is i.param
    settings = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
    assert [named for _, named in given] == [
        dict(step=step, impl=impl, **settings) for step, impl in ((1, "ref"), (2, "triton"), (2, "ref"), (2, "ref"))
    ]
    (_, first, _), (param, second, state) = given[0][0], given[1][0]
    assert param is i.param and second is i.grad and not torch.equal(first, second)
    assert all(getattr(state, name) is t for name, t in i.state.items())
    kept = case.results(i, None)
    others = [name for name in i.state if name not in ("master", "low")]
    assert len(kept) == 1 + len(others) and all(a is i.state[name] for a, name in zip(kept[1:], others, strict=True))
    assert kept[0].dtype == torch.float32 and torch.equal(
        kept[0], adamw.master_of(i.param, adamw.AdamWState(**i.state))
    )
