"""The cases of kernels.simulate: which there are, what they hold, and that each asks for what its op computes."""

import pytest
import torch

from kernels.measure import cuda_cases
from kernels.measure import simulated_cases as cases
from kernels.measure.truth import as_tuple, copy_as_leaves, largest_error
from kernels.ops.decode_attention import DecodeCache
from tests.helpers.run import worst

TABLES = {
    "attention": cases.attention_cases, "rows": cases.row_cases, "loss": cases.loss_cases, "nf4": cases.nf4_cases,
    "optimizer": cases.optimizer_cases, "csrc": cases.csrc_cases,
}  # fmt: skip


def named(dtype):
    return str(dtype).removeprefix("torch.")


def told(case):
    """Return a case as one line."""
    bench = case.case
    facts = [f"d({', '.join(bench.grads)})"] if bench.grads else []
    facts += ["a truth of its own"] if bench.truth else []
    return "; ".join([f"{bench.op} {bench.shape}", named(case.dtype), "+".join(case.chips), *facts])


@pytest.mark.parametrize("table", TABLES)
def test_the_cases_are_those_that_were(table, snapshot, monkeypatch):
    monkeypatch.setattr(cases, "has_nvcc", lambda: True)
    assert "\n".join(map(told, TABLES[table]())) + "\n" == snapshot


def test_the_cases_are_all_of_the_tables(monkeypatch):
    monkeypatch.setattr(cases, "has_nvcc", lambda: True)
    names = "attention", "rows", "loss", "optimizer", "nf4", "csrc"
    assert list(map(told, cases.simulated_cases())) == [told(case) for name in names for case in TABLES[name]()]


@pytest.mark.parametrize("kind", ["packed", "long", "parts", "mixed"])
def test_documents_are_those_of_their_kind(kind):
    documents, n_rows = cases._documents(kind)
    want = {
        "packed": ([(0, 40, 0, 0), (40, 75, 0, 40), (75, 110, 0, 40), (110, 138, 0, 40), (145, 180, 0, 40),
                    (180, 215, 0, 40), (215, 280, 0, 40)], 300),
        "long": ([(0, 130, 0, 0), (130, 333, 0, 130)], 340),
        "parts": ([(0, 40, 0, 0)] + [(40 + 30 * i, 70 + 30 * i, 0, 40) for i in range(40)], 1240),
        "mixed": ([(0, 10, 0, 0), (12, 40, 2, 5), (40, 47, 12, 40), (47, 60, 20, 33), (60, 61, 30, 47),
                   (61, 90, 0, 10)], 90),
    }[kind]  # fmt: skip
    assert (documents, n_rows) == want
    seen = cases._visible(documents, n_rows)
    for row in range(0, n_rows, 7):
        keys = [k for s, e, ps, pe in documents if s <= row < e for k in (*range(ps, pe), *range(s, row + 1))]
        assert seen[row].nonzero().flatten().tolist() == sorted(keys)


# ---- ours and the reference -----------------------------------------------------------------------------------------

SMALL = {
    "attention": lambda: cases.attention_case("mixed", 4, 2, 8),
    "rope_attention": cases.packed_rope_attention_case,
    "rope_attention_rows": lambda: cases.rope_attention_rows_case(2, 1, 8),
    "norm_linear_rows": lambda: cases.norm_linear_rows_case(7, 12, 10),
    "consumed": lambda: cases.swiglu_consumed_case(5, 12, 6),
    "kept": lambda: cases.swiglu_consumed_case(5, 12, 6, keep=True),
    "loss": lambda: cases.linear_cross_entropy_case(9, 8, 33),
    "smooth loss": lambda: cases.linear_cross_entropy_case(9, 8, 33, label_smoothing=0.1, z_loss=0.01),
}


def both(case, inputs, impl="ref"):
    """Return outputs and gradients of the case's reference and of its op, on copies of the inputs."""
    found = []
    for run in (case.reference, lambda i: case.ours(i, impl)):
        leaves = copy_as_leaves(case, inputs)
        before = {name: t.detach().clone() for name, t in vars(leaves).items() if torch.is_tensor(t)}
        out = as_tuple(run(leaves))
        torch.manual_seed(1)
        upstream = [torch.randn(t.shape, dtype=t.dtype) for t in out]
        grads = torch.autograd.grad(out, [getattr(leaves, name) for name in case.grads], upstream)
        assert all(getattr(leaves, name).detach().allclose(t, equal_nan=True) for name, t in before.items())
        found.append((*out, *grads))
    return found


@pytest.mark.parametrize("name", SMALL)
def test_a_case_asks_for_what_its_op_computes(name):
    """In fp64, with every gradient; the inputs stay as they are, for the second run."""
    case = SMALL[name]()
    inputs = copy_as_leaves(case, case.inputs("cpu", torch.float32), torch.float64)
    want, got = both(case, inputs)
    assert len(want) == len(got) > len(case.grads) > 0
    assert all(a.isfinite().all() and worst(a - b) < 1e-12 for a, b in zip(want, got, strict=True))


