"""Decoding in C++ against torch: as exact, for every shape of model, and left to torch where it does not fit."""

from dataclasses import replace

import pytest
import torch

import engine.inference.generation as generation
from engine.inference import decoder
from engine.inference.answers import answer_prompts
from engine.inference.decoder import MAX_ROWS, find_decoder
from engine.inference.kv_cache import KVCache, pack_prompts
from engine.inference.sampling import Sampling
from engine.model.adapter import AdapterConfig
from engine.model.config import ModelConfig, RopeScaling
from engine.model.llama import new_model
from kernels.native.cpu import find_cpu
from kernels.native.library import NativeError
from tests.helpers.native import load_instruction_sets

pytestmark = pytest.mark.skipif(find_cpu() is None, reason="the CPU library is compiled by g++, which is missing")

BASE = ModelConfig(dim=60, n_layers=2, n_heads=3, n_kv_heads=1, hidden_dim=77, vocab_size=101, head_dim=20)
SHAPES = {
    "grouped queries": BASE,
    "heads of 64, tied": replace(BASE, head_dim=64, n_heads=6, n_kv_heads=3, tied=True),
    "heads of 80": replace(BASE, head_dim=80, n_heads=2, n_kv_heads=2),
    "heads of 96, biases": replace(BASE, head_dim=96, n_heads=5, attention_bias=True, mlp_bias=True),
    "heads of 128": replace(BASE, head_dim=128, n_heads=8),
    "heads of 2": replace(BASE, head_dim=2, dim=33, hidden_dim=31),
    "linear": replace(BASE, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "dynamic": replace(BASE, max_seq_len=32, rope_scaling=RopeScaling(kind="dynamic", factor=2.0)),
    "yarn": replace(BASE, rope_scaling=RopeScaling(kind="yarn", original_max_seq_len=32, attention_factor=1.3)),
    "llama3": replace(BASE, rope_scaling=RopeScaling(original_max_seq_len=32)),
}
LENGTHS = (126, 1, 257, 40)  # of prompts: a block of keys is 128, which the first one passes while it is answered
STEPS = 4


def make(config, dtype):
    model = new_model(config, "cpu", dtype)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.ndim > 1 else p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / 4)
    return model


