"""Weights in 4 bits in a model: what is read into them, what they multiply by, what never is in memory whole."""

from dataclasses import replace

import pytest
import torch

import kernels
from engine.formats.save import save_hf
from engine.formats.source import open_source
from engine.model.adapter import AdapterConfig
from engine.model.config import MODELS
from engine.model.llama import new_model
from engine.model.nf4_weight import NF4Weight

CONFIG = replace(MODELS["tiny"], vocab_size=64)
QLORA = AdapterConfig(r=4, nf4_base=True)
MAPS = ("wqkv", "wo", "w13", "w2")


@pytest.fixture
def folder(tmp_path):
    """Return a model on disk."""
    model = new_model(CONFIG, "cpu", torch.float32)
    model.init_weights(0)
    save_hf(tmp_path / "base", model)
    return tmp_path / "base"


def read(folder, adapter=None, dtype=torch.float32):
    source = open_source(folder)
    model = new_model(source.config, "cpu", dtype, "ref", adapter=adapter)
    source.read_into(model)
    if adapter is not None:
        model.init_adapter(3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_map_is_quantised_on_its_own(folder, dtype):
    """wqkv's 64 rows of q, 32 of k, 32 of v: each has its own mean of maxima, as where they are not merged."""
    dense, packed = read(folder, dtype=dtype), read(folder, QLORA, dtype)
    for layer, of_layer in zip(dense.layers, packed.layers, strict=True):
        for name in MAPS:
            weight, nf4 = getattr(layer, name).detach(), getattr(of_layer, name)
            rows = weight.float().split(nf4.rows)
            wanted = torch.cat([kernels.dequantise_nf4(kernels.quantise_nf4(r), torch.float32) for r in rows])
            assert nf4.shape == weight.shape
            assert torch.equal(nf4.dequantise(dtype), wanted.to(torch.bfloat16).to(dtype) if dtype == torch.bfloat16
                               else wanted.to(dtype))  # fmt: skip
    for name, p in packed.named_parameters():
        if ".lora." not in name:
            assert torch.equal(p, dict(dense.named_parameters())[name]), name


def test_loss_and_gradients_are_those_of_the_dequantised_matrices(folder):
    packed = read(folder, QLORA, torch.float64)
    adapter = replace(QLORA, nf4_base=False)
    dense = new_model(CONFIG, "cpu", torch.float64, "ref", adapter=adapter)
    of_packed = dict(packed.named_parameters())
    for name, p in dense.named_parameters():
        p.data.copy_(of_packed[name] if name in of_packed else packed.nf4_weights()[name].dequantise(torch.float64))
    for name, p in packed.named_parameters():
        if ".lora." in name:  # B is 0 at the beginning, and A then has no gradient
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
            dict(dense.named_parameters())[name].data.copy_(p)
    tokens = torch.arange(40) % 64
    values = [model(tokens).square().sum() for model in (packed, dense)]
    assert values[0] == values[1]
    for value in values:
        value.backward()
    for name, p in packed.trained_parameters().items():
        assert p.grad is not None and torch.equal(p.grad, dict(dense.named_parameters())[name].grad), name


def test_a_cast_keeps_the_codes_and_a_state_leaves_them_out(folder):
    model = read(folder, QLORA)
    before = {name: w.dequantise(torch.float32) for name, w in model.nf4_weights().items()}
    model.to(torch.bfloat16).to(torch.float32)
    assert all(torch.equal(w.dequantise(torch.float32), before[name]) for name, w in model.nf4_weights().items())
    assert not any("codes" in name for name in model.state_dict())
    assert len(before) == 4 * CONFIG.n_layers and "layers.1.w13" in before


def test_a_base_takes_4_bits_and_an_eighth(folder):
    n = sum(w.shape[0] * w.shape[1] for w in read(folder, QLORA).nf4_weights().values())
    n_bytes = sum(b.nbytes for b in read(folder, QLORA).buffers())
    assert 4.125 < 8 * n_bytes / n < 4.2  # small matrices; 4.127 of a large one


def test_a_model_in_4_bits_is_never_whole_in_memory(folder, monkeypatch):
    """While it is read there is one map at a time: the largest is w1, 192 x 64."""
    made = []
    empty = torch.empty

    def watch(*args, **kwargs):
        t = empty(*args, **kwargs)
        made.append(t.numel() if t.device.type != "meta" and t.is_floating_point() else 0)
        return t

    source = open_source(folder)
    model = new_model(source.config, "cpu", torch.float32, "ref", adapter=QLORA)
    monkeypatch.setattr(torch, "empty", watch)
    source.read_into(model)
    assert max(made) == CONFIG.hidden_dim * CONFIG.dim


def test_a_map_that_is_not_there_is_an_error():
    weight = NF4Weight((64, 32), 64)
    assert weight.map_at(64) == 1
    with pytest.raises(ValueError):
        weight.map_at(63)
