"""The schedules and the clipping, step for step as torch and transformers."""

import dataclasses
import math

import pytest
import torch
import transformers

import kernels
from engine.base.errors import UsageError
from engine.model.config import MODELS
from engine.model.llama import new_model
from engine.model.shard import Shard
from engine.planning.fitting import find_uncut_counts
from engine.training import optimizer as optimizer_module
from engine.training.optimizer import AdamW, choose_optimizer, chooses_cpu, lr_factor
from kernels.native.library import NativeError
from tests.helpers.run import worst

THEIRS = {
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "linear": transformers.get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
}
PLACES = ({}, {"offload": True}, {"offload": True, "on_cpu": True})  # of the states


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.0), (33, 0.03), (100, 0.1), (1219, 0.03), (7, 0.5)])
def test_schedules_are_transformers(name, total, ratio):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = THEIRS[name](optimizer, math.ceil(total * ratio), total)  # as its trainer counts the warm-up
    for step in range(1, total + 1):
        assert abs(lr_factor(name, step, total, ratio) - optimizer.param_groups[0]["lr"]) < 1e-12
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_steps_are_torchs(dtype, clip):
    """Two groups (matrices decay), clipping, and for bf16 an fp32 master, over five steps."""
    model = new_model(MODELS["tiny"], "cpu", dtype)
    model.init_weights(0)
    ours = AdamW(model, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    copies = {n: torch.nn.Parameter(p.detach().float()) for n, p in model.named_parameters()}
    matrices, vectors = ([p for p in copies.values() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)
    for step in range(5):
        lr = 1e-3 * (step + 1)
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            copies[name].grad = p.grad.float()
        norm = ours.grad_norm()
        ours.step(lr, norm, clip)
        truth = sum(p.grad.double().square().sum() for p in copies.values()).sqrt()  # torch's own is fp32: off by 6e-5
        assert torch.isclose(norm.double(), truth, rtol=1e-6)
        if clip:
            torch.nn.utils.clip_grads_with_norm_(copies.values(), clip, truth)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
    for name, p in model.named_parameters():
        master = kernels.master_of(p, ours.states[name])
        assert (master - copies[name]).abs().max() < 2e-6
        assert worst(p.float() - master) <= worst(master.bfloat16().float() - master) * (dtype == torch.bfloat16)


def test_vectors_keep_fp32_states_for_8_bit_ones():
    """Blocks of their states would bind the number of shards: 13B's norms are 20 blocks."""
    config = dataclasses.replace(MODELS["tiny"], dim=5120, n_layers=1, hidden_dim=256, vocab_size=512)
    model = new_model(config, "meta", torch.bfloat16)
    optimizer = AdamW(model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, states="8bit")
    kinds = {p.ndim: optimizer.states[name].m.dtype for name, p in model.named_parameters()}
    assert kinds == {1: torch.float32, 2: torch.uint8}
    assert 8 in find_uncut_counts(tuple(p.shape) for p in model.parameters())


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_gradients_are_clipped_alike_wherever_the_states_are(clip):
    """Not at all, to a smaller norm, and left as they are under a larger one."""
    ends = []
    for place in PLACES:
        model = new_model(dataclasses.replace(MODELS["tiny"], n_layers=1, vocab_size=64), "cpu", torch.float32)
        model.init_weights(0)
        optimizer = AdamW(model, beta1=0.9, beta2=0.99, eps=1e-2, weight_decay=0.1, impl="ref", **place)
        for p in model.parameters():
            p.grad = p.detach() / 8
        optimizer.step(1e-3, optimizer.grad_norm(), clip)
        ends.append({name: shard.tensor.clone() for name, shard in optimizer.tensors().items()})
    for end in ends[1:]:
        assert all(t.equal(end[name]) for name, t in ends[0].items())


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_an_update_that_is_not_to_count_changes_nothing_wherever_the_states_are(clip, place):
    model = new_model(dataclasses.replace(MODELS["tiny"], n_layers=1, vocab_size=64), "cpu", torch.float32)
    model.init_weights(0)
    optimizer = AdamW(model, beta1=0.9, beta2=0.99, eps=1e-2, weight_decay=0.1, impl="ref", **place)
    before = {name: shard.tensor.clone() for name, shard in optimizer.tensors().items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step(1e-3, optimizer.grad_norm(), clip, apply=torch.tensor(False))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(shard.tensor, before[name]) for name, shard in optimizer.tensors().items())


@pytest.mark.parametrize(
    ("asked", "taken"), [("ref", "ref"), ("native", "native"), ("triton", "auto"), ("auto", "auto")]
)
def test_the_kernels_that_are_asked_for_update_on_the_cpu_too(asked, taken, monkeypatch):
    """Those of a GPU alone are no choice there."""
    model = new_model(dataclasses.replace(MODELS["tiny"], n_layers=1, vocab_size=64), "cpu", torch.float32)
    optimizer = AdamW(
        model, beta1=0.9, beta2=0.99, eps=1e-2, weight_decay=0.1, impl=asked, offload=True, on_cpu=True
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(kernels, "adamw", lambda *_, impl, **__: seen.append(impl))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(1e-3, torch.ones(()), 0.0)
    assert seen == [taken] * len(list(model.parameters()))


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("master", "states"), [("stochastic", "fp32"), ("split", "bf16")])
def test_each_tensor_rounds_by_random_bits_of_its_own(master, states, place):
    """Layers that are equal, with equal gradients, are rounded differently: else errors of rounding would add up."""
    model = new_model(dataclasses.replace(MODELS["tiny"], n_layers=2, vocab_size=64), "cpu", torch.bfloat16)
    model.init_weights(0)
    model.layers[1].load_state_dict(model.layers[0].state_dict())
    optimizer = AdamW(
        model, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, master=master, states=states, impl="ref", **place
    )
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = grads[name.replace("layers.1.", "layers.0.")].clone()
    if optimizer.host_updates:
        optimizer.is_sharded = True  # gradients that were made outside of micro_batch()
    optimizer.step(1e-3, torch.ones(()), 0.0)
    found = {name: shard.tensor.float() for name, shard in optimizer.tensors().items()}
    rounded = "param" if master == "stochastic" else "m"
    for name in (name for name in found if name.startswith(f"{rounded}.layers.0.") and found[name].ndim > 1):
        first, second = found[name], found[name.replace("layers.0.", "layers.1.")]
        differ = (first != second).float().mean()
        assert 0.1 < differ < 0.9 and torch.allclose(first, second, rtol=2**-7), name


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_shard_rounds_by_the_random_bits_that_its_rows_have_in_the_whole_tensor(place, monkeypatch):
    """So that the weights do not depend on the number of GPUs."""
    ends, first = [], 0
    monkeypatch.setattr(optimizer_module, "local_part", lambda grad: grad[first * len(grad) // 2 :])
    for first in (0, 1):
        model = new_model(dataclasses.replace(MODELS["tiny"], n_layers=1, vocab_size=64), "cpu", torch.bfloat16)
        model.init_weights(0)
        cut = {
            name: Shard(p.detach()[first * len(p) // 2 :], first * len(p) // 2, len(p))
            for name, p in model.named_parameters()
        }
        monkeypatch.setattr(optimizer_module, "local_shards", lambda model, cut=cut: cut)
        optimizer = AdamW(
            model, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, master="stochastic", impl="ref", **place
        )
        for p in model.parameters():
            p.grad = p.detach() / 8
        if optimizer.host_updates:
            optimizer.is_sharded = True  # gradients that were made outside of micro_batch()
        optimizer.step(1e-3, torch.ones(()), 0.0)
        ends.append({name: shard.tensor.clone() for name, shard in optimizer.tensors().items()})
    whole, half = ends
    for name, t in half.items():
        assert 0 < len(t) < len(whole[name]) and torch.equal(t, whole[name][-len(t) :]), name


def test_the_optimizer_of_cuda_is_a_choice(monkeypatch):
    assert choose_optimizer("triton") == "triton"
    monkeypatch.setenv("CRIA_OPTIMIZER", "cuda")
    assert choose_optimizer("triton") == "cuda" and choose_optimizer("ref") == "ref"
    monkeypatch.setenv("CRIA_OPTIMIZER", "hip")
    with pytest.raises(UsageError, match="CRIA_OPTIMIZER is 'hip', wanted triton, cuda or cpu"):
        choose_optimizer("triton")


def test_the_cpu_updates_offloaded_states_of_one_rank_where_its_library_is(monkeypatch):
    found = [object()]
    monkeypatch.setattr(optimizer_module, "find_cpu", lambda: found[0])
    assert chooses_cpu(True, "triton", 1) is True and chooses_cpu(False, "triton", 1) is None
    assert chooses_cpu(True, "triton", 2) is False and chooses_cpu(True, "ref", 1) is False
    for named in ("triton", "cuda"):
        monkeypatch.setenv("CRIA_OPTIMIZER", named)
        assert chooses_cpu(True, "triton", 1) is False
    monkeypatch.delenv("CRIA_OPTIMIZER")
    found[0] = None
    assert chooses_cpu(True, "triton", 1) is False


def test_updates_on_the_cpu_can_be_insisted_on(monkeypatch):
    monkeypatch.setenv("CRIA_OPTIMIZER", "cpu")
    assert choose_optimizer("triton") == "triton"
    with pytest.raises(UsageError, match=r"CRIA_OPTIMIZER is cpu, which .* add --offload-optimizer"):
        chooses_cpu(False, "triton", 1)

    def fail():
        raise NativeError("no g++")

    monkeypatch.setattr(optimizer_module, "load_cpu", fail)
    with pytest.raises(UsageError, match=r"CRIA_OPTIMIZER is cpu: no g\+\+"):
        chooses_cpu(True, "triton", 1)
    monkeypatch.setattr(optimizer_module, "load_cpu", lambda: None)
    assert chooses_cpu(True, "ref", 2)
