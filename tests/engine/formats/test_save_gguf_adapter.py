"""An adapter as a GGUF file: read back by the gguf package, the updates are those of the model, in llama.cpp's rows."""

import gguf
import numpy as np
import pytest
import torch

from engine.base.errors import UsageError
from engine.formats.adapters import new_factors
from engine.formats.names import list_pieces
from engine.formats.save_gguf import save_gguf, save_gguf_adapter
from engine.model.adapter import AdapterConfig, list_updates
from engine.model.config import ModelConfig
from engine.model.llama import new_model

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=40, max_seq_len=64)
ADAPTER = AdapterConfig(r=4, alpha=8.0, rank_pattern=(("down_proj", 2),), alpha_pattern=(("k_proj", 12.0),))


def random_factors(adapter):
    factors = new_factors(CONFIG, adapter, torch.float32)
    for t in factors.values():
        t.normal_()
    return factors


def read(path):
    """Return (metadata, {name: values}) of a file."""
    reader = gguf.GGUFReader(path)
    return (
        {key: field.contents() for key, field in reader.fields.items()},
        {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors},
    )


def test_llama_cpp_computes_the_updates_that_training_did(tmp_path):
    """alpha / rank B A, as llama.cpp scales it, is scale B A in the rows of the weight of the same name."""
    factors = random_factors(ADAPTER)
    save_gguf_adapter(tmp_path / "lora.gguf", CONFIG, ADAPTER, factors, "f32")
    metadata, tensors = read(tmp_path / "lora.gguf")
    assert metadata["general.type"] == "adapter" and metadata["adapter.type"] == "lora"
    assert metadata["general.architecture"] == "llama"
    model = new_model(CONFIG, "cpu", torch.float32)
    for p in model.parameters():
        p.data.zero_()
    parameters = dict(model.named_parameters())
    for u in list_updates(CONFIG, ADAPTER):
        product = factors[u.b] @ factors[u.a][u.first_rank : u.first_rank + u.rank]
        parameters[f"layers.{u.layer}.{u.parameter}"].data[u.first_row : u.first_row + u.rows] = u.scale * product
    save_gguf(tmp_path / "updates.gguf", model, {}, "f32")
    _, whole = read(tmp_path / "updates.gguf")
    for name in list_pieces(CONFIG, "gguf"):
        if not whole[name].any():
            assert f"{name}.lora_a" not in tensors
            continue
        a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        update = metadata["adapter.lora.alpha"] / len(a) * b @ a
        np.testing.assert_allclose(update, whole[name], rtol=1e-5, atol=1e-5)
    assert not tensors


def test_types_and_what_gguf_cannot_say(tmp_path):
    factors = random_factors(ADAPTER)
    save_gguf_adapter(tmp_path / "lora.gguf", CONFIG, ADAPTER, factors, "bf16")
    _, tensors = read(tmp_path / "lora.gguf")
    name = "blk.1.ffn_down.weight.lora_a"
    assert np.array_equal(tensors[name], factors["layers.1.lora.w2.a"].bfloat16().float().numpy())
    with pytest.raises(UsageError, match="blocks of 32"):
        save_gguf_adapter(tmp_path / "q8.gguf", CONFIG, ADAPTER, factors, "q8_0")
    with pytest.raises(UsageError, match="cannot hold lm_head"):
        saved = AdapterConfig(saved=("lm_head",))
        save_gguf_adapter(tmp_path / "s.gguf", CONFIG, saved, random_factors(saved), "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.gguf"]
