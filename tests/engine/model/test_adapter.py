"""A model with low-rank updates against the dense model W + scale B A by autograd in fp64; PEFT's rules of names."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.inference.generation import generate
from engine.model.adapter import (
    ALL_LINEAR,
    AdapterConfig,
    adapter_from_settings,
    list_updates,
    settings_from_adapter,
)
from engine.model.batch import MicroBatch
from engine.model.config import MODELS, ModelConfig
from engine.model.llama import Block, new_model
from engine.model.shard import Shard
from engine.training.config import FinetuneConfig
from engine.training.optimizer import AdamW
from tests.helpers.datasets import packed_micro_batch
from tests.helpers.run import worst

SHAPE = ModelConfig(
    dim=24, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=40, vocab_size=301, max_seq_len=128, head_dim=6, tied=False
)
TILES = {  # the interpreter's own tiles of 256 x 256 compute mostly padding here
    "attention": {kernel: {"BLOCK_M": 64, "BLOCK_N": 64} for kernel in ("forward", "dq", "dkdv")}
}
# The maps of a layer: our parameter, first row and rows in it, columns, by their own places in the layer.
Q, KV = SHAPE.n_heads * SHAPE.head_dim, SHAPE.n_kv_heads * SHAPE.head_dim
MAPS = {
    "self_attn.q_proj": ("wqkv", 0, Q), "self_attn.k_proj": ("wqkv", Q, KV), "self_attn.v_proj": ("wqkv", Q + KV, KV),
    "self_attn.o_proj": ("wo", 0, SHAPE.dim), "mlp.gate_proj": ("w13", 0, SHAPE.hidden_dim),
    "mlp.up_proj": ("w13", SHAPE.hidden_dim, SHAPE.hidden_dim), "mlp.down_proj": ("w2", 0, SHAPE.dim),
}  # fmt: skip
ALL = AdapterConfig(r=4, alpha=8.0)
# {(layer, path): (rank, scale)} that each one must give, written out by hand from PEFT's documentation.
EVERYWHERE = [(i, path) for i in range(SHAPE.n_layers) for path in MAPS]
CASES = {
    "all": (ALL, dict.fromkeys(EVERYWHERE, (4, 2.0))),
    "q and v": (
        AdapterConfig(r=2, alpha=3.0, targets=("q_proj", "v_proj")),
        {key: (2, 1.5) for key in EVERYWHERE if key[1][-6:] in ("q_proj", "v_proj")},
    ),
    "k and up in the last layer": (
        AdapterConfig(r=3, alpha=6.0, targets=r".*\.2\..*(k|up)_proj"),
        {(2, "self_attn.k_proj"): (3, 2.0), (2, "mlp.up_proj"): (3, 2.0)},
    ),
    "rank-stabilised, patterns, layers": (
        AdapterConfig(
            r=4, alpha=8.0, targets=("q_proj", "mlp.gate_proj", "down_proj"), rslora=True, layers=(0, 2),
            rank_pattern=(("down_proj", 9), ("0.self_attn.q_proj", 1)), alpha_pattern=(("layers.2.mlp.*", 5.0),),
        ),
        {
            (0, "self_attn.q_proj"): (1, 8.0), (0, "mlp.gate_proj"): (4, 4.0), (0, "mlp.down_proj"): (9, 8 / 3),
            (2, "self_attn.q_proj"): (4, 4.0), (2, "mlp.gate_proj"): (4, 2.5), (2, "mlp.down_proj"): (9, 5 / 3),
        },
    ),
    "head and embedding whole": (
        AdapterConfig(r=4, alpha=8.0, targets=("o_proj",), saved=("embed_tokens", "lm_head")),
        {key: (4, 2.0) for key in EVERYWHERE if key[1].endswith("o_proj")},
    ),
    "head alone": (AdapterConfig(targets=(), saved=("lm_head",)), {}),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


def model_of(adapter, recompute="cheap", dtype=torch.float64, impl="ref", **changes):
    """Return a model whose weights and factors, B too, are far from 0. Other adapters have the same weights."""
    model = new_model(replace(SHAPE, **changes), "cpu", dtype, impl, recompute, adapter=adapter)
    with torch.no_grad():
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + name.endswith("norm"))
    return model


def gradients_of(model, one, *seed):
    """Return the loss of a micro-batch and {parameter: its gradient, None where it has none}."""
    model.zero_grad()
    loss = model.loss(one, *seed)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


class DenseLoss(nn.Module):
    """The loss of a plain model whose weights another model's factors have been added to, by autograd."""

    def __init__(self, **changes):
        super().__init__()
        self.model = new_model(replace(SHAPE, **changes), "cpu", torch.float64, "ref")

    def forward(self, one):
        return self.model.loss(one)

    def of(self, adapted, updates, one):
        """Return the loss at W + scale B A. updates: {(layer, path): (rank, scale)}."""
        given = dict(adapted.named_parameters())
        weights = {f"model.{name}": p for name, p in given.items() if ".lora." not in name}
        first_rank = {}
        for (layer, path), (rank, scale) in updates.items():
            parameter, first, rows = MAPS[path]
            parameter = f"layers.{layer}.{parameter}"
            place = first_rank.get(parameter, 0)
            first_rank[parameter] = place + rank
            factors = parameter.replace(f"{layer}.", f"{layer}.lora.", 1)
            a, b = given[f"{factors}.a"][place : place + rank], given[f"{factors}.{path.split('.')[1]}"]
            whole = weights[f"model.{parameter}"]
            added = torch.cat((whole[:first], whole[first : first + rows] + scale * (b @ a), whole[first + rows :]))
            weights[f"model.{parameter}"] = added
        return torch.func.functional_call(self, weights, (one,))