def test_settings_reach_the_ops(monkeypatch):
    given = []
    monkeypatch.setattr(cases.swiglu, "swiglu_linear", lambda *args, **named: given.append((args[2:], named)))
    for keep in (False, True):
        case = cases.swiglu_consumed_case(5, 12, 6, keep)
        case.ours(case.inputs("cpu", torch.float32), "triton")
    assert given == [(("triton",), {"consume": True, "keep": keep}) for keep in (False, True)]
    monkeypatch.setattr(cases.norm_linear, "norm_linear_rows", lambda *args: given.append(args[3:]))
    case = cases.norm_linear_rows_case(7, 12, 10)
    case.ours(case.inputs("cpu", torch.float32), "triton")
    assert given[2][0].tolist() == [1, 4] and given[2][1:] == (5, 1e-5, "triton")
    case.reference(case.inputs("cpu", torch.float32))
    assert given[3][0].tolist() == [1, 4] and given[3][1:] == (5, 1e-5, "ref")
    case = cases.alpaca_forward_case(64)
    assert case.work["fwd"].flops > 0 and case.inputs("cpu", torch.float32).q.shape[1:] == (1, 64)


@pytest.mark.parametrize("name", SMALL)
def test_inputs_have_the_dtype_of_the_case(name):
    torch.manual_seed(0)
    inputs = SMALL[name]().inputs("cpu", torch.bfloat16)
    exact = {"cos", "sin", "weights", "targets", "documents", "cache"}
    for field, t in vars(inputs).items():
        if t is not None and field not in exact:
            assert t.dtype == torch.bfloat16 and t.flatten()[:99].unique().numel() > 9, field
    if name == "rope_attention_rows":
        case = SMALL[name]()
        assert case.shape == "packed T=300 U=100 H=2 K=1 Dh=8"
        assert inputs.q.shape == (100, 2, 8) and inputs.kv.shape == (300, 2, 8) and inputs.cos.shape == (300, 4)
        assert inputs.cos[:, 0].unique().numel() > 250  # random positions


def test_rows_of_no_document_are_nan_and_so_are_their_gradients(monkeypatch):
    case, given = cases.attention_case("mixed", 2, 1, 8), []
    inputs = case.inputs("cpu", torch.float32)
    lost = torch.zeros(90, dtype=torch.bool)
    lost[10:12] = True
    assert torch.equal(inputs.qkv.isnan().all(2).all(1), lost) and torch.equal(inputs.qkv.isnan().any(2).any(1), lost)
    monkeypatch.setattr(cases.attention, "attention", lambda q, k, v, documents, impl: Noting.apply(q, given))
    leaf = inputs.qkv.clone().requires_grad_()
    case.ours(leaf_of(leaf), "ref").backward(torch.ones(90, 2, 8))
    assert torch.equal(given[0].isnan().all(2).all(1), lost) and (given[0][~lost] == 1).all()


def leaf_of(qkv):
    return type("Inputs", (), {"qkv": qkv})


class Noting(torch.autograd.Function):
    """Passes q on, and notes the gradient that backward is given."""

    @staticmethod
    def forward(ctx, q, given):
        ctx.given = given
        return q.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.given.append(gradient)
        return gradient, None


def test_targets_are_at_both_ends_and_some_rows_do_not_count():
    torch.manual_seed(0)
    i = cases.linear_cross_entropy_case(9, 8, 33).inputs("cpu", torch.float32)
    assert (i.targets[0], i.targets[1], i.targets[3]) == (0, 32, -100) and i.weights[4] == 0
    rest = i.weights[i.weights > 0]
    assert len(rest) == 8 and rest.min() >= 0.5 and rest.max() < 1.5 and len(rest.unique()) == 8
    assert i.x.shape == (9, 8) and i.weight.shape == (33, 8) and 0.4 < i.weight.std() < 0.6


def test_a_row_that_sees_nothing_gives_0():
    seen = torch.tensor([[True, False], [False, False]])
    q, k = torch.full((2, 1, 4), torch.nan), torch.full((2, 1, 4), torch.nan)
    q[0] = k[0] = 1.0
    assert cases._attend_densely(seen, q, k, k).tolist() == [[[1.0] * 4], [[0.0] * 4]]


