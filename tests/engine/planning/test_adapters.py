"""The bytes and the operations of a step that trains an adapter, against what autograd keeps and operators allocate."""

import dataclasses

import pytest
import torch

from engine.model.adapter import AdapterConfig
from engine.model.config import MODELS, ModelConfig
from engine.model.llama import new_model
from engine.planning.memory import PLAN_BYTES, BatchShape, activation_bytes, memory, worst_moments
from engine.planning.setting import Setting
from engine.planning.step_time import Work, gemm_flops
from engine.planning.weights import state_bytes
from kernels.ops.adamw import adamw_state
from tests.helpers.planning import DTYPES, SHAPES, SMALL
from tests.helpers.step_bytes import N, ready, saved_bytes, watched

PATTERNED = AdapterConfig(r=4, rank_pattern=(("v_proj", 3), ("layers.1.mlp.up_proj", 7)), saved=("embed_tokens",))
ADAPTERS = {
    "all": AdapterConfig(r=4), "queries and values": AdapterConfig(r=4, targets=("q_proj", "v_proj")),
    "gate": AdapterConfig(r=3, targets=("gate_proj",)), "down": AdapterConfig(r=4, targets=("down_proj",)),
    "one way out": AdapterConfig(r=4, targets=("layers.1.self_attn.o_proj",)), "patterned": PATTERNED,
    "last layer's up": AdapterConfig(r=2, targets=("layers.2.mlp.up_proj",)),
    "embedding far below": AdapterConfig(r=2, targets=("layers.2.mlp.up_proj",), saved=("embed_tokens",)),
    "head alone": AdapterConfig(targets=("layers.0.none",), saved=("lm_head",)),
}  # fmt: skip
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="plans of the interpreter's")


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """On the meta device dequantising would run the reference; the kernel allocates nothing."""
    monkeypatch.setattr("engine.model.nf4_weight.dequantise_nf4", lambda matrix, dtype, out: out)


def bytes_of_weights(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("adapter", "dtype", "recompute", "shape"),
    [
        *[(name, "fp32", "cheap", "grouped queries") for name in ADAPTERS],
        ("all", "bf16", "none", "heads of another width"), ("one way out", "fp32", "none", "grouped queries"),
        ("all", "fp32", "block", "tied"), ("patterned", "bf16", "block", "grouped queries"),
    ],
)  # fmt: skip
def test_activations_are_what_autograd_keeps_to_the_byte(adapter, dtype, recompute, shape, device, unlaunched):
    """As without an adapter; the hooks do not see what recomputed blocks hold in a closure."""
    c = ModelConfig(**SMALL | SHAPES[shape])
    adapter = ADAPTERS[adapter]
    model = new_model(c, "cpu", torch.float32, "triton", recompute, True, adapter=adapter)
    model.init_weights(0)
    model.init_adapter(0)
    model.to(device, DTYPES[dtype])
    one = ready(model, True)
    plans = [t for plan in one.plans for t in plan if isinstance(t, torch.Tensor)]
    found = saved_bytes(lambda: model.loss(one), [*model.parameters(), *plans])
    tables = 4 * N * c.head_dim if recompute == "block" else 0
    setting = Setting(DTYPES[dtype], recompute=recompute, adapter=adapter)
    assert found + tables == activation_bytes(c, setting, BatchShape(N, len(one.targets), shared_rows=1))


