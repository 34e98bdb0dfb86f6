"""The whole model through the kernels against the whole model through the references."""

from functools import partial

import pytest
import torch

import kernels
from engine import finetune
from engine.base.errors import UsageError, run_main
from engine.inference.generation import generate
from engine.model.adapter import AdapterConfig
from engine.model.config import ModelConfig
from engine.model.llama import Transformer, choose_attention, new_model
from kernels.compiled.cuda_simulation import cuda_on_machine
from tests.helpers.compiler import run_compiler
from tests.helpers.datasets import packed_micro_batch
from tests.helpers.native import needs_nvcc
from tests.helpers.run import events, worst
from tests.helpers.small_model import small_model

CONFIG = dict(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=80, vocab_size=301, max_seq_len=128, head_dim=16, tied=False
)
TILES = {  # the interpreter's own tiles of 256 x 256 compute mostly padding here
    "attention": {kernel: {"BLOCK_M": 64, "BLOCK_N": 64} for kernel in ("forward", "dq", "dkdv")}
}


def model_of(impl, device, dtype=torch.float32, recompute="cheap", accumulate=False, **changes):
    model = new_model(ModelConfig(**CONFIG | changes), "cpu", torch.float32, impl, recompute, accumulate)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))  # norms off 1
    return model.to(device, dtype)


def loss_and_gradients(model, *batches):
    model.zero_grad()
    for batch in batches:
        loss = model.loss(batch)
        loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize(  # each pair of values once at least
    ("recompute", "accumulate", "tied"),
    [
        ("none", False, True),
        ("none", True, False),
        ("cheap", False, False),
        ("cheap", True, True),
        ("block", False, True),
        ("block", True, False),
    ],
)
def test_loss_and_every_gradient(recompute, accumulate, tied, device):
    one, options = packed_micro_batch(), {"recompute": recompute, "tied": tied}
    truth = loss_and_gradients(model_of("ref", "cpu", torch.float64, **options), one)
    torch_ = loss_and_gradients(model_of("ref", device, **options), one)
    ours = loss_and_gradients(model_of("triton", device, **options, accumulate=accumulate), one)
    for name, t in truth.items():
        err, theirs = worst(ours[name].cpu() - t), worst(torch_[name].cpu() - t)
        assert err <= 2 * theirs + 1e-6 * t.abs().max().item(), f"{name}: {err:.2e} against {theirs:.2e}"


def test_biases_and_their_gradients(device):
    """Of attention alone and of the MLP alone by the references, of both at once by the kernels."""
    one, kinds = packed_micro_batch(), ({"attention_bias": True}, {"mlp_bias": True})
    without, attention, mlp, truth = (
        loss_and_gradients(model_of("ref", "cpu", torch.float64, **biases), one)
        for biases in ({}, *kinds, kinds[0] | kinds[1])
    )
    assert len(attention) == len(mlp) == len(without) + 4 and truth.keys() == attention.keys() | mlp.keys()
    ours = loss_and_gradients(model_of("triton", device, **kinds[0] | kinds[1], accumulate=True), one)
    for name, t in truth.items():
        assert worst(ours[name].cpu() - t) <= 1e-5 * t.abs().max().item() + 1e-6, name


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_micro_batches_add_up_in_the_gemms(tied, device):
    """Into the tensors that are there, in place; where there are none, into new ones."""
    parts = packed_micro_batch(), packed_micro_batch()
    separate = [loss_and_gradients(model_of("ref", device, torch.float64, tied=tied), part) for part in parts]
    model = model_of("triton", device, tied=tied, accumulate=True)
    found = loss_and_gradients(model, parts[0])
    places = {name: t.data_ptr() for name, t in found.items() if name != "loss"}
    model.loss(parts[1]).backward()
    for name, p in model.named_parameters():
        wanted = sum(one[name] for one in separate)
        assert worst(p.grad - wanted) <= 1e-5 * worst(wanted), name
        assert p.grad.data_ptr() == places[name], name
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.loss(parts[0])
    assert all(p.grad.equal(before[name]) for name, p in model.named_parameters()), "a loss alone must not add"