@cases
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_loss_and_every_gradient_are_those_of_the_dense_weights(case, recompute):
    """Packed documents, prefixes that are shared, and a last layer that computes the rows with a loss only."""
    adapter, updates = CASES[case]
    model, one = model_of(adapter, recompute), packed_micro_batch()
    loss, found = gradients_of(model, one)
    trained = model.trained_parameters()
    truth = DenseLoss().of(model, updates, one)
    wanted = dict(zip(trained, torch.autograd.grad(truth, list(trained.values())), strict=True))
    assert abs(loss - truth) < 1e-12 * truth
    for name, gradient in wanted.items():
        assert worst(gradient) > 0 and worst(found[name] - gradient) < 1e-11 * worst(gradient), name
    assert all(gradient is None for name, gradient in found.items() if name not in trained)


def test_the_kernels_compute_what_the_references_do():
    one = packed_micro_batch()
    truth = gradients_of(model_of(ALL, n_layers=2), one)
    ours = gradients_of(model_of(ALL, "cheap", torch.float32, "triton", n_layers=2), one)
    assert abs(ours[0] - truth[0]) < 1e-5 * truth[0]
    for name, gradient in truth[1].items():
        assert gradient is None or worst(ours[1][name] - gradient) < 1e-4 * worst(gradient), name
        assert (gradient is None) == (ours[1][name] is None), name


@cases
def test_only_the_adapter_is_trained_and_has_states(case):
    adapter, updates = CASES[case]
    model = model_of(adapter)
    whole = {"tok_embeddings", "output"} & {{"lm_head": "output"}.get(n, "tok_embeddings") for n in adapter.saved}
    trained = set(model.trained_parameters())
    assert {name for name in trained if ".lora." not in name} == whole
    assert len([name for name in trained if name.endswith("_proj")]) == len(updates)
    optimizer = AdamW(model.float(), beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, master="split", states="fp32")
    assert {name.split(".", 1)[1] for name in optimizer.tensors()} == trained


@pytest.mark.parametrize("recompute", ["cheap", "block"])
def test_backward_stops_below_the_first_trained_map(recompute):
    """No gradient of the layers below it is computed, and nothing of them is kept for one."""
    model, reached, kept = model_of(CASES["k and up in the last layer"][0], recompute), [], []
    for layer in model.layers:
        layer.register_forward_hook(lambda block, args, out: reached.append((out[0].requires_grad, len(kept))))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model.loss(packed_micro_batch()).backward()
    assert [requires_grad for requires_grad, _ in reached[:3]] == [False, False, True]
    assert kept and (reached[1][1] == 0 or recompute == "block")  # torch's checkpoint first hands its inputs over


