"""CUDA C++ of the optimizer on the PTX machine: the bits of the reference in every mode, one launch, planted faults."""

import itertools
import math
import re

import pytest
import torch

import kernels
from engine.model.config import MODELS
from engine.model.llama import new_model
from kernels.compiled.cuda_simulation import cuda_on_machine, run_launch
from kernels.compiled.ptx import Options
from kernels.native import cuda
from kernels.native.toolchain import MissingCompiler, find_nvcc
from kernels.ops import adamw as op
from kernels.ops import adamw_cuda, grad_norm_cuda
from kernels.ops.adamw import AdamWState, adamw_state

try:
    find_nvcc()
except MissingCompiler as missing:
    pytest.skip(f"the PTX machine runs what nvcc makes: {missing}", allow_module_level=True)

BF16, FP32 = torch.bfloat16, torch.float32
MASTERS = {"param": (FP32, "split"), "fp32": (BF16, "fp32"), "split": (BF16, "split"), "random": (BF16, "stochastic")}
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def make(sizes, master="split", states="8bit", seed=0):
    """Parameters and states. Every second parameter begins at no multiple of 16 bytes."""
    draw = torch.Generator().manual_seed(seed)
    dtype, name = MASTERS[master]
    params = [torch.randn(n + 8, generator=draw).to(dtype)[i % 2 :][:n] for i, n in enumerate(sizes)]
    return params, [adamw_state(p, name, states) for p in params]


def make_grads(sizes, step, dtype=BF16):
    """Gradients of many sizes, some of them 0. In the third step there are NaN and Inf too."""
    draw = torch.Generator().manual_seed(step)
    grads = [(torch.randn(n, generator=draw) * 10 ** (6 * torch.rand(n, generator=draw) - 5)).to(dtype) for n in sizes]
    grads[0][100:300] = 0
    if step == 3:
        grads[0][2], grads[0][700], grads[1][-1] = math.inf, math.nan, -math.inf
    return grads


def copy(params, states):
    """The same numbers in other memory."""
    kept = [AdamWState(**{name: t.clone() for name, t in state.tensors().items()}) for state in states]
    return [p.clone() for p in params], kept


def equal_nan(a, b):
    """Whether numbers are equal, and NaN where the others are NaN."""
    return ((a == b) | (a.isnan() & b.isnan())).all().item()


def differences(params, states, others, other_states):
    """Names of the tensors that differ in a bit. One NaN is as good as another."""
    found = []
    for i, (a, b) in enumerate(zip(states, other_states, strict=True)):
        theirs = {"param": others[i], **b.tensors()}
        for name, t in {"param": params[i], **a.tensors()}.items():
            same = t.view(torch.uint8).equal(theirs[name].view(torch.uint8))
            if not same and not (t.is_floating_point() and equal_nan(t, theirs[name])):
                found.append((i, name))
    return found


@pytest.mark.parametrize("states", op.STATES)
@pytest.mark.parametrize("master", MASTERS)
def test_every_mode_has_the_references_bits(master, states):
    """Tails, tensors at odd addresses and shards that begin within eight elements, early and late.

    A shard of 255 that begins five elements in reaches into a second tile of 256.
    """
    sizes = [4096 + 517, 4096 + 256, 7, 0] if states == "8bit" else [1024 + 5, 777, 255, 0]
    offsets = [0, 8, 16, 0] if states == "8bit" else [3, 8, 5, 0]
    params, made = make(sizes, master, states)
    others, other_states = copy(params, made)
    settings = SETTINGS | {
        "weight_decays": [0.1, 0.0, 0.2, 0.0], "seeds": [5, 2**32 - 1, 7, 9], "offsets": offsets, "grad_scale": 0.7
    }  # fmt: skip
    for step in (1, 2, 3):
        grads = make_grads(sizes, step)
        grads[step % 2] = grads[step % 2].float()
        with cuda_on_machine("sm_80", late=step == 1, reverse=step == 2) as launches:
            kernels.adamw_many(params, grads, made, step=step, impl="cuda", **settings)
        assert len(launches) == 1 and not launches[0].findings
        kernels.adamw_many(others, grads, other_states, step=step, impl="ref", **settings)
        assert not differences(params, made, others, other_states)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
