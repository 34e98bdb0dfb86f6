"""The bytes of a step against what autograd keeps, what operators allocate, and what FSDP2 holds."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_iter

import kernels
from engine.model.adapter import AdapterConfig
from engine.model.config import MODELS, ModelConfig
from engine.model.llama import new_model
from engine.model.shard import Shard
from engine.output.tensor_rows import HostCopy
from engine.planning.cards import CARDS, GIB
from engine.planning.memory import (
    CONTEXT_BYTES,
    NCCL_BYTES,
    PLAN_BYTES,
    BatchShape,
    activation_bytes,
    gradients_at_once,
    layer_bytes,
    memory,
    worst_moments,
)
from engine.planning.setting import Setting
from engine.planning.step_time import Work, gemm_flops
from engine.planning.weights import copy_bytes, parameter_shapes, shard_shape, state_bytes
from engine.training.host_updates import HostUpdates
from engine.training.optimizer import AdamW
from kernels.ops.adamw import adamw_state, states_of
from tests.helpers.late_copies import LateLane
from tests.helpers.planning import DTYPES, SHAPES, SMALL, TINY, sharded_model
from tests.helpers.step_bytes import N, Watch, meta_batch, meta_plan, ready, saved_bytes, watched

WHOLE = {"dim": 4096, "n_heads": 32, "hidden_dim": 11008, "vocab_size": 32000, "n_layers": 4}  # four layers of 7B
NARROW = {"dim": 576, "n_heads": 9, "n_kv_heads": 3, "hidden_dim": 1536, "vocab_size": 49152, "tied": True}


# ---- what is kept for backward --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "recompute", "several_targets"),
    [
        *[(shape, "fp32", "cheap", True) for shape in SHAPES],
        *[(shape, "bf16", "none", False) for shape in ("grouped queries", "heads of another width")],
        ("grouped queries", "fp32", "none", True), ("one layer", "fp32", "none", False),
        ("grouped queries", "bf16", "cheap", False), ("tied", "fp32", "block", True),
        ("one layer", "bf16", "block", False),
    ],
)  # fmt: skip
def test_activations_are_what_autograd_keeps_to_the_byte(shape, dtype, recompute, several_targets, device, unlaunched):
    """Attention's plans are left out. Recomputed blocks hold cos and sin in a closure, which the hooks do not see."""
    c = ModelConfig(**SMALL | {"n_layers": 3 if (dtype, recompute) == ("fp32", "none") else 2} | SHAPES[shape])
    model = new_model(c, "cpu", torch.float32, "triton", recompute, True)
    model.init_weights(0)
    model.to(device, DTYPES[dtype])
    one = ready(model, several_targets)
    plans = [t for plan in one.plans for t in plan if isinstance(t, torch.Tensor)]
    found = saved_bytes(lambda: model.loss(one), [*model.parameters(), *plans])
    tables = 4 * N * c.head_dim if recompute == "block" else 0
    assert len(one.targets) - len(one.rows) == several_targets
    batch = BatchShape(N, len(one.targets), shared_rows=several_targets)
    assert found + tables == activation_bytes(c, Setting(DTYPES[dtype], recompute=recompute), batch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans of the interpreter's")
@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_a_layer_of_llama_7b_keeps_what_the_formula_says(recompute):
    c, n = MODELS["llama-7b"], 4096
    model = new_model(dataclasses.replace(c, n_layers=1), "meta", torch.bfloat16, "triton", recompute)
    plan, table = meta_plan(c, n), torch.empty(n, c.head_dim // 2, device="meta")
    attend = functools.partial(
        kernels.rope_attention, cos=table, sin=table, documents=plan, n_heads=c.n_heads, impl="triton"
    )
    x = torch.empty(n, c.dim, dtype=torch.bfloat16, device="meta", requires_grad=True)
    but = [*model.parameters(), table, *(t for t in plan if isinstance(t, torch.Tensor))]
    found = saved_bytes(lambda: model.layers[0](x, x, attend), but)
    assert found == layer_bytes(c, Setting(recompute=recompute), BatchShape(n, n), last=False)
    assert recompute == "none" or 32 * found / n <= 3.0e6  # bytes a token over all layers


# ---- the worst moment -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans of the interpreter's")
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
@pytest.mark.parametrize(
    ("changes", "tokens", "loss_rows", "query_rows"),
    [
        (WHOLE, 8192, 5700, 5700), (WHOLE, 2048, 2048, 2048), (WHOLE, 2048, 64, 64),
        (WHOLE | {"n_kv_heads": 8, "hidden_dim": 14336, "vocab_size": 128256}, 4096, 3100, 3000),
        (WHOLE | {"n_layers": 1}, 2048, 1000, 1000),
        (NARROW | {"n_layers": 12}, 4096, 2800, 2800),
    ],
)  # fmt: skip
def test_temporaries_are_the_peak_of_forward_and_backward(changes, tokens, loss_rows, query_rows, recompute):
    """Models of real widths run on tensors without storage, with gradients that exist already.

    Everything that operators return is counted. What they allocate inside, such as a chunk of logits, is not seen.
    Nor are the head's matrix products, so they are subtracted.
    """
    c = ModelConfig(**{"n_kv_heads": changes["n_heads"]} | changes)
    model = new_model(c, "meta", torch.bfloat16, "triton", recompute, True)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    watch = watched(model, tokens, loss_rows, query_rows)
    setting, batch = Setting(recompute=recompute), BatchShape(tokens, loss_rows, shared_rows=loss_rows - query_rows)
    moments, kept = worst_moments(c, setting, batch), activation_bytes(c, setting, batch)
    without_logits = loss_rows * (c.dim * 2 + 4)
    wanted = max(moments.embedding, kept + max(without_logits, moments.backward))
    assert watch.most <= 1.001 * wanted <= 1.03 * watch.most
    work = Work(tokens, query_rows, 0, 0, 1)
    assert watch.flops == gemm_flops(c, work, recompute) - 6 * query_rows * c.dim * c.vocab_size


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans of the interpreter's")
@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    ("changes", "tokens", "loss_rows"), [(WHOLE | {"n_layers": 8}, 2048, 64), (NARROW | {"n_layers": 12}, 1024, 700)]
)
def test_gradients_that_leave_are_few_at_a_time(changes, tokens, loss_rows, micro_batches, recompute, monkeypatch):
    """Copies to the host are made as late as the next group's backward lets them; beside gradients no others count."""
    monkeypatch.setattr("engine.training.host_updates.Lane", lambda device: LateLane())
    c = ModelConfig(**{"n_kv_heads": changes["n_heads"]} | changes)
    model = new_model(c, "meta", torch.bfloat16, "triton", recompute, True)
    host = HostUpdates(model, {name: p.data for name, p in model.named_parameters()}, torch.device("meta"), "triton")
    one = meta_batch(c, tokens, loss_rows, loss_rows)
    with Watch(model.parameters()) as watch:
        for i in range(micro_batches):
            with host.micro_batch(i + 1 == micro_batches):
                model.loss(one).backward()
    most = watch.most + one.tokens.nbytes + one.rows.nbytes
    setting = Setting(recompute=recompute, offload=True, on_cpu=True)
    used = memory(c, setting, BatchShape(tokens, loss_rows, one_micro_batch=micro_batches == 1))
    of_kernels = max(0, used.head - loss_rows * (c.dim * 2 + 4))  # logits, which are not seen
    wanted = used.gradients + used.activations + used.temporaries
    assert most <= wanted and most >= 0.6 * (wanted - of_kernels)
    assert used.gradients < 0.6 * used.weights


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans of the interpreter's")
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize(
    ("changes", "tokens", "loss_rows", "least"),
    [(WHOLE | {"n_layers": 16}, 8192, 5700, 0.8), (WHOLE, 2048, 64, 0.7), (NARROW | {"n_layers": 12}, 4096, 2800, 0.6)],
)
def test_gradients_are_part_of_the_peak_of_a_step_of_one_micro_batch(
    changes, tokens, loss_rows, least, recompute, in_backward
):
    """Gradients appear while activations are freed, or are dropped one by one."""
    c = ModelConfig(**{"n_kv_heads": changes["n_heads"]} | changes)
    model = new_model(c, "meta", torch.bfloat16, "triton", recompute, not in_backward)
    if in_backward:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    watch = watched(model, tokens, loss_rows, loss_rows)
    setting = Setting(recompute=recompute, in_backward=in_backward)
    used = memory(c, setting, BatchShape(tokens, loss_rows, one_micro_batch=True))
    of_kernels = max(0, used.head - loss_rows * (c.dim * 2 + 4))  # logits, which are not seen
    wanted = used.gradients + used.activations + used.temporaries
    assert watch.most <= wanted
    assert watch.most >= least * (wanted - of_kernels)


MODEL = MODELS["tinyllama-1.1b"]
one_card_settings = st.builds(
    Setting, st.sampled_from(list(DTYPES.values())), st.sampled_from(("split", "fp32", "stochastic")),
    st.sampled_from(("fp32", "bf16", "8bit")), st.sampled_from(("none", "cheap", "block")), st.booleans(),
    st.booleans(), on_cpu=st.booleans(),
)  # fmt: skip


@given(one_card_settings, st.integers(1, 40000), st.integers(1, 3000), st.floats(0.01, 1), st.booleans())
@settings(max_examples=200, deadline=None)
def test_more_tokens_take_no_less_memory(setting, tokens, more, share, one):
    def total(tokens):
        return memory(MODEL, setting, BatchShape(tokens, math.ceil(share * tokens), one)).total

    assert total(tokens) <= total(tokens + more)


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize(
    ("dtype", "master"), [("bf16", "split"), ("bf16", "fp32"), ("bf16", "stochastic"), ("fp32", "split")]
)
@pytest.mark.parametrize("shape", ["grouped queries", "tied"])
def test_state_is_that_of_a_real_model_and_optimizer(shape, dtype, master, states):
    c = ModelConfig(**SMALL | {"dim": 96} | SHAPES[shape])  # some tensors are over 4,096 elements, some under
    model = new_model(c, "cpu", DTYPES[dtype], "ref")
    make = functools.partial(
        AdamW, model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, master=master, states=states
    )
    tensors = {name: shard.tensor for name, shard in make().tensors().items()}
    by_kind = {}
    for name, t in tensors.items():
        kind = {"param": "weights", "low": "master", "master": "master"}.get(name.split(".")[0], "states")
        by_kind[kind] = by_kind.get(kind, 0) + t.nbytes
    setting = Setting(DTYPES[dtype], master, states)
    used = memory(c, setting, BatchShape(64, 30))
    assert {kind: getattr(used, kind) for kind in by_kind} == by_kind and used.gradients == used.weights
    assert "master" in by_kind or used.master == 0
    away = memory(c, dataclasses.replace(setting, offload=True), BatchShape(64, 30))
    assert away.host == used.master + used.states and away.master == 0
    slots = make(offload=True).offload.slots
    assert 0 <= sum(t.nbytes for t in slots) - away.states < 3 * 5 * 128  # they are aligned
    updated = memory(c, dataclasses.replace(setting, offload=True, on_cpu=True), BatchShape(64, 30))
    host = make(offload=True, on_cpu=True).host_updates
    beside = sum(t.nbytes for held in (host.grads, host.weights) for t in held.values())
    assert updated.host == away.host + beside and updated.states == updated.master == 0
    assert updated.gradients < used.gradients


def test_a_plans_bytes_are_under_what_is_reserved(monkeypatch):
    """The micro-batch is like Alpaca's, and the tiles are those of each chip."""
    ends = [39, *(39 + torch.randint(20, 160, (80,)).cumsum(0)).tolist()]
    documents = torch.tensor([[0, 39, 0, 0], *([a, b, 0, 39] for a, b in itertools.pairwise(ends))])
    end = ends[-1]
    rows = torch.arange(end)[torch.rand(end) < 0.7]
    for chip in ("sm_80", "sm_90", "sm_100"):
        monkeypatch.setattr(kernels.ops.common, "chip_override", chip)
        plans = [kernels.attention_plan(documents, end, 128, "cpu", "triton", r) for r in (None, rows)]
        assert sum(t.nbytes for plan in plans for t in plan if isinstance(t, torch.Tensor)) <= PLAN_BYTES * end


def test_llama_7b_fits_one_80_gb_card_with_8_bit_states():
    """In the design's table, in GB: weights 13.5, split 13.5, 8-bit states 13.7, gradients 13.5, activations 24.8."""
    used = memory(MODELS["llama-7b"], Setting(states="8bit"), BatchShape(8300, 5800))
    figures = used.weights, used.master, used.states, used.gradients, used.activations
    assert [round(n / 1e9, 1) for n in figures] == [13.5, 13.5, 13.7, 13.5, 24.7]
    assert used.total < CARDS["H100"].memory_gib * GIB


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_llama_7b_fits_one_card_of_24_gb_where_the_cpu_updates_it(states):
    """Three layers' gradients are beside the weights, 3 x 0.4 GB; the host holds 14 or 8 bytes a parameter."""
    c = MODELS["llama-7b"]
    setting = Setting(states=states, recompute="block", offload=True, on_cpu=True)
    used = memory(c, setting, BatchShape(2048, 1434))
    assert round(used.gradients / 1e9, 1) == 1.2 and used.master == used.states == 0
    assert used.total < 0.8 * CARDS["RTX-4090"].memory_gib * GIB
    assert used.host / c.n_parameters == pytest.approx({"fp32": 14, "8bit": 8.03}[states], abs=0.02)
    visiting = memory(c, dataclasses.replace(setting, on_cpu=False), BatchShape(2048, 1434))
    assert visiting.total > CARDS["RTX-4090"].memory_gib * GIB


@pytest.mark.parametrize(("states", "shards"), [("fp32", 1), ("8bit", 2)])
def test_the_copy_of_a_state_takes_the_memory_that_was_planned(states, shards, monkeypatch):
    """The arenas that HostCopy allocates are counted, with tensors smaller and larger than an arena."""
    monkeypatch.setattr("engine.output.tensor_rows.COPY_ARENA_BYTES", 1 << 16)
    monkeypatch.setattr("engine.planning.weights.COPY_ARENA_BYTES", 1 << 16)
    c, asked = ModelConfig(**SMALL | {"dim": 96, "vocab_size": 2000}), []
    model = new_model(c, "cpu", torch.bfloat16, "ref")
    held = {name: p.new_empty(shard_shape(p.shape, shards)) for name, p in model.named_parameters()}
    state = {name: adamw_state(t, "split", states_of(t, states)).tensors() for name, t in held.items()}
    tensors = {f"param.{name}": Shard(t) for name, t in held.items()}
    tensors |= {f"{kind}.{name}": Shard(t) for name in held for kind, t in state[name].items()}
    empty = torch.empty

    def ask(*sizes, pin_memory=False, **rest):
        asked.extend(sizes)
        return empty(*sizes, **rest)

    monkeypatch.setattr(torch, "empty", ask)
    HostCopy(pinned=True).copy_shards(tensors)
    monkeypatch.undo()
    monkeypatch.setattr("engine.planning.weights.COPY_ARENA_BYTES", 1 << 16)
    assert len(asked) > 4 and copy_bytes(c, Setting(states=states, shards=shards)) == sum(asked)


# ---- several GPUs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "shape, loss_rows, in_backward, numbers, of_fp32",
    [
        ({"hidden_dim": 40}, 1, True, 8 * (100 + 100), 0),  # the head's and its copy
        ({"hidden_dim": 51}, 1, True, 2 * 8 * 2 * 51, 0),  # two of w13
        ({"hidden_dim": 40, "tied": True}, 1, True, 8 * (2 * 100 + 100), 0),
        ({"hidden_dim": 51, "tied": True}, 1, True, 8 * (2 * 2 * 51 + 100), 0),
        ({"hidden_dim": 40}, 10**9, True, 8 * 100, 8 * 100),  # sums of chunks are fp32
        ({"hidden_dim": 40}, 1, False, 8 * (100 + 3 * 40 + 2 * (2 + 1) * 4), 0),  # the head's and a layer's
    ],
)
def test_gradients_at_once_are_those_worked_out_by_hand(shape, loss_rows, in_backward, numbers, of_fp32, size):
    c = ModelConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=100, max_seq_len=16, **shape)
    assert gradients_at_once(c, loss_rows, size, in_backward) == numbers * size + of_fp32 * 4