# ---- dropout --------------------------------------------------------------------------------------------------------

DROPPED = replace(ALL, dropout=0.3)


def test_dropout_follows_its_seed_and_recomputes_what_it_dropped():
    one = packed_micro_batch()
    first, again, other = (gradients_of(model_of(DROPPED, "none"), one, seed) for seed in (5, 5, 6))
    block = gradients_of(model_of(DROPPED, "block"), one, 5)
    assert first[0] == again[0] == block[0] != other[0]
    for name in model_of(DROPPED).trained_parameters():
        assert first[1][name].equal(again[1][name]) and not first[1][name].equal(other[1][name]), name
        assert worst(block[1][name] - first[1][name]) < 1e-13 * worst(first[1][name]), name


def test_each_map_and_each_layer_drops_elements_of_its_own(monkeypatch):
    seeds, real = [], Block.update_of
    monkeypatch.setattr(Block, "update_of", lambda *args, **k: seeds.append(real(*args, **k).seed) or real(*args, **k))
    for seed in (5, 6):
        model_of(DROPPED).loss(packed_micro_batch(), seed)
    assert len(set(seeds)) == len(seeds) == 2 * 4 * SHAPE.n_layers and None not in seeds


def test_without_a_seed_nothing_is_dropped():
    """In evaluation, also right after a step, and where text is generated."""
    one, plain, model = packed_micro_batch(), model_of(ALL), model_of(DROPPED)
    wanted = plain.loss(one).detach()
    assert model.loss(one, 5) != wanted and model.loss(one) == wanted
    model.loss(one, 5)  # a step's; its seeds must not stay
    tokens = torch.randint(301, (9,))
    plain, model = plain.float(), model.float()
    assert generate(model, [tokens.tolist()], {0}, 6) == generate(plain, [tokens.tolist()], {0}, 6)
    with torch.no_grad():
        assert model(tokens).equal(plain(tokens))


# ---- PEFT's rules ---------------------------------------------------------------------------------------------------


@cases
def test_which_maps_have_an_update_and_its_rank_and_scale(case):
    adapter, updates = CASES[case]
    found = {(u.layer, u.path): (u.rank, u.scale) for u in list_updates(SHAPE, adapter)}
    assert found.keys() == updates.keys()
    assert all(found[key] == pytest.approx(value, rel=1e-15) for key, value in updates.items())


RULES = {  # (targets, names of maps of layer 1 that they adapt), as PEFT 0.21 does
    "an end of a path": (("self_attn.q_proj",), {"q_proj"}),
    "a whole path": (("model.layers.1.mlp.up_proj",), {"up_proj"}),
    "no part of a name": (("proj",), set()),
    "no substring": (("layers.1",), set()),
    "a regular expression of the whole path": (r".*\.1\.self_attn\..*", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "not of its end": (r"self_attn\..*", set()),
    "not of its beginning": (r"model\.layers\.1", set()),
}


@pytest.mark.parametrize("rule", RULES)
def test_targets_are_names_ends_of_paths_or_an_expression(rule):
    targets, names = RULES[rule]
    adapter = AdapterConfig(targets=targets)
    assert {path.split(".")[1] for path in MAPS if adapter.adapts(1, path)} == names


def test_the_first_pattern_that_fits_counts_and_fits_whole_names():
    adapter = AdapterConfig(r=4, rank_pattern=(("1.mlp.down_proj", 2), ("down_proj", 3), ("proj", 9), ("q_.*", 5)))
    ranks = {path: adapter.rank_and_scale(1, path)[0] for path in MAPS}
    assert (ranks["mlp.down_proj"], ranks["self_attn.q_proj"], ranks["mlp.up_proj"]) == (2, 5, 4)
    assert adapter.rank_and_scale(11, "mlp.down_proj")[0] == 3  # "1.mlp" is no end of "11.mlp" but at a dot


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError) as caught:
        AdapterConfig(
            r=0, alpha=math.inf, dropout=1.0, targets="(", rank_pattern=(("q_proj", 2.5), ("[", 1)), saved=("norm",)
        )
    for word in ("rank 0", "rank 2.5", "alpha inf", "dropout 1.0", "norm trained whole", "'('", "'['"):
        assert word in str(caught.value), word