def test_norm_and_clipped_update_are_two_launches(clip):
    """Matrices with 8-bit states, small tensors with fp32 ones, aligned or not: one update. Torch's clip factor."""
    sizes = [33000, 4096, 576, 64, 0]
    params, made = make(sizes)
    others, other_states = copy(params, made)
    grads, zeros = make_grads(sizes, 1), [0.0] * 5
    with cuda_on_machine("sm_80") as launches:
        norm = kernels.grad_norm(grads, "cuda")
        on_device = {"lr": torch.tensor(0.015625), "apply": torch.tensor(True)}
        settings = SETTINGS | on_device | {"step": 1, "weight_decays": zeros, "norm": norm, "clip": clip}
        kernels.adamw_many(params, grads, made, impl="cuda", **settings)
    assert len(launches) == 2 and not any(launch.findings for launch in launches)
    kernels.adamw_many(others, grads, other_states, impl="ref", **settings)
    assert not differences(params, made, others, other_states)
    scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else 1.0
    others, other_states = copy(*make(sizes))
    kernels.adamw_many(others, grads, other_states, impl="ref", **settings | {"norm": None, "grad_scale": scale})
    assert not differences(params, made, others, other_states)


@pytest.mark.parametrize("model", ["smollm2-135m", "llama-7b"])
def test_a_model_is_two_launches(model, monkeypatch):
    """The shapes of real models, matrices with 8-bit states and vectors with fp32 ones, without storage."""
    shapes = [p.shape for p in new_model(MODELS[model], "meta", BF16, "ref").parameters()]
    params = [torch.empty(shape, dtype=BF16, device="meta") for shape in shapes]
    made = [adamw_state(p, "split", op.states_of(p, "8bit")) for p in params]
    launches = []
    monkeypatch.setattr(cuda, "runner", launches.append)
    norm = kernels.grad_norm(params, "cuda")
    decays = [0.0] * len(params)
    kernels.adamw_many(params, params, made, step=1, weight_decays=decays, norm=norm, clip=1.0, impl="cuda", **SETTINGS)
    assert [launch.function for launch in launches] == ["cria_grad_norm", "cria_adamw"]
    elements = sum(p.numel() for p in params)
    assert launches[1].arguments[2] - elements / adamw_cuda.CHUNK < len(params)  # chunks


def test_without_apply_nothing_changes():
    params, made = make([5000, 64])
    others, other_states = copy(params, made)
    settings = SETTINGS | {"step": 1, "weight_decays": [0.1] * 2, "apply": torch.tensor(False)}
    with cuda_on_machine("sm_80"):
        kernels.adamw_many(params, make_grads([5000, 64], 1), made, impl="cuda", **settings)
    assert not differences(params, made, others, other_states)


def test_norm_of_every_kind():
    """Whole chunks, tails, odd addresses and two dtypes in one launch; equal bits again; NaN and Inf."""
    sizes = [2 * grad_norm_cuda.CHUNK + 7, 40001, 1000, 0, 9]
    grads = [g.float() if i % 2 else g[1:] for i, g in enumerate(make_grads([n + 1 for n in sizes], 1))]
    truth = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    with cuda_on_machine("sm_90", late=True) as launches:
        norm = kernels.grad_norm(grads, "cuda")
        assert len(launches) == 1 and not launches[0].findings
        assert abs(norm.item() / truth - 1) < 1e-7 and kernels.grad_norm(grads, "cuda").equal(norm)
        assert kernels.grad_norm([torch.zeros(0)], "cuda") == 0
        grads[2][5] = math.inf
        assert kernels.grad_norm(grads, "cuda") == math.inf
        grads[0][5] = math.nan
        assert kernels.grad_norm(grads, "cuda").isnan()