def test_gathered_bytes_are_those_worked_out_by_hand():
    """Four GPUs, each with 3 of the embedding's 10 rows. A block: two norms of 8, 16, 8 and 24 rows of 8, 8 of 12."""
    block, embedding = 2 * (8 + 8 + 16 * 8 + 8 * 8 + 24 * 8 + 8 * 12), 2 * 12 * 8
    whole, batch = 2 * block + 2 * embedding + 2 * 8, BatchShape(9, 5)
    of_four, replicated = Setting(shards=4), Setting(shards=4, replicas=3)
    assert state_bytes(TINY, of_four).weights == whole / 4
    assert memory(TINY, of_four, batch).gathered == 5 * block + 2 * (2 * embedding + 16)
    used = memory(TINY, replicated, batch)
    assert used.gradients == 3 * whole / 4 and used.gathered == 5 * block + 2 * (2 * embedding + 16)
    assert memory(TINY, dataclasses.replace(replicated, dtype=torch.float32), batch).gradients == 2 * whole / 4
    alone, plain = 2 * 10 * 8, memory(TINY, Setting(replicas=3), batch)  # an embedding without padding
    assert plain.gathered == 6 * block + 2 * (2 * alone + 16) and plain.gradients == 3 * plain.weights
    tied, wide = dataclasses.replace(TINY, tied=True), dataclasses.replace(TINY, vocab_size=1000)
    assert memory(tied, of_four, batch).gathered == 5 * block + 2 * (embedding + 16)
    assert memory(wide, of_four, batch).gathered == 4 * (2 * 2 * 1000 * 8 + 16)