@pytest.mark.parametrize(
    ("adapter", "tied", "told"),
    [
        (AdapterConfig(targets=("q_prj",)), False, "no map of the model is among the targets"),
        (AdapterConfig(targets=("q_proj", "c_attn", "W_pack")), False, "targets c_attn, W_pack are no maps"),
        (AdapterConfig(targets=("q_proj", "proj", "v_proj")), False, "targets proj are no maps"),
        (AdapterConfig(layers=(3,)), False, "no map of the model is among the targets"),
        (AdapterConfig(saved=("lm_head",)), True, "lm_head cannot be trained whole: the model's head is its embedding"),
    ],
)
def test_updates_that_a_model_cannot_have(adapter, tied, told):
    (problem,) = adapter.check(replace(SHAPE, tied=tied))
    assert told in problem
    assert not ALL.check(SHAPE)


def settings(**changes):
    given = {"model": "m", "data": ("d",), "adapter": "lora"} | changes
    return vars(FinetuneConfig(**given))


@cases
def test_the_flags_that_ask_for_an_adapter_ask_for_its_updates(case):
    """Of an expression or of some layers they name each path."""
    adapter, updates = CASES[case]
    again = adapter_from_settings(settings(**settings_from_adapter(SHAPE, adapter)))
    assert list_updates(SHAPE, again) == list_updates(SHAPE, adapter) and len(list_updates(SHAPE, again)) == len(
        updates
    )
    assert again.saved == adapter.saved


def test_each_setting_of_a_run_is_its_own_field_of_the_adapter():
    settings = {
        "adapter": "qlora", "lora_r": 3, "lora_alpha": 5.0, "lora_dropout": 0.25, "lora_targets": ("q_proj", "v_proj"),
        "rslora": True, "lora_rank_pattern": ("v_proj=2",), "lora_alpha_pattern": ("q_proj=9",),
        "lora_save": ("lm_head",),
    }  # fmt: skip
    want = AdapterConfig(
        r=3, alpha=5.0, dropout=0.25, targets=("q_proj", "v_proj"), rslora=True, rank_pattern=(("v_proj", 2),),
        alpha_pattern=(("q_proj", 9.0),), saved=("lm_head",), nf4_base=True,
    )  # fmt: skip
    assert adapter_from_settings(settings) == want
    assert adapter_from_settings(settings | {"adapter": "lora"}) == dataclasses.replace(want, nf4_base=False)
    assert adapter_from_settings(settings | {"adapter": "none"}) is None is adapter_from_settings({})