def fill_cache(model, prompts):
    """Return the cache of these prompts, each computed alone: torch's products depend on how many rows there are."""
    device, dtype, longest = torch.device("cpu"), model.norm.dtype, max(map(len, prompts)) + STEPS
    whole = KVCache(model.config, len(prompts), longest, device, dtype)
    whole.lengths = torch.tensor([len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        one = KVCache(model.config, 1, n, device, dtype)
        one.begin_prefill(pack_prompts([n]))
        model(prompt, torch.arange(n), cache=one)
        whole.k[:, row, :n], whole.v[:, row, :n] = one.k[:, 0], one.v[:, 0]
    return whole


@torch.no_grad()
def decode(model, lengths, with_torch=False):
    """Return the logits (STEPS, B, V) in fp64 behind fixed tokens, of prompts of these of LENGTHS."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    prompts = [torch.randint(vocab, (n,), generator=generator) for n in LENGTHS]
    following = torch.randint(vocab, (STEPS, len(LENGTHS)), generator=generator)
    chosen = [LENGTHS.index(n) for n in lengths]
    cache = fill_cache(model, [prompts[i] for i in chosen])
    found = None if with_torch else find_decoder(model, cache)
    out = []
    for tokens in following[:, chosen]:
        if with_torch:
            out.append(model.logits(model(tokens, cache.begin_token(), cache=cache)))
        else:
            out.append(found.next_logits(tokens.tolist(), list(range(len(lengths)))))
    return torch.stack(out).double()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_exact_as_torch(config, dtype):
    model = make(config, dtype)
    ours, torchs = decode(model, LENGTHS), decode(model, LENGTHS, with_torch=True)
    truth = decode(model.double(), LENGTHS, with_torch=True)
    assert truth.std() > 0.1
    ours, torchs = ((x - truth).square().mean().sqrt() for x in (ours, torchs))
    assert ours <= (1.5 if dtype == torch.float32 else 0.8) * torchs
    assert ours < (1e-5 if dtype == torch.float32 else 0.05) * truth.std()


def test_every_instruction_set_is_as_exact(tmp_path, monkeypatch):
    model = make(SHAPES["heads of 64, tied"], torch.bfloat16)
    torchs, ours = decode(model, LENGTHS, with_torch=True), {}
    for name, library in load_instruction_sets(tmp_path).items():
        monkeypatch.setattr(decoder, "find_cpu", lambda library=library: library)
        ours[name] = decode(model, LENGTHS)
    truth = decode(model.double(), LENGTHS, with_torch=True)
    assert "plain" in ours
    for found in ours.values():
        assert (found - truth).square().mean() <= 0.8**2 * (torchs - truth).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_neighbours_change_no_bit(dtype, monkeypatch):
    model = make(SHAPES["heads of 64, tied"], dtype)
    one = decode(model, LENGTHS)
    for i, n in enumerate(LENGTHS):
        assert torch.equal(decode(model, (n,))[:, 0], one[:, i])
    monkeypatch.setattr(decoder.torch, "get_num_threads", lambda: 3)
    assert torch.equal(decode(model, LENGTHS), one)


def test_generation_goes_on_when_neighbours_have_stopped(monkeypatch):
    model = make(BASE, torch.float32)
    prompts = [[5, 6, 7], [9], [10, 20, 30, 40, 50]]
    steps = []
    real = decoder.Decoder.next_logits
    monkeypatch.setattr(decoder.Decoder, "next_logits", lambda self, t, s: steps.append(s) or real(self, t, s))
    full = generation.generate(model, prompts, (), 12)
    assert steps == [[0, 1, 2]] * 11
    stop = next(token for token in full[1] if full[0].count(token) == 0)
    cut = generation.generate(model, prompts, {stop}, 12)
    assert steps[-1] == [i for i, answer in enumerate(cut) if len(answer) == 12] and 1 not in steps[-1]
    monkeypatch.setattr(generation, "find_decoder", lambda *_: None)
    assert generation.generate(model, prompts, (), 12) == full
    assert generation.generate(model, prompts, {stop}, 12) == cut


def test_what_it_does_not_take_is_left_to_torch(monkeypatch):
    def found(model, batch=1, grad=False):
        cache = KVCache(model.config, batch, 8, torch.device("cpu"), model.norm.dtype)
        with torch.set_grad_enabled(grad):
            return find_decoder(model, cache) is not None

    model = make(BASE, torch.float32)
    assert found(model) and found(model, batch=MAX_ROWS) and found(make(BASE, torch.bfloat16))
    assert found(model, batch=MAX_ROWS + 1) and not found(model, grad=True)
    assert not found(make(BASE, torch.float16)) and not found(make(BASE, torch.float64))
    assert not any(found(new_model(BASE, "cpu", torch.float32, impl)) for impl in ("triton", "ref"))
    mixed = make(BASE, torch.bfloat16)
    mixed.norm.data = mixed.norm.data.float()
    assert not found(mixed)
    strided = make(BASE, torch.float32)
    strided.layers[0].wo.data = strided.layers[0].wo.data.T.contiguous().T
    assert not found(strided)
    monkeypatch.setattr(decoder, "find_cpu", lambda: None)
    assert not found(model)


@pytest.mark.parametrize("targets", [("q_proj",), ("down_proj",)])
@torch.no_grad()
def test_answers_under_an_adapter_are_the_adapters_from_the_first_token_to_the_last(targets):
    model = new_model(BASE, "cpu", torch.float32, adapter=AdapterConfig(r=4, alpha=8.0, targets=targets))
    model.init_weights(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 4)
    wanted = [5, 17]
    for _ in range(8):
        wanted.append(int(model.logits(model(torch.tensor(wanted)))[-1].argmax()))
    assert generation.generate(model, [wanted[:2]], set(), 8) == [wanted[2:]]
    (answer,) = answer_prompts(model, [wanted[:2]], set(), 8, Sampling(), 1)
    assert answer.ids == wanted[2:] and find_decoder(model, KVCache(BASE, 1, 8, p.device, p.dtype)) is None


def test_a_token_or_a_place_that_there_is_none_of_is_refused():
    model = make(BASE, torch.float32)
    with torch.no_grad():
        cache = KVCache(model.config, 2, 4, torch.device("cpu"), torch.float32)
        for tokens, sequences, length in (([101], [0], 0), ([-1], [0], 0), ([5], [2], 0), ([5], [0], 4)):
            cache.lengths = torch.full((3,), length)
            with pytest.raises(NativeError, match="decode: the compiled function was given a size"):
                find_decoder(model, cache).next_logits(tokens, sequences)