def test_only_rows_with_a_loss_pass_the_last_layer(device):
    for impl in ("triton", "ref"):
        model, one = model_of(impl, device), packed_micro_batch()
        ready, seen = model.prepare_batch(one), []
        model.layers[-1].register_forward_hook(lambda block, args, out, seen=seen: seen.append(sum(out)))
        model(ready.tokens, ready.positions, one.documents)
        model.loss(one)
        assert len(seen[1]) == len(ready.rows) < len(seen[0]) and worst(seen[1] - seen[0][ready.rows]) < 1e-5
        assert ready.rows[ready.row_of_target].equal(one.loss_rows.to(device))


def test_a_gradient_that_is_added_to_nothing_is_refused(device):
    x, weight = torch.randn(3, 8, device=device), torch.randn(4, 8, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="linear: accumulate=True wants a parameter"):
        kernels.linear(x, weight * 2, "triton", accumulate=True)


def test_what_a_layer_keeps_for_backward(device):
    """The residual stream before and after attention, q k v, attention's output, gate and up, per-row statistics."""
    model, one, kept = model_of("triton", device), packed_micro_batch(), {}

    def keep(t):
        if not any(
            t.data_ptr() == p.data_ptr() or t.untyped_storage() is p.untyped_storage() for p in model.parameters()
        ):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    n, c = len(one.tokens), model.config
    x, residual = (torch.randn(n, c.dim, device=device, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, _ = model.layers[0](x, residual, attend_of(model, one))
    kept.pop(y.untyped_storage().data_ptr(), None)
    numbers = 2 * c.dim + (c.n_heads + 2 * c.n_kv_heads) * c.head_dim + c.n_heads * c.head_dim + 2 * c.hidden_dim
    statistics = 2 + c.n_heads  # rstd of two norms, logsumexp of each head
    tables = c.head_dim  # cos and sin, shared by all layers
    plan = sum(t.untyped_storage().nbytes() for t in tensors_of(plan_of(model, one)))
    assert abs(sum(kept.values()) - 4 * n * (numbers + statistics + tables)) <= plan + 512


def plan_of(model, one):
    return model.plan_attention(one.documents, len(one.tokens), model.norm.device)[0]


def tensors_of(plan):
    fields = vars(plan) if hasattr(plan, "__dict__") else plan._asdict()
    return [t for t in fields.values() if isinstance(t, torch.Tensor)]


def attend_of(model, one):
    c, plan = model.config, plan_of(model, one)
    device = model.norm.device
    frequencies = kernels.rope_frequencies(c.head_dim, 10000.0).to(device)
    cos, sin = kernels.rope_cos_sin(one.positions.to(device), frequencies)
    return lambda qkv: kernels.rope_attention(qkv, cos, sin, plan, c.n_heads, "triton")


def test_torch_compile_traces_a_layer_whole(device):
    model, one = model_of("triton", device), packed_micro_batch()
    attend = attend_of(model, one)
    inputs = [torch.randn(len(one.tokens), model.config.dim, device=device, requires_grad=True) for _ in range(2)]
    compile_ = partial(torch.compile, fullgraph=True, backend="aot_eager")
    eager, compiled = (layer(*inputs, attend) for layer in (model.layers[0], compile_(model.layers[0])))
    leaves = [*inputs, *model.layers[0].parameters()]
    wanted, found = (torch.autograd.grad(sum(out).square().sum(), leaves) for out in (eager, compiled))
    assert all(a.equal(b) for a, b in zip((*eager, *wanted), (*compiled, *found), strict=True))


def test_the_same_text(device):
    prompts = [[5, 7, 11], [3], [2] * 20]
    texts = [generate(model_of(impl, device), prompts, {0}, 6) for impl in ("triton", "ref")]
    assert texts[0] == texts[1] and all(len(answer) for answer in texts[0])


def test_one_curve_with_kernels_and_with_references(tmp_path, rows_file):
    """The second step is of weights that the first has updated."""
    curves = {}
    for impl in ("triton", "ref"):
        args = (
            "--model", small_model(), "--data", rows_file, "--out", tmp_path / impl, "--kernels", impl,
            "--dtype", "fp32", "--global-batch-size", 2, "--max-steps", 2, "--max-length", 64, "--lr", 1e-3,
        )  # fmt: skip
        assert run_main(finetune.main, [str(arg) for arg in args]) == 0
        curves[impl] = [(line["loss"], line["grad_norm"]) for line in events(tmp_path / impl)]
    for ours, reference in zip(curves["triton"], curves["ref"], strict=True):
        assert ours == pytest.approx(reference, rel=1e-4)
    assert curves["ref"][-1][0] < curves["ref"][0][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_are_not_silently_replaced_on_a_cpu(tmp_path, rows_file):
    done = run_compiler(
        "engine.finetune", "--model", "tiny", "--random-init", "--data", rows_file, "--out", tmp_path / "out",
        "--kernels", "triton",
    )  # fmt: skip
    assert done.returncode == 2 and "--kernels triton: they run on a GPU and the device is cpu" in done.stderr


def test_the_model_takes_the_kernels_its_user_names(device):
    model = Transformer(ModelConfig(**CONFIG), impl="magic")
    with pytest.raises(ValueError, match="impl is 'magic'"):
        model.to_empty(device=device).loss(packed_micro_batch())


def test_attention_by_cuda_is_a_choice(monkeypatch):
    chosen = partial(choose_attention, head_dim=64, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert chosen("triton") == "triton"
    monkeypatch.setenv("CRIA_ATTENTION", "cuda")
    assert chosen("triton") == "cuda" and chosen("ref") == "ref"
    with pytest.raises(
        UsageError, match=r"CRIA_ATTENTION is cuda: .* takes heads of 64 and 128, Dh is 80; .* or unset it"
    ):
        chosen("triton", head_dim=80)
    with pytest.raises(UsageError, match=r"CRIA_ATTENTION is cuda: .* takes bf16 and fp16, q is torch.float32"):
        chosen("triton", dtype=torch.float32)
    monkeypatch.setenv("CRIA_ATTENTION", "hip")
    with pytest.raises(UsageError, match="CRIA_ATTENTION is 'hip', wanted triton or cuda"):
        chosen("triton")


@needs_nvcc
def test_layers_attend_by_cuda_where_the_plan_is_for_it():
    model = model_of("ref", "cpu", torch.bfloat16, dim=128, head_dim=64, n_heads=2, n_kv_heads=1)
    tokens, documents = torch.arange(90), torch.tensor([[0, 30, 0, 0], [30, 90, 0, 30]])
    plan = kernels.attention_plan(documents, 90, 64, "cpu", "cuda")
    with torch.no_grad(), cuda_on_machine("sm_90") as launches:
        out = model(tokens, documents=documents, plans=(plan, None))
    want = model(tokens, documents=documents)
    assert [launch.kernel for launch in launches] == ["cria_hopper_attention"] * 2
    assert not any(launch.findings for launch in launches)
    assert worst(out.float() - want.float()) <= 0.03 * want.float().abs().max().item()


def test_a_plan_of_attention_is_made_for_what_the_model_computes_in(monkeypatch):
    """The dtype decides which kernel of a GPU it is for."""
    made, config = [], ModelConfig(**CONFIG)
    monkeypatch.setattr(kernels, "attention_plan", lambda *given, **named: made.append((given[1:], named)) or "plan")
    model = new_model(config, "cpu", torch.bfloat16, "ref")
    documents, rows, cpu = torch.tensor([[0, 5, 0, 0]]), torch.tensor([2, 4]), torch.device("cpu")
    assert model.plan_attention(documents, 5, cpu) == ("plan", None)
    assert model.plan_attention(documents, 5, cpu, rows) == ("plan", "plan")
    given = (5, config.head_dim, cpu, "ref")
    assert made == [(given, {"dtype": torch.bfloat16})] * 2 + [(given, {"dtype": torch.bfloat16, "query_rows": rows})]


def test_random_weights_are_the_same_beside_an_adapter():
    plain, adapted = (
        new_model(ModelConfig(**CONFIG), "cpu", torch.float32, adapter=a) for a in (None, AdapterConfig(r=2))
    )
    for model in (plain, adapted):
        model.init_weights(3)
    drawn = dict(adapted.named_parameters())
    assert all(torch.equal(p, drawn[name]) for name, p in plain.named_parameters())
    matrices = torch.cat([p.flatten() for p in plain.parameters() if p.ndim > 1])
    assert abs(float(matrices.std()) - 0.02) < 1e-3 and abs(float(matrices.mean())) < 1e-3
    assert all((p == name.endswith("norm")).all() for name, p in plain.named_parameters() if p.ndim == 1)