def test_flags_of_an_adapter():
    assert adapter_from_settings(vars(FinetuneConfig(model="m", data=("d",)))) is None
    assert adapter_from_settings(settings()) == AdapterConfig(r=16, alpha=32.0, targets=ALL_LINEAR)
    given = adapter_from_settings(
        settings(lora_rank_pattern=("down_proj=8", "a=b=2"), lora_alpha_pattern=("q_proj=.5",))
    )
    assert given.rank_pattern == (("down_proj", 8), ("a=b", 2)) and given.alpha_pattern == (("q_proj", 0.5),)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"lora_rank_pattern": ("down_proj",)}, "--lora-rank-pattern 'down_proj', wanted NAME=NUMBER"),
        ({"lora_rank_pattern": ("down_proj=8.5",)}, "'down_proj=8.5', wanted NAME=NUMBER"),
        ({"lora_alpha_pattern": ("=8",)}, "'=8', wanted NAME=NUMBER"),
        ({"lora_r": 0}, "rank 0, wanted a whole number"),
        ({"lora_save": ("norm",)}, "norm trained whole"),
        ({"adapter": "none", "lora_r": 8, "rslora": True}, "--lora-r is for --adapter lora"),
        ({"offload_optimizer": True}, "--offload-optimizer with --adapter"),
        ({"model": "tiny", "random_init": True}, "--random-init with --adapter"),
    ],
)
def test_flags_that_do_not_fit_are_told(flags, told):
    with pytest.raises(ValueError, match="--") as caught:
        settings(**flags)
    assert told in str(caught.value)


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone():
    """A within +-1 / sqrt(columns) as PEFT draws it, B 0; rows of a rank are those of the whole."""
    models = [model_of(AdapterConfig(r=8), dtype=torch.float32) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_adapter(seed)
    first, same, other = (m.trained_parameters() for m in models)
    for name, p in first.items():
        assert p.equal(same[name])
        if name.endswith("_proj"):
            assert not p.any()
            continue
        bound = p.shape[1] ** -0.5
        assert not p.equal(other[name]) and 0.9 * bound < p.abs().max() <= bound
        assert abs(p.std() / bound - 3**-0.5) < 0.1, name  # uniform
    with torch.no_grad():
        tokens, plain = torch.randint(301, (9,)), model_of(None, dtype=torch.float32)
        assert models[0](tokens).equal(plain(tokens))
    halves = {name: Shard(torch.full_like(p[len(p) // 2 :], 7), len(p) // 2, len(p)) for name, p in first.items()}
    models[0].init_adapter(1, halves)
    assert all(halves[name].tensor.equal(p[len(p) // 2 :]) for name, p in same.items())


def test_no_two_maps_of_a_step_drop_by_the_same_bits():
    """Of whichever layers and weights."""
    shape = ModelConfig(dim=32, n_layers=5, n_heads=2, n_kv_heads=2, hidden_dim=32, vocab_size=64, max_seq_len=64)
    model = new_model(shape, "cpu", torch.float32, "ref", adapter=AdapterConfig(r=2, dropout=0.5))
    seeds = [layer.update_of(name, 5 * 7 + i).seed for i, layer in enumerate(model.layers) for name in layer.lora]
    assert len(set(seeds)) == len(seeds) == 5 * 4


def test_what_is_trained_whole_alone_needs_no_updates():
    shape = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=32, vocab_size=64, max_seq_len=64)
    assert AdapterConfig(targets=(), saved=("lm_head",)).check(shape) == []
    (problem,) = AdapterConfig(targets=()).check(shape)
    assert problem.startswith("no map of the model is among the targets")


def test_patterns_that_fit_nothing_are_named_of_ranks_and_of_alphas():
    patterns = {"rank_pattern": (("q_proj", 2), ("k_proj", 3)), "alpha_pattern": (("up_proj", 5.0), ("q_proj", 1.0))}
    adapter = AdapterConfig(targets=("q_proj",), **patterns)
    assert adapter.find_unused_patterns(MODELS["tiny"]) == ["k_proj", "up_proj"]


def test_a_pattern_of_several_names_fits_each_at_the_end_of_a_path():
    adapter = AdapterConfig(r=2, rank_pattern=(("q_proj|v_proj", 4),))
    ranks = {path: adapter.rank_and_scale(1, f"self_attn.{path}")[0] for path in ("q_proj", "k_proj", "v_proj")}
    assert ranks == {"q_proj": 4, "k_proj": 2, "v_proj": 4}


def test_targets_of_one_row_are_all_predicted_by_it():
    shape = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=32, vocab_size=64, max_seq_len=64)
    model = new_model(shape, "cpu", torch.float32, "ref")
    documents = torch.tensor([[0, 4, 0, 0]], dtype=torch.int32)
    tokens = torch.arange(4)
    for rows, places in (([3, 3], [0, 0]), ([2, 3, 3], [0, 1, 1]), ([1, 3], None), ([3], None)):
        batch = MicroBatch(tokens, tokens, documents, torch.tensor(rows), torch.tensor(rows) + 5)
        found = model.prepare_batch(batch).row_of_target
        assert (found if found is None else found.tolist()) == places