@pytest.mark.parametrize(("shards", "replicas"), [(4, 1), (1, 4), (2, 2)])
def test_several_gpus_have_no_optimizer_in_backward(shards, replicas):
    with pytest.raises(ValueError, match="in_backward with 4 cards"):
        memory(TINY, Setting(in_backward=True, shards=shards, replicas=replicas), BatchShape(9, 5))


@given(
    st.sampled_from(["llama-7b", "smollm2-135m"]), st.integers(2, 64), st.sampled_from(("fp32", "bf16")),
    st.sampled_from(("fp32", "split", "stochastic")), st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_all_shards_are_the_whole_model_and_padding(name, cards, states, master, offload):
    c, setting = MODELS[name], Setting(master=master, states=states, offload=offload)
    one, each = (memory(c, dataclasses.replace(setting, shards=n), BatchShape(500, 300)) for n in (1, cards))
    rows = [math.prod(shape[1:]) for shape in parameter_shapes(c)]  # at most N - 1 of padding each
    number = {"weights": 2, "gradients": 2, "host": 8 if states == "fp32" else 4}
    number["host"] += {"fp32": 4, "split": 2, "stochastic": 0}[master]
    for kind in ("weights", "gradients", "host"):
        whole, padding = getattr(one, kind), (cards - 1) * sum(rows) * number[kind]
        assert whole <= cards * getattr(each, kind) <= whole + padding
    assert (each.host > 0) == offload
    if not offload:
        state, padding = one.master + one.states, (cards - 1) * sum(rows) * number["host"]
        assert state <= cards * (each.master + each.states) <= state + padding


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("one_micro_batch", [False, True])
def test_memory_falls_to_activations_and_what_is_gathered(states, one_micro_batch):
    c, batch = MODELS["llama-7b"], BatchShape(2000, 1400, one_micro_batch)
    found = [memory(c, Setting(states=states, shards=n), batch) for n in (1, 2, 3, 4, 8, 16, 64, 4096)]
    assert all(more.total > less.total for more, less in itertools.pairwise(found))
    last, one = found[-1], found[0]
    assert last.overhead == CONTEXT_BYTES + NCCL_BYTES + round(0.03 * (last.total - last.overhead))
    rest = last.gathered + last.activations + last.temporaries + last.overhead
    assert rest < last.total < 1.01 * rest
    assert (last.activations, last.head) == (one.activations, one.head) and found[-2].gathered == found[1].gathered


class Held(Watch):
    """Counts the most bytes at once by the storages' present sizes, because FSDP2 empties and refills them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            key = t.untyped_storage()._cdata if isinstance(t, torch.Tensor) else None
            if key is not None and key not in self.but and key not in self.live:
                self.live[key] = StorageWeakRef(t.untyped_storage())
        alive = {key: torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for key, ref in self.live.items()}
        self.live = {key: self.live[key] for key, storage in alive.items() if storage is not None}
        self.most = max(self.most, sum(storage.nbytes() for storage in alive.values() if storage is not None))
        return out


@pytest.mark.parametrize(("fake_ranks", "replicas"), [(4, 1), (4, 2), (2, 2)], indirect=["fake_ranks"])
@pytest.mark.parametrize(
    ("dtype", "vocab_size", "adapter"),
    [
        *[(dtype, vocab_size, None) for dtype in DTYPES for vocab_size in (301, 9000)],
        ("fp32", 301, AdapterConfig(r=64)), ("fp32", 9000, AdapterConfig(r=8)), ("bf16", 9000, AdapterConfig(r=8)),
        ("fp32", 9000, AdapterConfig(r=8, saved=("embed_tokens",))),
    ],
)  # fmt: skip
def test_gathered_bytes_and_gradients_are_what_fsdp2_holds(dtype, vocab_size, adapter, fake_ranks, replicas):
    """The most that a step of two micro-batches holds beside its shards. Activations are few."""
    c = ModelConfig(**SMALL | {"dim": 256, "n_layers": 4, "hidden_dim": 688, "vocab_size": vocab_size})
    dtype, shards = DTYPES[dtype], fake_ranks // replicas
    model, step = sharded_model(c, dtype, replicas, shards, adapter=adapter)
    with Held([*[p.to_local() for p in model.parameters()], *model.buffers()]) as held:
        step()
    used = memory(c, Setting(dtype, shards=shards, replicas=replicas, adapter=adapter), BatchShape(8, 3))
    planned = used.gradients + used.gathered + used.activations + used.temporaries
    assert 0.77 * planned <= held.most <= 1.02 * planned