@WITHOUT_GPU
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
@pytest.mark.parametrize(
    ("changes", "tokens", "loss_rows"),
    [
        ({"n_layers": 4}, 8192, 5700), ({"n_layers": 4}, 2048, 64), ({"n_layers": 3}, 512, 400),
        ({"n_layers": 3, "n_kv_heads": 8, "hidden_dim": 14336, "vocab_size": 128256}, 4096, 3000),
    ],
)  # fmt: skip
@pytest.mark.parametrize("adapter", [AdapterConfig(r=16), AdapterConfig(r=64, targets=("q_proj", "v_proj"))])
def test_temporaries_are_the_peak_of_forward_and_backward(adapter, changes, tokens, loss_rows, recompute):
    """Layers of LLaMA-7B's widths run on tensors without storage. Logits are not seen, and counted apart."""
    packed = (adapter.r == 64) ^ (tokens in (2048, 4096)) ^ (recompute == "cheap")  # by turns, with each value of each
    c, adapter = dataclasses.replace(MODELS["llama-7b"], **changes), dataclasses.replace(adapter, nf4_base=packed)
    model = new_model(c, "meta", torch.bfloat16, "triton", recompute, True, adapter=adapter)
    setting = Setting(recompute=recompute, adapter=adapter)
    assert bytes_of_weights(model) == state_bytes(c, setting).weights
    for p in model.trained_parameters().values():
        p.grad = torch.empty_like(p)
    watch = watched(model, tokens, loss_rows, loss_rows)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    batch = BatchShape(tokens, loss_rows)
    moments, kept = worst_moments(c, setting, batch), activation_bytes(c, setting, batch) + 8 * tokens
    wanted = kept + max(loss_rows * (c.dim * 2 + 4), moments.backward)
    gradients = state_bytes(c, setting).trained  # those of one matrix exist twice before they are added
    assert watch.most - gradients / c.n_layers <= 1.001 * wanted <= 1.04 * watch.most
    head = 4 * loss_rows * c.dim * c.vocab_size
    assert watch.flops == gemm_flops(c, Work(tokens, loss_rows, 0, 0, 1), recompute, adapter) - head


@WITHOUT_GPU
@pytest.mark.parametrize(("packed", "most_gb"), [(True, 8), (False, 18)])
def test_llama_7b_fits_with_an_adapter(packed, most_gb):
    """Rows of 512 tokens packed to 2,048. Counted: weights, gradients, AdamW's tensors, a forward and backward."""
    c, adapter = MODELS["llama-7b"], AdapterConfig(r=16, nf4_base=packed)
    setting = Setting(recompute="block", adapter=adapter)
    model = new_model(c, "meta", torch.bfloat16, "triton", "block", True, adapter=adapter)
    counted = bytes_of_weights(model)
    for p in model.trained_parameters().values():
        p.grad = torch.empty_like(p)
        counted += p.grad.nbytes + sum(t.nbytes for t in adamw_state(p.data, "split", "fp32").tensors().values())
    counted += watched(model, 2048, 1434, 1434).most
    used = memory(c, setting, BatchShape(2048, 1434))
    beside = used.overhead + 2048 * (8 + 8 + PLAN_BYTES) + 12 * 1434  # the batch, which is not counted
    logits = used.head - 1434 * (c.dim * 2 + 4)
    assert used.total - beside - max(0, logits - used.backward) == pytest.approx(counted, rel=0.002)
    assert used.total < most_gb * 1e9


def test_logits_of_a_frozen_head_are_fewer_at_a_time():
    """The head without a gradient: 128 MiB of logits where a head that is trained has 512."""
    c, rows = MODELS["llama3-8b"], 6000
    heads = {
        name: worst_moments(c, Setting(adapter=adapter), BatchShape(8192, rows)).head - rows * (c.dim * 2 + 4)
        for name, adapter in [
            ("all weights", None),
            ("lora", AdapterConfig()),
            ("head", AdapterConfig(saved=("lm_head",))),
        ]
    }
    assert heads == {"all weights": 2048 * 128256 * 2, "lora": 512 * 128256 * 2, "head": 2048 * 128256 * 2}


class NoGenerator:
    """Stands for torch.Generator, which the meta device lacks."""

    def __init__(self, device):
        pass

    def manual_seed(self, seed):
        return None


@WITHOUT_GPU
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_dropout_makes_copies_of_what_it_drops(recompute, monkeypatch):
    monkeypatch.setattr(torch, "Generator", NoGenerator)
    c, adapter = dataclasses.replace(MODELS["llama-7b"], n_layers=3), AdapterConfig(r=16, dropout=0.1)
    model = new_model(c, "meta", torch.bfloat16, "triton", recompute, True, adapter=adapter)
    for p in model.trained_parameters().values():
        p.grad = torch.empty_like(p)
    watch = watched(model, 4096, 3000, 3000, dropout_seed=1)
    setting, batch = Setting(recompute=recompute, adapter=adapter), BatchShape(4096, 3000)
    wanted = worst_moments(c, setting, batch).backward + activation_bytes(c, setting, batch) + 8 * 4096
    without = watched(model, 4096, 3000, 3000)
    print(watch.most, wanted, without.most)
    assert watch.most <= 1.001 * wanted <= 1.03 * watch.most
    assert watch.most > 1.05 * without.most