# ---- the optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize(("master", "states"), [(None, "fp32"), ("split", "fp32"), ("stochastic", "bf16")])
def test_three_steps_of_adamw_are_the_formula(master, states, tensors):
    """From zero states: m and v are sums of the gradients; p is what a loop over its numbers gives."""
    case = cases.adamw_steps_case(2400, master, states, tensors)
    inputs = case.inputs("cpu", torch.float32)
    assert inputs.param.dtype == (torch.float32 if master is None else torch.bfloat16) and len(inputs.grads) == 3
    p, *kept = as_tuple(case.reference(inputs))
    (truth, *_), (ours, *again) = case.truth(inputs), case.ours(inputs, "ref")
    grads = [g.double() for g in inputs.grads]
    m = sum(0.9 ** (2 - i) * 0.1 * g for i, g in enumerate(grads))
    v = sum(0.99 ** (2 - i) * 0.01 * g * g for i, g in enumerate(grads))
    rough = 1e-5 if states == "fp32" else 0.01
    assert largest_error(kept[0], m) < rough * m.abs().max() and largest_error(kept[1], v) < rough * v.abs().max()
    want, first, second = inputs.param.double(), 0.0, 0.0
    for step, g in enumerate(grads, 1):
        first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g * g
        way = first / (1 - 0.9**step) / ((second / (1 - 0.99**step)) ** 0.5 + 1e-8)
        want = want - 0.01 * 0.1 * want - 0.01 * way
    assert worst(p.double() - want) < (1e-5 if states == "fp32" else 0.05)
    assert (worst(truth - want) < 1e-12) if states == "fp32" else torch.equal(truth, p.double())
    assert all(map(torch.equal, (ours, *again), (p, *kept))) and len(p) == 2400


def test_the_results_of_an_update_are_its_master_and_states():
    case = cases.adamw_case((3, 4), "split", "fp32")
    inputs = case.inputs("cpu", torch.float32)
    assert inputs.param.dtype == torch.bfloat16 and all((t != 0).any() for t in inputs.state.values())
    master, *kept = case.results(inputs, None)
    assert (
        torch.equal(master.bfloat16().float() - master, inputs.param.float() - master) and master.dtype == torch.float32
    )
    assert [t.data_ptr() for t in kept] == [inputs.state[name].data_ptr() for name in ("m", "v")]


# ---- csrc/cuda ------------------------------------------------------------------------------------------------------


def test_an_op_by_csrc_is_the_case_with_another_impl():
    given = []
    case = cases.swiglu_case(4, 8)
    object.__setattr__(case, "ours", lambda i, impl: given.append((i, impl)))
    by_csrc = cuda_cases.as_cuda(case)
    by_csrc.ours("inputs", "triton")
    assert given == [("inputs", "cuda")] and (by_csrc.op, by_csrc.shape) == ("swiglu_cuda", case.shape)


@pytest.mark.parametrize("has_folder", [True, False])
@pytest.mark.parametrize("has_compiler", [True, False])
def test_csrc_needs_its_sources_and_nvcc(has_compiler, has_folder, monkeypatch, tmp_path):
    def find():
        if not has_compiler:
            raise cuda_cases.MissingCompiler("no nvcc")

    if has_folder:
        (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    monkeypatch.setattr(cuda_cases, "find_nvcc", find)
    monkeypatch.setattr(cuda_cases, "ROOT", tmp_path)
    assert cuda_cases.has_nvcc() == (has_compiler and has_folder)


@pytest.mark.parametrize(("prefix", "page"), [(5, 0), (0, 16), (5, 16)])
def test_a_case_of_decoding_reads_each_sequence_alone(prefix, page, monkeypatch):
    """Keys beyond a sequence's length are NaN; pages lie in another order than the table's."""
    case = cuda_cases.decode_case(4, 2, 8, [1, 33, 17], prefix, page)
    assert case.shape == f"B=3 H=4 K=2 Dh=8 P={prefix} {f'pages of {page}' if page else 'static'}"
    torch.manual_seed(1)
    i = case.inputs("cpu", torch.bfloat16)
    assert i.lengths.tolist() == [1, 33, 17] and {i.q.dtype, i.k.dtype, i.v.dtype} == {torch.bfloat16}
    assert i.k.isnan().sum() == i.v.isnan().sum() == (3 * 48 - 51) * 2 * 8 and i.q.shape == (3, 4, 8)
    if page:
        assert i.k.shape == (9, 16, 2, 8) and i.table.dtype == torch.int32
        assert sorted(i.table.flatten().tolist()) == list(range(9)) != i.table.flatten().tolist()
    else:
        assert i.k.shape == (3, 48, 2, 8) and i.table is None
    i = copy_as_leaves(case, i, torch.float64)
    out = case.reference(i)
    for b, length in enumerate((1, 33, 17)):
        at = range(length) if not page else [int(i.table[b, j // 16]) * 16 + j % 16 for j in range(length)]
        for head in range(4):
            k, v = (t.flatten(0, 1)[[48 * b * (not page) + j for j in at], head // 2] for t in (i.k, i.v))
            if prefix:
                k, v = torch.cat([i.prefix_k[:, head // 2], k]), torch.cat([i.prefix_v[:, head // 2], v])
            weights = (k @ i.q[b, head] / 8**0.5).softmax(0)
            assert worst(out[b, head] - weights @ v) < 1e-12
    given = []
    monkeypatch.setattr(cuda_cases, "decode_attention", lambda *args: given.append(args))
    case.ours(i, "triton")
    ((q, cache, impl),) = given
    assert impl == "cuda" and q is i.q and isinstance(cache, DecodeCache)
    kept = (cache.k, cache.v, cache.lengths, cache.table, cache.prefix_k, cache.prefix_v)
    assert all(a is b for a, b in zip(kept, (i.k, i.v, i.lengths, i.table, i.prefix_k, i.prefix_v), strict=True))
