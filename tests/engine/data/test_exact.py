"""Packed, prefix-shared, position-skipping steps against the plain padded one, in fp64: the same loss and gradients.

The plain step is written out here, with a batch axis and padding, in torch alone; of ours it takes the weights and the
table of angles, which is in fp32 by design.
"""

from itertools import takewhile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels
from engine.data import dataset as data
from engine.data.packing import Packing, make_micro_batches
from engine.data.rows import read_rows
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.text.templates import Row
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.datasets import dataset
from tests.helpers.run import ROOT
from tests.helpers.small_model import VOCAB_SIZE, small_model
from tests.helpers.spm_tokenizers import train_sentencepiece

CONFIG = dict(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=VOCAB_SIZE, head_dim=8, tied=False)


def model_of(**changes):
    model = new_model(ModelConfig(**CONFIG | changes), "cpu", torch.float64, "ref")
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    return model


def padded_loss(model, rows, targets):
    """The mean loss a target of rows padded to one width, every layer and the head at every position."""
    c, width = model.config, max(map(len, rows))
    tokens = torch.tensor(np.array([np.pad(row, (0, width - len(row))) for row in rows]), dtype=torch.int64)
    labels = torch.full(tokens.shape, -100)
    for i, (row, is_target) in enumerate(zip(rows, targets, strict=True)):
        labels[i, : len(row)] = torch.where(torch.tensor(is_target), torch.tensor(row, dtype=torch.int64), -100)
    cos, sin = kernels.rope_cos_sin(torch.arange(width), kernels.rope_frequencies(c.head_dim, c.rope_theta))
    cos, sin = (torch.cat((t, t), -1).double()[:, None] for t in (cos, sin))

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weight

    def rotated(x):  # (B, S, heads, Dh)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    x = model.tok_embeddings[tokens]
    for layer in model.layers:
        h = norm(x, layer.attention_norm)
        q, k, v = (h @ layer.wqkv.T).unflatten(-1, (-1, c.head_dim)).split((c.n_heads, c.n_kv_heads, c.n_kv_heads), 2)
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, 2) for t in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / c.head_dim**0.5
        scores = scores.masked_fill(torch.ones(width, width).triu(1).bool(), -torch.inf)
        o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        x = x + o.flatten(2) @ layer.wo.T
        gate, up = (norm(x, layer.ffn_norm) @ layer.w13.T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ layer.w2.T
    logits = norm(x, model.norm) @ model.head.T
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradients(model, loss):
    model.zero_grad()
    total = loss()
    return {"loss": total, **{name: p.grad.clone() for name, p in model.named_parameters()}}


def plain(model, ds, examples):
    def loss():
        loss = padded_loss(model, [ds.tokens_of(i) for i in examples], [ds.is_target_of(i) for i in examples])
        loss.backward()
        return loss.detach()

    return gradients(model, loss)


def ours(model, ds, examples, max_tokens, **how):
    batches = make_micro_batches(ds.get_examples(examples), Packing(max_tokens, **how))

    def loss():
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            part = model.loss(batch) / ds.loss_tokens()[examples].sum()
            part.backward()
            total += part.detach()
        return total

    return gradients(model, loss), batches


def assert_equal(found, truth):
    for name, t in truth.items():
        assert (found[name] - t).norm() <= 1e-10 * t.norm(), name


@pytest.fixture(scope="module")
def alpaca():
    """13 rows, two of them the same question."""
    rows = [row for row in read_rows([ROOT / "data_gen" / "seed_tasks.jsonl"])[0] if len(row.output) < 200][:11]
    again = [type(row)(row.source, None, row.instruction, row.input, "Not the same.") for row in rows[:2]]
    return rows + again, load_tokenizer(small_model())


@pytest.mark.parametrize(("train_on_prompt", "tied"), [(False, True), (True, False)])
def test_alpaca_rows(alpaca, train_on_prompt, tied):
    rows, tokenizer = alpaca
    ds = data.encode_rows(rows, tokenizer, max_length=96, train_on_prompt=train_on_prompt).select()
    model, examples = model_of(tied=tied), np.arange(len(ds))
    truth = plain(model, ds, examples)
    logical = ds.lengths().sum()
    for max_tokens in (96, 400, 10**6):
        for how in ({}, {"share_prefix": False}, {"best_fit": False, "multiple": 64})[: 3 if max_tokens == 400 else 2]:
            found, batches = ours(model, ds, examples, max_tokens, **how)
            assert_equal(found, truth)
            computed = sum(len(batch.tokens) for batch in batches)
            if max_tokens == 10**6:
                assert (len(batches), computed < 0.85 * logical) == (1, how.get("share_prefix", True))


def test_prefixes_of_any_kind():
    """Nested, repeated whole, one row the beginning of another, targets within what is shared."""
    stem = list(range(100, 130))
    rows = [
        [*stem, 1, 2, 3], [*stem, 1, 2, 3], [*stem, *range(200, 220), 5], [*stem, *range(200, 220), 6, 7], stem,
        [*stem[:10], 9, 9], [4, 4, 4], [*stem, *range(200, 220)], [*stem[:10], 9, 8, 7],
    ]  # fmt: skip
    targets = [[False] + [bool((i * 7 + j) % 3) for j in range(1, len(row))] for i, row in enumerate(rows)]
    model, ds = model_of(vocab_size=300), dataset(rows, targets)
    truth = plain(model, ds, np.arange(len(rows)))
    for max_tokens in (56, 90, 1000):
        found, batches = ours(model, ds, np.arange(len(rows)), max_tokens)
        assert_equal(found, truth)
    assert len(batches) == 1 and len(batches[0].tokens) < 0.5 * sum(map(len, rows))
    assert batches[0].weights.max() > 1


def test_one_layer_and_block_recompute():
    rows = [[*range(50, 70), i, i + 1] for i in range(6)]
    for changes, recompute in ({"n_layers": 1}, "cheap"), ({}, "block"):
        model, ds = model_of(vocab_size=300, **changes), dataset(rows)
        model.recompute = recompute
        assert_equal(ours(model, ds, np.arange(6), 1000)[0], plain(model, ds, np.arange(6)))


def test_the_llama_tokenizers_rows(tmp_path):
    """With BOS, and the true LLaMA templates."""
    train_sentencepiece(tmp_path)
    texts = [("Add.", ""), ("Name it.", ""), ("Read.", "A note."), ("Sort them.", "b, a"), ("Why?", "")]
    rows = [Row(f"r:{i}", None, *text, f"It is {i}.") for i, text in enumerate(texts)]
    ds = data.encode_rows(rows, load_tokenizer(tmp_path), max_length=400).select()
    of_kind = [[ds.tokens_of(i).tolist() for i in kind] for kind in ((0, 1, 4), (2, 3))]
    prefixes = {sum(1 for _ in takewhile(lambda ids: len({*ids}) == 1, zip(*kind, strict=False))) for kind in of_kind}
    model, examples = model_of(vocab_size=500), np.arange(len(ds))
    found, (batch,) = ours(model, ds, examples, 10**6)
    assert_equal(found, plain(model, ds, examples))
    assert prefixes <= {end - start for start, end, *_ in batch.documents.tolist()}