def test_offsets_beyond_32_bits(monkeypatch):
    """The last chunk of a tensor of 2^31 + 40000 elements, whose other memory nobody touches."""
    n, chunk = 2**31 + 40000, adamw_cuda.CHUNK
    param, grad = (torch.empty(n, dtype=BF16) for _ in range(2))
    state = AdamWState(torch.empty(n, dtype=BF16), torch.empty(n, dtype=BF16))
    last = slice(n // chunk * chunk, n)
    parts = [t[last] for t in (param, grad, state.m, state.v)]
    for i, part in enumerate(parts):
        part.copy_(torch.randn(len(part), generator=torch.Generator().manual_seed(i)).abs())
    small = [part.clone() for part in parts]
    launches = []
    monkeypatch.setattr(cuda, "runner", launches.append)
    settings = SETTINGS | {"weight_decays": [0.1], "step": 1}
    kernels.adamw_many([param], [grad], [state], impl="cuda", **settings)
    table = launches[0].arguments[0]
    table[0, 8] = -(n // chunk)  # its chunks so far have passed
    arguments = (table, 1, 1, *launches[0].arguments[3:])
    result = run_launch(cuda.CudaLaunch(**vars(launches[0]) | {"arguments": arguments, "grid": (1,)}), "sm_80")
    assert not result.findings
    kernels.adamw(
        small[0], small[1], AdamWState(small[2], small[3]), offset=last.start, weight_decay=0.1, step=1, impl="ref",
        **SETTINGS,
    )  # fmt: skip
    assert all(part.view(torch.int16).equal(one.view(torch.int16)) for part, one in zip(parts, small, strict=True))


def test_sectors_are_whole_at_odd_sizes():
    """Only a tensor's last tile moves element by element. 8-bit blocks read a maximum of 4 bytes each besides."""
    for master, states in itertools.product(("fp32", "split"), op.STATES):
        params, made = make([8 * 4096 + 1], master, states)
        with cuda_on_machine("sm_80") as launches:
            kernels.adamw_many(
                params, make_grads([8 * 4096 + 1], 1), made, step=1, weight_decays=[0.1], impl="cuda", **SETTINGS
            )
        counters = launches[0].counters
        for way in ("load", "store"):
            assert counters[f"{way}_bytes"] >= 0.85 * 32 * counters[f"{way}_sectors"], (master, states, way)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("states", op.STATES)
@pytest.mark.parametrize("master", MASTERS)
def test_a_gpu_has_the_references_bits(master, states):
    sizes = [100_003, 4096, 64]
    params, made = make(sizes, master, states)
    params = [p.cuda() for p in params]
    made = [AdamWState(**{name: t.cuda() for name, t in state.tensors().items()}) for state in made]
    others, other_states = copy(params, made)
    for step in (1, 2, 3):
        grads = [g.cuda() for g in make_grads(sizes, step)]
        settings = SETTINGS | {"step": step, "weight_decays": [0.1, 0.0, 0.1]}
        norms = [kernels.grad_norm(grads, impl) for impl in ("cuda", "ref")]
        assert equal_nan(*norms) or abs(norms[0] / norms[1] - 1) < 1e-6
        kernels.adamw_many(params, grads, made, impl="cuda", **settings)
        kernels.adamw_many(others, grads, other_states, impl="ref", **settings)
        assert not differences(params, made, others, other_states)


# ---- planted faults -------------------------------------------------------------------------------------------------


def without_barriers(ptx):
    """PTX without barriers of the block."""
    return re.sub(r"bar(rier)?\.(cta\.)?sync[^;]*;", "", ptx)


def beyond(ptx):
    """PTX whose stores of 16 bytes go 16 bytes too far."""
    return re.sub(r"(st\.global\.v4\.u32 \[%rd\d+)\]", r"\1+16]", ptx)


def kinds_of(run, edit):
    """The kinds of findings of what run() launches, edited."""
    with cuda_on_machine("sm_80", edit=edit) as launches:
        run()
    return {finding.kind for launch in launches for finding in launch.findings}


def test_planted_faults_are_found():
    sizes = [8192]
    params, made = make(sizes)
    settings = SETTINGS | {"step": 1, "weight_decays": [0.1], "impl": "cuda"}

    def update():
        kernels.adamw_many(params, make_grads(sizes, 1), made, **settings)

    def norm():
        kernels.grad_norm(make_grads(sizes, 1), "cuda")

    assert kinds_of(update, without_barriers) >= {"race"}
    assert kinds_of(update, beyond) == {"global"}
    assert kinds_of(norm, without_barriers) >= {"race"}


def test_a_tensor_that_the_table_does_not_reach_is_found(monkeypatch):
    params, made = make([8192])
    launches = []
    monkeypatch.setattr(cuda, "runner", launches.append)
    kernels.adamw_many(params, make_grads([8192], 1), made, step=1, weight_decays=[0.1], impl="cuda", **SETTINGS)
    reached = launches[0].reached[1:]
    result = run_launch(cuda.CudaLaunch(**vars(launches[0]) | {"reached": reached}), "sm_80", options=Options())
    assert {finding.kind for finding in result.findings} == {"global"}


def test_cpu_tensors_outside_of_the_machine_are_refused():
    params, made = make([64], states="fp32")
    with pytest.raises(cuda.NativeError, match="cria_adamw: tensors on cpu, wanted a CUDA device"):
        kernels.adamw_many(params, make_grads([64], 1), made, step=1, weight_decays=[0.1], impl="cuda", **SETTINGS)
