"""The estimate against what is really kept, allocated, multiplied and packed, and its command line."""

import dataclasses
import functools
import io
import itertools
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import kernels
from engine.base.errors import exit_code_of
from engine.base.flags import from_cli
from engine.data import packing
from engine.data.dataset import Dataset
from engine.data.prefixes import find_shared_prefixes
from engine.distributed.fsdp import shard_model
from engine.estimate import SHARED, EstimateConfig, estimate, main
from engine.model.batch import MicroBatch, Ready
from engine.model.config import MODELS, ModelConfig
from engine.model.llama import new_model
from engine.model.shard import Shard
from engine.output.tensor_rows import HostCopy
from engine.planning.cards import (
    CARDS,
    GIB,
    Traffic,
    Work,
    block_seconds,
    find_card,
    gemm_flops,
    rates,
    step_seconds,
    update_bytes,
)
from engine.planning.memory import (
    CONTEXT_BYTES,
    DEFAULTS,
    NCCL_BYTES,
    PLAN_BYTES,
    SAVINGS,
    cheapest_that_fits,
    copy_bytes,
    kept,
    largest_micro_batch,
    layer_bytes,
    layout_that_fits,
    memory,
    sent_bytes,
    setting_of,
    shard_of,
    state_bytes,
    summed_bytes,
    temporaries,
    traffic,
)
from engine.planning.tables import COLLECTIVES, show
from engine.planning.workload import alpaca_mix, cut, step_of
from engine.training.config import FinetuneConfig
from engine.training.optimizer import AdamW
from kernels.ops.adamw import adamw_state, states_of
from scripts.pages import ranks as render_ranks
from tests.helpers.run import command

SMALL = dict(
    dim=48, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=80, vocab_size=301, max_seq_len=128, head_dim=16
)  # fmt: skip
SHAPES = {
    "grouped queries": {}, "all heads have keys": {"n_kv_heads": 4}, "tied": {"tied": True},
    "one layer": {"n_layers": 1}, "heads of another width": {"dim": 40, "head_dim": 24},
}  # fmt: skip
WHOLE = {"dim": 4096, "n_heads": 32, "hidden_dim": 11008, "vocab_size": 32000, "n_layers": 4}  # four layers of 7B
NARROW = {"dim": 576, "n_heads": 9, "n_kv_heads": 3, "hidden_dim": 1536, "vocab_size": 49152, "tied": True}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---- what is kept for backward --------------------------------------------------------------------------------------


def ready(model, several_targets, n=70):
    """A micro-batch with a prefix, padding and documents; where several_targets, one row predicts two."""
    documents = [[0, 9, 0, 0], [9, 24, 0, 9], [24, 25, 0, 9], [25, 58, 0, 0], [60, 70, 0, 0]]
    positions = torch.zeros(n, dtype=torch.int64)
    for start, end, prefix_start, prefix_end in documents:
        positions[start:end] = torch.arange(end - start) + prefix_end - prefix_start
    rows = torch.cat([torch.arange(start + (end - start) // 2, end) for start, end, *_ in documents])
    rows = torch.cat((rows[:4], rows[3:])) if several_targets else rows
    batch = MicroBatch(
        torch.randint(301, (n,)), positions, torch.tensor(documents, dtype=torch.int32), rows,
        torch.randint(301, rows.shape), torch.rand(rows.shape),
    )  # fmt: skip
    one = model.ready(batch)
    return dataclasses.replace(one, rows=one.rows.clone())  # on a CPU a view of as many as there are targets


def saved_bytes(work, but=()):
    """Bytes of the distinct storages that autograd saves in work(), but for those of some tensors."""
    found, but = {}, {t.untyped_storage()._cdata for t in but}

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in but:
            found[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        alive = work()  # storages stay, so that none takes another's place
    del alive
    return sum(found.values())


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
def test_what_a_step_keeps_to_the_byte(shape, dtype, recompute, several_targets, device):
    """Attention's plans apart. Blocks that are computed again keep cos and sin by closure, where no hook sees them."""
    c, size = ModelConfig(**SMALL | SHAPES[shape]), DTYPES[dtype].itemsize
    model = new_model(c, "cpu", torch.float32, "triton", recompute, True)
    model.init_weights(0)
    model.to(device, DTYPES[dtype])
    one = ready(model, several_targets)
    plans = [t for plan in one.plans for t in plan if isinstance(t, torch.Tensor)]
    found = saved_bytes(lambda: model.loss(one), [*model.parameters(), *plans])
    tables = 4 * 70 * c.head_dim if recompute == "block" else 0
    assert len(one.targets) - len(one.rows) == several_targets
    assert found + tables == kept(c, 70, len(one.targets), len(one.rows), size, recompute)


def meta(n, dtype=torch.int64):
    return torch.empty(n, dtype=dtype, device="meta")


def meta_plan(c, n, n_queries=None):
    rows = None if n_queries is None else torch.arange(n_queries)
    return kernels.attention_plan(torch.tensor([[0, n, 0, 0]]), n, c.head_dim, "cpu", "triton", rows)


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
    found = saved_bytes(lambda: model.layers[0](x, attend), but)
    assert found == layer_bytes(c, n, n, 2, recompute, last=False)
    assert recompute == "none" or 32 * found / n <= 3.0e6  # bytes a token over all layers


# ---- the worst moment -----------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Bytes that operators' outputs hold, at most at once, and floating point operations of matrix products."""

    def __init__(self, but):
        super().__init__()
        self.but, self.live = {t.untyped_storage()._cdata for t in but}, {}
        self.now = self.most = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for key in [key for key, (storage, _) in self.live.items() if storage.expired()]:
            self.now -= self.live.pop(key)[1]
        for t in tree_iter(out):
            key = t.untyped_storage()._cdata if isinstance(t, torch.Tensor) else None
            if key is not None and key not in self.but and key not in self.live:
                self.live[key] = StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()
                self.now += self.live[key][1]
        self.most = max(self.most, self.now)
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return out


def watched(model, tokens, loss_rows, query_rows):
    """The Watch of forward and backward of a micro-batch on the meta device, its inputs being there from the start."""
    c = model.config
    one = Ready(
        meta(tokens), meta(tokens), meta(loss_rows), meta(loss_rows, torch.float32), meta(query_rows),
        meta(loss_rows) if loss_rows > query_rows else None, (meta_plan(c, tokens), meta_plan(c, tokens, query_rows)),
    )  # fmt: skip
    with Watch([t for p in model.parameters() for t in (p, p.grad) if t is not None]) as watch:
        model.loss(one).backward()
    saved = [one.tokens, one.rows, *([] if one.of_rows is None else [one.of_rows])]
    watch.most += sum(t.nbytes for t in saved)
    return watch


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
def test_the_peak_of_forward_and_backward(changes, tokens, loss_rows, query_rows, recompute):
    """At real widths, on tensors without storage: all that operators return, gradients being there already. What they
    have inside, as the chunk of logits, is not seen. And the matrix products, but the head's, which are inside too."""
    c = ModelConfig(**{"n_kv_heads": changes["n_heads"]} | changes)
    model = new_model(c, "meta", torch.bfloat16, "triton", recompute, True)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    watch = watched(model, tokens, loss_rows, query_rows)
    _, backward, _, end = temporaries(c, tokens, loss_rows, query_rows, 2, recompute)
    without_logits = loss_rows * (c.dim * 2 + 4)
    wanted = max(end, kept(c, tokens, loss_rows, query_rows, 2, recompute) + max(without_logits, backward))
    assert watch.most <= 1.001 * wanted <= 1.03 * watch.most
    work = Work(tokens, query_rows, 0, 0, 1)
    assert watch.flops == gemm_flops(c, work, recompute) - 6 * query_rows * c.dim * c.vocab_size


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans of the interpreter's")
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize(
    ("changes", "tokens", "loss_rows", "least"),
    [(WHOLE | {"n_layers": 16}, 8192, 5700, 0.8), (WHOLE, 2048, 64, 0.7), (NARROW | {"n_layers": 12}, 4096, 2800, 0.6)],
)
def test_the_peak_of_a_step_of_one_micro_batch(changes, tokens, loss_rows, least, recompute, in_backward):
    """With its gradients, which begin to be when activations cease, or are dropped one by one."""
    c = ModelConfig(**{"n_kv_heads": changes["n_heads"]} | changes)
    model = new_model(c, "meta", torch.bfloat16, "triton", recompute, not in_backward)
    if in_backward:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    watch = watched(model, tokens, loss_rows, loss_rows)
    used = memory(
        c, tokens=tokens, loss_rows=loss_rows, recompute=recompute, in_backward=in_backward, one_micro_batch=True
    )
    of_kernels = max(0, used.head - loss_rows * (c.dim * 2 + 4))  # logits, which are not seen
    wanted = used.gradients + used.activations + used.temporaries
    assert watch.most <= wanted
    assert watch.most >= least * (wanted - of_kernels)


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
    used = memory(c, tokens=64, loss_rows=30, dtype=DTYPES[dtype], master=master, states=states)
    assert {kind: getattr(used, kind) for kind in by_kind} == by_kind and used.gradients == used.weights
    assert "master" in by_kind or used.master == 0
    away = memory(c, tokens=64, loss_rows=30, dtype=DTYPES[dtype], master=master, states=states, offload=True)
    assert away.host == used.master + used.states and away.master == 0
    slots = make(offload=True).offload.slots
    assert 0 <= sum(t.nbytes for t in slots) - away.states < 3 * 5 * 128  # they are aligned


def test_adamw_moves_what_its_table_says():
    doc, c = sys.modules["kernels.ops.adamw"].__doc__, MODELS["llama-7b"]
    table = re.findall(r'^    (fp32 p|"\w+") +(\d+) +(\d+) +([\d.]+) ', doc, re.M)
    assert len(table) == 4
    for name, *wanted in table:
        dtype = torch.float32 if name == "fp32 p" else torch.bfloat16
        master = "split" if name == "fp32 p" else name.strip('"')
        for states, moved in zip(("fp32", "bf16", "8bit"), wanted, strict=True):
            state = state_bytes(c, dtype, master, states)[:3]
            gradients = c.n_parameters * (dtype.itemsize - 2)  # the table's are bf16
            found = (update_bytes(*state, master) - gradients) / c.n_parameters
            assert found == pytest.approx(float(moved), abs=0.05), (name, states)


def test_a_plans_bytes_are_under_what_is_reserved(monkeypatch):
    """Of a micro-batch like Alpaca's, on the chips' tiles."""
    ends = [39, *(39 + torch.randint(20, 160, (80,)).cumsum(0)).tolist()]
    documents = torch.tensor([[0, 39, 0, 0], *([a, b, 0, 39] for a, b in itertools.pairwise(ends))])
    end = ends[-1]
    rows = torch.arange(end)[torch.rand(end) < 0.7]
    for chip in ("sm_80", "sm_90", "sm_100"):
        monkeypatch.setattr(kernels.ops.common, "chip_override", chip)
        plans = [kernels.attention_plan(documents, end, 128, "cpu", "triton", r) for r in (None, rows)]
        assert sum(t.nbytes for plan in plans for t in plan if isinstance(t, torch.Tensor)) <= PLAN_BYTES * end


# ---- what fits ------------------------------------------------------------------------------------------------------

MODEL = MODELS["tinyllama-1.1b"]
settings_of_memory = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(DTYPES.values())), "master": st.sampled_from(("split", "fp32", "stochastic")),
        "states": st.sampled_from(("fp32", "bf16", "8bit")), "recompute": st.sampled_from(("none", "cheap", "block")),
        "offload": st.booleans(), "in_backward": st.booleans(),
    }
)  # fmt: skip


@given(settings_of_memory, st.integers(1, 40000), st.integers(1, 3000), st.floats(0.01, 1), st.booleans())
@settings(max_examples=200, deadline=None)
def test_more_tokens_take_no_less_memory(setting, tokens, more, share, one):
    def total(tokens):
        loss_rows = int(np.ceil(share * tokens))
        return memory(MODEL, tokens=tokens, loss_rows=loss_rows, one_micro_batch=one, **setting).total

    assert total(tokens) <= total(tokens + more)


@given(settings_of_memory, st.integers(1 << 30, 60 << 30), st.integers(0, 4 << 30), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_the_largest_micro_batch_fits_and_the_next_does_not(setting, room, more, share):
    def total(tokens):
        return memory(MODEL, tokens=tokens, loss_rows=int(np.ceil(share * tokens)), **setting).total

    found = largest_micro_batch(MODEL, room, loss_share=share, most_tokens=9000, **setting)
    assert 0 <= found <= 9000
    assert found == 0 or total(found) <= room
    assert found == 9000 or total(found + 1) > room
    assert found <= largest_micro_batch(MODEL, room + more, loss_share=share, most_tokens=9000, **setting)


def test_a_step_of_one_micro_batch_holds_fewer_gradients():
    at = {"tokens": 4096, "loss_rows": 3000}
    several, one = (memory(MODEL, **at, one_micro_batch=one) for one in (False, True))
    at_once = memory(MODEL, **at, one_micro_batch=True, in_backward=True)
    assert one.gradients < several.gradients and at_once.total < several.total
    assert one.gradients + one.activations >= several.gradients  # at the end of backward all of them are there
    room = (one.total + several.total) // 2
    assert largest_micro_batch(MODEL, room, loss_share=3000 / 4096, most_tokens=8192, step_tokens=4096) == 4096
    assert largest_micro_batch(MODEL, room, loss_share=3000 / 4096, most_tokens=8192) < 4096


@pytest.mark.parametrize("gib", [9, 11, 14, 18, 24])
def test_the_cheapest_fit_and_do_without_no_change(gib):
    setting = DEFAULTS | {"recompute": "none", "states": "fp32"}
    ways = {"tokens": 4000, "least_tokens": 512, "most_tokens": 8192}
    found = cheapest_that_fits(MODEL, gib * GIB, **ways, **setting)
    assert found and found == sorted(found, key=price_of)
    for fit in found:
        assert fit.memory.total <= gib * GIB
        changed = [name for name in setting if fit.setting[name] != setting[name]]
        assert len(changed) + any("--micro-batch-tokens" in flag for flag in fit.flags) == len(fit.flags)
        for name in changed:  # without this change it would not do, or not with so many tokens
            less = fit.setting | {name: setting[name]}
            tokens = largest_micro_batch(MODEL, gib * GIB, most_tokens=8192, **less)
            assert tokens < (512 if "--micro-batch-tokens" in fit.flags[0] else 4000)


def price_of(fit):
    """Compares as prices do: by the dearest change, then the next."""
    flags = [text for *_, text in SAVINGS]
    return sorted((flags.index(f) if f in flags else -1 for f in fit.flags), reverse=True)


def test_llama_7b_on_one_80_gb_card():
    """The design's table, in GB: weights 13.5, split 13.5, 8-bit states 13.7, gradients 13.5, activations 24.8."""
    used = memory(MODELS["llama-7b"], tokens=8300, loss_rows=5800, states="8bit")
    figures = used.weights, used.master, used.states, used.gradients, used.activations
    assert [round(n / 1e9, 1) for n in figures] == [13.5, 13.5, 13.7, 13.5, 24.7]
    assert used.total < CARDS["H100"].memory_gib * GIB
    fits = cheapest_that_fits(MODELS["llama-7b"], int(79.11 * GIB), tokens=2048, least_tokens=512, loss_share=0.7)
    assert fits[0].flags == ("--optimizer-states 8bit",)
    assert not any(fit.flags == () for fit in fits)  # as it stands, with fp32 states, it does not
    assert cheapest_that_fits(MODELS["llama-7b"], 200 * GIB, tokens=2048, least_tokens=512)[0].flags == ()


# ---- what is trained on ---------------------------------------------------------------------------------------------


def test_the_alpaca_mix():
    """As measured: 127.2 tokens a row, a quarter of all in shared prefixes, 66.1 of the response."""
    mix = alpaca_mix(EstimateConfig(model="llama-7b"))
    assert mix.examples == 52002
    assert mix.logical / 128 == pytest.approx(127.2, rel=0.005)
    assert (mix.own + mix.prefix) / mix.logical == pytest.approx(0.745, abs=0.01)
    assert mix.loss_rows / 128 == pytest.approx(65.8, rel=0.01)
    apart = alpaca_mix(EstimateConfig(model="llama-7b", share_prefix=False))
    assert (apart.own, apart.prefix) == (mix.logical, 0)
    few = alpaca_mix(EstimateConfig(model="llama-7b", global_batch_size=16, max_length=64))
    assert few.logical / 16 < 64 and few.loss_rows < few.own


@pytest.mark.parametrize("share", [True, False])
def test_a_step_in_numbers_is_what_packing_lays_out(share):
    """Tokens, rows with loss, and pairs, counted one by one in the micro-batch."""
    stem, rng = np.arange(100, 120), np.random.default_rng(0)
    rows = [np.concatenate((stem[: 20 * (i % 3 > 0)], rng.integers(0, 99, 10 + 3 * i))) for i in range(12)]
    loss = rng.integers(1, 8, 12)
    targets = [np.arange(len(row)) >= len(row) - n for row, n in zip(rows, loss, strict=True)]
    lengths = np.array([len(row) for row in rows])
    ends = np.cumsum(lengths)
    tokens = np.concatenate(rows).astype(np.int32)
    dataset = Dataset(tokens, np.concatenate(targets), ends - lengths, ends, ("",) * 12, {})
    (one,) = packing.make_micro_batches(dataset, np.arange(12), packing.Packing(10**6, share_prefix=share))
    groups = find_shared_prefixes(rows) if share else []
    logical, own, prefix, loss_rows, pairs, query_pairs = step_of(lengths, loss, groups)
    assert (logical, own + prefix, loss_rows) == (ends[-1], len(one.tokens), len(one.targets))
    assert pairs == (one.positions + 1).sum() and query_pairs == (one.positions[one.loss_rows] + 1).sum()


def test_micro_batches_are_as_few_as_do_and_evened_out():
    mix = alpaca_mix(EstimateConfig(model="llama-7b"))
    whole, halves, tiny = (cut(mix, budget) for budget in (20000, 8000, 512))
    assert whole.one_micro_batch and whole.micro_batches == 1 and whole.tokens < 15000
    assert halves.micro_batches == 2 and whole.tokens / 2 < halves.tokens <= 8000
    assert tiny.tokens == 512 and tiny.micro_batches > mix.own / 512
    assert cut(mix, 20000, most_examples=4).micro_batches == 32


# ---- cards and speed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtx 4090", "RTX4090", "4090", "a100-80", "A100 40", "h100"])
def test_cards_by_the_names_people_give_them(name):
    assert find_card(name).name in CARDS


def write_report(path, parts, **facts):
    report = {"what": "scripts.gpu_report", "smoke": False, "date": "2026-01-01", "parts": parts} | facts
    path.write_text(json.dumps(report))


MACHINE = {"machine": {"device": "NVIDIA H100 80GB HBM3"}}
CEILINGS = {"ceilings": {"gemm_tflops": 700.0, "copy_gb_per_s": 2900.0}}
STEP = {"name": "main", "model": "llama-7b", "tokens": 8320, "sharing": True, "recompute": "cheap", "master": "split",
        "states": "8bit", "offload": False, "tokens_per_s": 20000.0, "peak_gib": 71.5}  # fmt: skip


def test_a_report_of_the_card_replaces_what_is_projected(tmp_path):
    card = CARDS["H100"]
    assert rates(card, tmp_path).source == "projected"
    write_report(tmp_path / "smoke.json", MACHINE | CEILINGS, smoke=True)
    write_report(tmp_path / "other.json", {"machine": {"device": "NVIDIA H200"}} | CEILINGS)
    write_report(tmp_path / "without.json", MACHINE)
    assert rates(card, tmp_path).source == "projected"
    write_report(tmp_path / "old.json", MACHINE | {"ceilings": {"gemm_tflops": 1.0, "copy_gb_per_s": 1.0}})
    write_report(tmp_path / "new.json", MACHINE | CEILINGS | {"step": {"records": [STEP]}}, date="2026-02-01")
    speed = rates(card, tmp_path)
    assert (speed.gemm_flops_per_s, speed.copy_bytes_per_s, speed.report) == (7e14, 2.9e12, "new.json")
    assert speed.steps == (STEP,)


def test_measured_steps_of_the_same_setting_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine.planning.cards.BENCHMARKS", tmp_path)
    failed = {name: value for name, value in STEP.items() if name not in ("tokens_per_s", "peak_gib")}
    records = [STEP, STEP | {"recompute": "block", "name": "another"}, failed | {"failed": "out of memory"}]
    write_report(tmp_path / "h100.json", MACHINE | CEILINGS | {"step": {"records": records}})
    assert run("--optimizer-states", "8bit", "--json", tmp_path / "found") == 0
    out = capsys.readouterr().out
    assert "at 700 of 989 TFLOP/s" in out and out.count("20,000 tokens/s") == 1 and "another" not in out
    assert "measured in h100.json: 20,000 tokens/s in micro-batches of 8,320 tokens" in out
    assert "peak 71.5 GiB; that is 17 min" in out and "tokens/s (projected from rates in h100.json)" in out
    assert strict_json(tmp_path / "found")["measured_steps"] == [STEP]
    assert run("--optimizer-states", "8bit", "--gpu", "H200") == 0 and "projected" in capsys.readouterr().out


def test_speed_goes_the_way_it_should():
    def of(*flags):
        return estimate(from_cli(EstimateConfig, ["--optimizer-states", "8bit", *flags], None, FIRST)[0])["projection"]

    plain = of()
    assert of("--no-share-prefix").tokens_per_s < 0.9 * plain.tokens_per_s
    assert 0.7 < of("--recompute", "block").tokens_per_s / plain.tokens_per_s < 0.85
    assert of("--offload-optimizer").tokens_per_s < plain.tokens_per_s
    assert of("--micro-batch-tokens", "512").tokens_per_s < plain.tokens_per_s
    assert of("--gpu", "A100-80").tokens_per_s < 0.5 * plain.tokens_per_s
    assert of("--max-steps", "10").steps == 10 and of("--max-steps", "10").total_s == 10 * plain.seconds["total"]
    assert 15000 < plain.tokens_per_s < 25000  # a projection of 22,000 and up would be over the design's target
    assert plain.tokens_per_s * plain.seconds["total"] / 128 == pytest.approx(127.2, rel=0.005)


# ---- several cards --------------------------------------------------------------------------------------------------

TINY = ModelConfig(dim=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, hidden_dim=12, vocab_size=10, max_seq_len=64)


def found_of(*flags):
    return estimate(from_cli(EstimateConfig, list(map(str, flags)), None, FIRST)[0])


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize("offload", [False, True])
def test_one_card_has_nothing_of_several(states, recompute, offload):
    """To the byte and the bit: kinds summed up, and seconds as of a step without communication."""
    flags = ["--optimizer-states", states, "--recompute", recompute, *["--offload-optimizer"] * offload]
    found, c = found_of(*flags, "--micro-batch-tokens", 4096), MODELS["llama-7b"]
    plan, work, card = found["plan"], found["projection"].work, found["card"]
    weights, masters, moments, largest = state_bytes(c, torch.bfloat16, "split", states)
    head, backward, _, end = temporaries(c, plan.tokens, plan.loss_rows, plan.loss_rows, 2, recompute)
    keeps = kept(c, plan.tokens, plan.loss_rows, plan.loss_rows, 2, recompute)
    tensors = 2 * weights + (3 * largest if offload else masters + moments) + keeps
    tensors += plan.tokens * (8 + PLAN_BYTES) + 12 * plan.loss_rows + max(head, backward, end - keeps)
    assert found["memory"].total == tensors + CONTEXT_BYTES + round(0.03 * tensors)
    assert found["memory"].host == (masters + moments if offload else 0) and found["memory"].gathered == 0
    seconds = step_seconds(
        c, card, rates(card), work, size=2, recompute=recompute,
        update_bytes=update_bytes(weights, masters, moments, "split") + weights,
        offload_bytes=masters + moments if offload else 0,
    )  # fmt: skip
    projection, mix = found["projection"], alpaca_mix(EstimateConfig(model="llama-7b"))
    assert projection.seconds == seconds and seconds["communication"] == 0 and projection.communication_bytes == 0
    assert seconds["total"] == sum(seconds[k] for k in ("gemm", "attention", "memory", "update", "host", "offload"))
    assert projection.tokens_per_s == mix.logical / seconds["total"]
    assert projection.dollars == projection.total_s / 3600 * card.price_per_hour
    assert projection.total_s == seconds["total"] * (3 * 52002 / 128)


@pytest.fixture
def ranks(request):
    """The process group of rank 0 among so many, whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Bytes of what is gathered or scattered, whole, or summed over replicas, by collective."""

    def __init__(self):
        super().__init__()
        self.bytes = {"_allgather_base_": 0, "_reduce_scatter_base_": 0, "allreduce_": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.bytes:
            self.bytes[name] += max(t.nbytes for t in tree_iter(args) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def sharded(c, dtype, replicas, shards, recompute="cheap"):
    """A model as engine.distributed.world cuts it, and two micro-batches' forward and backward: sums come with the last."""
    names = ("replicas", "shards")
    mesh = init_device_mesh("cpu", (replicas, shards)[replicas == 1 :], mesh_dim_names=names[replicas == 1 :])
    model = new_model(c, "cpu", dtype, "ref", recompute)
    model.init_weights(0)
    shard_model(model, SimpleNamespace(mesh=mesh, replicas=replicas, shards=shards))
    documents, rows = torch.tensor([[0, 8, 0, 0]], dtype=torch.int32), torch.arange(5, 8)
    batch = MicroBatch(
        torch.randint(301, (8,)), torch.arange(8), documents, rows, torch.randint(301, (3,)), torch.ones(3)
    )

    def step():
        for last in (False, True):
            for module in (*model.layers, model):
                module.set_requires_all_reduce(last)
            model.loss(batch).backward()

    return model, step


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (7, 1), (4, 2), (6, 2), (6, 3), (3, 3)], indirect=["ranks"])
@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize("shape", ["grouped queries", "tied"])
def test_shards_and_what_is_sent_are_fsdp2s(shape, recompute, ranks, replicas):
    c, shards = ModelConfig(**SMALL | SHAPES[shape]), ranks // replicas
    model, step = sharded(c, torch.bfloat16, replicas, shards, recompute)
    held = [p.to_local() for p in model.parameters()]
    states = [adamw_state(t, "split", states_of(t, "8bit")).tensors() for t in held]
    found = state_bytes(c, torch.bfloat16, "split", "8bit", shards)
    assert sum(t.nbytes for t in held) == found[0]
    assert sum(t.nbytes for state in states for t in state.values()) == found[1] + found[2]
    with Sent() as sent:
        step()
    gathered, reduced, summed = sent.bytes.values()
    assert (gathered + reduced) * (shards - 1) == 2 * shards * sent_bytes(c, torch.bfloat16, shards)
    assert summed * 2 * (replicas - 1) == replicas * summed_bytes(c, torch.bfloat16, shards, replicas)
    told = traffic(c, CARDS["H100"], torch.bfloat16, shards, replicas).of_step(2)
    assert (told["gather_forward"] + told["gather_backward"]) * shards == gathered * (shards - 1)
    assert told["reduce"] * shards == reduced * (shards - 1) and told["sum"] * replicas == summed * 2 * (replicas - 1)


class Held(Watch):
    """Bytes at most at once, of storages as they are: FSDP2 empties and refills them."""

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


@pytest.mark.parametrize(("ranks", "replicas"), [(4, 1), (4, 2), (2, 2)], indirect=["ranks"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [301, 9000])
def test_what_is_whole_and_summed_is_fsdp2s(vocab_size, dtype, ranks, replicas):
    """The most that a step of two micro-batches holds beside its shards, activations being next to none."""
    c = ModelConfig(**SMALL | {"dim": 256, "n_layers": 4, "hidden_dim": 688, "vocab_size": vocab_size})
    dtype, shards = DTYPES[dtype], ranks // replicas
    model, step = sharded(c, dtype, replicas, shards)
    with Held([p.to_local() for p in model.parameters()]) as held:
        step()
    used = memory(c, tokens=8, loss_rows=3, dtype=dtype, cards=shards, replicas=replicas)
    assert 0.77 * (used.gradients + used.gathered) <= held.most <= 1.01 * (used.gradients + used.gathered)


def test_what_is_sent_and_gathered_by_hand():
    """Four cards, each with 3 of the embedding's 10 rows. A block: two norms of 8, 16, 8 and 24 rows of 8, 8 of 12."""
    block, embedding = 2 * (8 + 8 + 16 * 8 + 8 * 8 + 24 * 8 + 8 * 12), 2 * 12 * 8
    whole = 2 * block + 2 * embedding + 2 * 8
    assert state_bytes(TINY, torch.bfloat16, "split", "fp32", 4)[0] == whole / 4
    assert sent_bytes(TINY, torch.bfloat16, 4) == (3 * whole + block) * 3 / 4
    assert sent_bytes(TINY, torch.float32, 4) == 2 * (2 * whole + block) * 3 / 4
    assert memory(TINY, tokens=9, loss_rows=5, cards=4).gathered == 5 * block + 2 * (2 * embedding + 16)
    assert sent_bytes(TINY, torch.bfloat16, 1) == summed_bytes(TINY, torch.bfloat16, 4, 1) == 0
    for dtype in DTYPES.values():
        assert summed_bytes(TINY, dtype, 4, 3) == 2 * 2 * whole // 4 * 2 // 3
    replicated = memory(TINY, tokens=9, loss_rows=5, cards=4, replicas=3)
    assert replicated.gradients == 3 * whole / 4 and replicated.gathered == 5 * block + 2 * (2 * embedding + 16)
    assert memory(TINY, tokens=9, loss_rows=5, cards=4, replicas=3, dtype=torch.float32).gradients == 2 * whole / 4
    alone, plain = 2 * 10 * 8, memory(TINY, tokens=9, loss_rows=5, replicas=3)  # an embedding without padding
    assert plain.gathered == 6 * block + 2 * (2 * alone + 16) and plain.gradients == 3 * plain.weights
    tied = dataclasses.replace(TINY, tied=True)
    assert sent_bytes(tied, torch.bfloat16, 4) == (3 * (whole - embedding) + block) * 3 / 4
    assert memory(tied, tokens=9, loss_rows=5, cards=4).gathered == 5 * block + 2 * (embedding + 16)
    wide = dataclasses.replace(TINY, vocab_size=1000)
    assert memory(wide, tokens=9, loss_rows=5, cards=4).gathered == 4 * (2 * 2 * 1000 * 8 + 16)
    for layout in ({"cards": 4}, {"replicas": 4}, {"cards": 2, "replicas": 2}):
        with pytest.raises(ValueError, match="in_backward with 4 cards"):
            memory(TINY, tokens=9, loss_rows=5, in_backward=True, **layout)


@given(
    st.sampled_from(["llama-7b", "smollm2-135m"]), st.integers(2, 64), st.sampled_from(("fp32", "bf16")),
    st.sampled_from(("fp32", "split", "stochastic")), st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_shards_together_are_the_whole_and_padding(name, cards, states, master, offload):
    c, setting = MODELS[name], {"states": states, "master": master, "offload": offload}
    one, each = (memory(c, tokens=500, loss_rows=300, cards=n, **setting) for n in (1, cards))
    rows = [p[:1].numel() for p in new_model(c, "meta", torch.bfloat16).parameters()]  # at most N - 1 of padding each
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
    at = {"tokens": 2000, "loss_rows": 1400, "states": states, "one_micro_batch": one_micro_batch}
    found = [memory(MODELS["llama-7b"], cards=n, **at) for n in (1, 2, 3, 4, 8, 16, 64, 4096)]
    assert all(more.total > less.total for more, less in itertools.pairwise(found))
    last, one = found[-1], found[0]
    assert last.overhead == CONTEXT_BYTES + NCCL_BYTES + round(0.03 * (last.total - last.overhead))
    rest = last.gathered + last.activations + last.temporaries + last.overhead
    assert rest < last.total < 1.01 * rest
    assert (last.activations, last.head) == (one.activations, one.head) and found[-2].gathered == found[1].gathered


def test_a_cards_share_of_the_mix():
    whole, share = (alpaca_mix(EstimateConfig(model="llama-7b", gpus=n)) for n in (1, 8))
    assert (whole.per_step, share.per_step, share.examples) == (128, 16, 52002)
    assert 8 * share.logical == pytest.approx(whole.logical, rel=0.001)
    assert 8 * share.loss_rows == pytest.approx(whole.loss_rows, rel=0.001)
    assert share.prefix == pytest.approx(whole.prefix, rel=0.05)  # held by each card
    assert whole.largest / 8 < share.largest < whole.largest / 2
    few = alpaca_mix(EstimateConfig(model="llama-7b", gpus=8), rows=64)
    assert (few.per_step, few.examples) == (8, 64) and few.logical == pytest.approx(share.logical / 2)


def test_fewer_examples_than_cards(rows_file, smollm2, capsys):
    flags = ("--model", smollm2, "--data", rows_file)
    assert run(*flags, "--gpus", 32) == 2
    assert "24 examples are too few for --gpus 32; pass 24 or fewer" in capsys.readouterr().err
    assert run(*flags, "--gpus", 8) == 0 and "3 examples a card of 24 examples" in capsys.readouterr().out


def test_what_blocks_hide_by_hand():
    """Three blocks, two micro-batches, a byte a second and sums at two. A block computes 4 s forward, 25 s backward."""
    sent = Traffic(3, (10, 4), (20, 8), (6, 3), 1.0, 2.0, apart=False)
    assert sent.of_step(2) == {"gather_forward": 68, "gather_backward": 40, "reduce": 136, "sum": 21}
    assert sent.seconds(2) == {"gather_forward": 68, "gather_backward": 40, "reduce": 136, "sum": 10.5}
    assert sent.in_backward(False) == [20, 30, 10] and sent.in_backward(True) == [23, 33, 10]
    late = sent.late(2, 4.0, 25.0)
    assert late == {"begin": 2 * 14, "forward": 4 * 6, "backward": 5 + 8, "end": 28 + 28 + 3 + 1.5}
    late = dataclasses.replace(sent, apart=True).late(2, 4.0, 25.0)  # beside reductions, but for the last
    assert late == {"begin": 2 * 14, "forward": 4 * 6, "backward": 5 + 5, "end": 28 + 28 + 1.5}
    assert sent.late(2, 10.0, 33.0) == {"begin": 28, "forward": 0, "backward": 0, "end": 60.5}
    assert dataclasses.replace(sent, layers=1).late(1, 0.0, 0.0)["backward"] == 0


@pytest.mark.parametrize(("recompute", "forward"), [("cheap", 1 / 3), ("block", 1 / 4)])
def test_a_blocks_seconds_are_its_share_of_a_steps(recompute, forward):
    c, work = MODELS["llama-7b"], Work(4000, 3000, 0, 0, 2)
    ahead, back = block_seconds(c, work, recompute, 1.0)
    head = 6 * 3000 * c.dim * c.vocab_size / gemm_flops(c, work, recompute)
    assert 64 * (ahead + back) == pytest.approx(1 - head) and ahead == pytest.approx(forward * (ahead + back))


@pytest.mark.parametrize("card", ["A100-80", "L40S"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_step_waits_for_what_is_not_hidden(card, offload, replicas):
    flags = ["--optimizer-states", "8bit", "--gpus", 8, "--gpu", card, *["--offload-optimizer"] * offload]
    flags += ["--replicas", replicas, "--global-batch-size", 512, "--micro-batch-size", 32]
    found = found_of(*flags)
    projection, seconds, mix = found["projection"], found["projection"].seconds, found["mix"]
    c, shards = MODELS["llama-7b"], 8 // replicas
    sent, summed = sent_bytes(c, torch.bfloat16, shards), summed_bytes(c, torch.bfloat16, shards, replicas)
    assert projection.work.micro_batches == 2 and projection.communication_bytes == 2 * sent + summed
    link = {"A100-80": 0.8 * 300e9, "L40S": 0.8 * 25e9}[card]
    assert projection.communication_s == pytest.approx((2 * sent + summed) / link)
    computing = sum(seconds[k] for k in ("gemm", "attention", "memory", "host"))
    assert projection.block_s == block_seconds(c, projection.work, "cheap", computing)
    assert seconds["communication"] == sum(projection.late.values()) > 0
    assert (projection.late["backward"] == projection.late["forward"] == 0) == (card == "A100-80")
    assert seconds["total"] == pytest.approx(
        computing + sum(seconds[k] for k in ("communication", "update", "offload"))
    )
    assert (seconds["offload"] > 0) == offload
    state = state_bytes(c, torch.bfloat16, "split", "8bit")
    assert shards * seconds["update"] * 0.81 * 1e9 * found["card"].bandwidth_gb_per_s == pytest.approx(
        update_bytes(*state[:3], "split") + state[0], rel=0.001
    )
    assert projection.tokens_per_s == 8 * mix.logical / seconds["total"]
    assert projection.mfu == pytest.approx(
        projection.tokens_per_s * 6 * c.n_parameters / (8e12 * found["card"].peak_tflops)
    )
    assert projection.steps == 3 * 102 and projection.total_s == seconds["total"] * (3 * 52002 / 512)
    assert projection.dollars == pytest.approx(8 * found["card"].price_per_hour * projection.total_s / 3600)


def test_links():
    """Over NVLink where a card has it, else over PCIe; more than 8 through their machines' ports."""
    reach = {name: [card.bus_bytes_per_s(n) / 1e9 for n in (2, 8, 16)] for name, card in CARDS.items()}
    assert reach["A100-80"] == reach["A100-40"] == [240, 240, 240]
    assert reach["H100"] == reach["H200"] == [360, 360, 320] and reach["B200"] == [720, 720, 320]
    assert reach["L40S"] == reach["RTX-4090"] == [20, 20, 20] and reach["RTX-5090"] == [40, 40, 40]


def test_links_of_replicas():
    """Shards of a replica within a machine meet there; sums over machines go by ports of those with a shard."""
    card = CARDS["H100"]
    assert [card.bus_bytes_per_s(s, r) / 1e9 for s, r in ((8, 8), (2, 32), (1, 64), (16, 4))] == [360, 360, 360, 320]
    assert [card.sum_bytes_per_s(s, r) / 1e9 for s, r in ((8, 8), (4, 4), (2, 8), (1, 64), (16, 4))] == [
        40,
        80,
        160,
        320,
        40,
    ]
    assert [card.sum_bytes_per_s(s, 8 // s) / 1e9 for s in (1, 2, 4)] == [360, 360, 360]
    assert card.bus_bytes_per_s(12) == 0.8 * 200e9 and card.bus_bytes_per_s(6, 2) == 0.8 * 100e9  # four, two a machine
    apart = {
        (s, r): traffic(TINY, card, torch.bfloat16, s, r).apart for s, r in ((8, 1), (4, 2), (8, 2), (2, 8), (16, 2))
    }
    assert apart == {(8, 1): False, (4, 2): False, (8, 2): True, (2, 8): True, (16, 2): False}


# ---- replicas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("gib", [12, 24, 40, 60, 80, 140])
def test_replicas_are_for_steps_of_several_micro_batches(states, gib):
    """One replica where that makes one; else the most that need no more of them."""
    c, ways = MODELS["llama-7b"], {"loss_share": 0.7, "most_tokens": 9000, "states": states}
    fits = {r: largest_micro_batch(c, gib * GIB, cards=8 // r, replicas=r, **ways) for r in (1, 2, 4, 8)}
    for share in (600, 2000, 5000, 20000, 200_000):
        replicas, tokens = layout_that_fits(c, gib * GIB, 8, share_tokens=share, least_tokens=512, **ways)
        assert tokens == fits[replicas]
        batches = {r: math.ceil(share / fits[r]) for r in fits if fits[r] >= 512}
        most = max((r for r in batches if batches[r] <= batches.get(1, 0)), default=1)
        assert replicas == (1 if batches.get(1, 1) == 1 else most)
    at = {"share_tokens": 600, "least_tokens": 512, **ways}
    allowed = [layout_that_fits(c, gib * GIB, 8, counts=counts, **at)[0] for counts in ([8], [4, 2], [1])]
    assert allowed[0] == 1 and allowed[1] in (2, 4) and allowed[2] == 8
    with pytest.raises(ValueError, match="layout: 8 cards, wanted a multiple of one of 3, 5 shards"):
        layout_that_fits(c, gib * GIB, 8, counts=[3, 5], **at)


def test_replicas_by_the_room_there_is():
    layouts = [
        (found["setting"]["cards"], found["setting"]["replicas"])
        for found in (
            found_of("--gpus", 8, "--gpu", gpu, "--model", model, *rest)
            for gpu, model, *rest in (
                ("H100", "tinyllama-1.1b"), ("H100", "tinyllama-1.1b", "--global-batch-size", 4096),
                ("4090", "llama-7b"), ("H100", "llama-7b", "--replicas", 2),
                ("H100", "llama-13b", "--optimizer-states", "8bit"),
            )
        )
    ]  # fmt: skip
    assert layouts[:2] == [(8, 1), (1, 8)] and layouts[2][0] > 1 and layouts[3:] == [(4, 2), (8, 1)]
    few = found_of("--gpus", 64, "--gpu", "H100", "--replicas", 64, "--model", "tinyllama-1.1b")["projection"]
    assert few.traffic.gather == few.traffic.reduce == (0, 0) and few.traffic.sum[0] > 0
    many = ("--gpus", 64, "--global-batch-size", 4096, "--micro-batch-size", 16)
    far, near = (found_of(*many, "--replicas", r)["projection"] for r in (1, 8))
    assert near.work.micro_batches == 4 and near.traffic.apart and not far.traffic.apart
    assert near.seconds["communication"] < far.seconds["communication"]


def test_states_in_blocks_are_not_cut(capsys, monkeypatch):
    """Those of 8 bits: --replicas that would are refused, and they are not proposed over so many shards. 7B and 13B are
    of whole blocks, vectors apart, whose states are not in blocks."""
    many = ("--gpus", 64, "--replicas", 1, "--optimizer-states", "8bit")
    assert run(*many) == run(*many, "--model", "llama-13b") == 0
    assert run(*many, "--model", "smollm2-135m") == 2  # 9 rows of 576
    assert "8bit over 64 shards would cut a block of 256 elements; wanted --replicas 4 or 8" in capsys.readouterr().err
    tight = ("--gpus", 8, "--replicas", 1, "--gpu-memory", 24, "--model", "llama-13b")

    def proposed():
        return {setting["states"] for _, setting, *_ in found_of(*tight)["alternatives"]}

    assert "8bit" in proposed()
    monkeypatch.setattr("engine.estimate.shards_of_8bit", lambda c: [1, 2, 4])
    assert proposed() and "8bit" not in proposed()


def test_the_page_of_ranks_is_what_the_estimate_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["render_ranks", "--check"])
    render_ranks.main()
    page = render_ranks.DOC.read_text()
    assert page.count("### 8 x ") == 8 and "Everything here is projected" in page
    monkeypatch.setattr(render_ranks, "page", lambda: page + "more")
    with pytest.raises(SystemExit, match=r"docs/ranks.md is not what the estimate says; run python -m scripts"):
        render_ranks.main()


# ---- the host's memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("states", "cards"), [("fp32", 1), ("8bit", 2)])
def test_the_copy_of_a_state_takes_the_memory_that_was_planned(states, cards, monkeypatch):
    """As its arenas are asked for, with tensors smaller and larger than one."""
    monkeypatch.setattr("engine.output.tensor_rows.COPY_ARENA_BYTES", 1 << 16)
    monkeypatch.setattr("engine.planning.memory.COPY_ARENA_BYTES", 1 << 16)
    copy_bytes.cache_clear()
    c, asked = ModelConfig(**SMALL | {"dim": 96, "vocab_size": 2000}), []
    model = new_model(c, "cpu", torch.bfloat16, "ref")
    held = {name: shard_of(p, cards) for name, p in model.named_parameters()}
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
    monkeypatch.setattr("engine.planning.memory.COPY_ARENA_BYTES", 1 << 16)
    assert len(asked) > 4 and copy_bytes(c, torch.bfloat16, "split", states, cards) == sum(asked)
    copy_bytes.cache_clear()


def test_a_run_that_saves_needs_the_hosts_memory(tmp_path, capsys):
    path = tmp_path / "found.json"
    state = sum(state_bytes(MODELS["llama-7b"], torch.bfloat16, "split", "fp32", 4)[:3])
    flags = ("--gpus", 8, "--replicas", 2, "--json", path)
    assert run(*flags) == 0
    assert "On the host" not in capsys.readouterr().out and strict_json(path)["memory_bytes"]["host_copy"] == 0
    assert run(*flags, "--save-every", 100, "--offload-optimizer") == 0
    found, out = strict_json(path), " ".join(capsys.readouterr().out.split())
    used = found["memory_bytes"]
    assert state <= used["host_copy"] < 1.3 * state
    assert found["host_bytes_of_a_machine"] == 8 * used["host"] + 4 * used["host_copy"]  # one replica's are saved
    assert f"{used['host_copy'] / 1e9:.2f} GB a card for the copy of a state that is saved; " in out
    assert f"{found['host_bytes_of_a_machine'] / 1e9:.2f} GB in a machine" in out
    assert run("--gpus", 16, "--replicas", 1, "--save-every", "epoch", "--json", path) == 0
    found = strict_json(path)
    assert found["host_bytes_of_a_machine"] == 8 * found["memory_bytes"]["host_copy"] > 0


def test_a_run_has_one_card():
    assert setting_of(FinetuneConfig(model="llama-7b", random_init=True, data=("x",)), torch.bfloat16)["cards"] == 1
    assert setting_of(EstimateConfig(model="llama-7b", gpus=4), torch.bfloat16)["cards"] == 4
    setting = setting_of(EstimateConfig(model="llama-7b", gpus=8, replicas=2), torch.bfloat16)
    assert (setting["cards"], setting["replicas"]) == (4, 2)


@pytest.mark.parametrize(("card", "model"), [("A100-80", "llama-13b"), ("H100", "llama-7b"), ("4090", "llama-7b")])
@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_several_cards_print_and_say_that_they_are_projected(card, model, gpus, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert run("--model", model, "--gpu", card, "--gpus", gpus, "--json", path) == 0
    out, found = capsys.readouterr().out, strict_json(path)
    label = "projected: no run on several cards was measured; sharded by FSDP2, a block at a time"
    label += "; a step's tokens shared out evenly"
    assert " ".join(out.split()).startswith(label) and found["label"].startswith(label) and found["cards"] == gpus
    assert ("; machines of 8, joined by 400 Gb/s a card" in " ".join(out.split())) == (gpus > 8)
    shards, replicas = found["shards"], found["replicas"]
    assert f"on each of {gpus} {found['card']['name']}" in out and "\n  gathered  " in out
    layout = f"{replicas} replicas of {shards} shards" if replicas > 1 else f"sharded over {gpus}"
    assert shards * replicas == gpus and f", {layout} kind" in " ".join(out.split())
    assert f"bfloat16, 1/{shards} of them" in out and f"{found['memory_bytes']['gathered'] / 1e9:.2f}" in out
    assert ("bfloat16, and fp32 to be summed" in out) == (replicas > 1)
    assert max(len(line.partition("  --")[0]) for line in out.splitlines()) <= 80
    if not found["fits"]:
        assert "What fits, " in out and found["alternatives"]
        assert not any("--optimizer-in-backward" in flag for way in found["alternatives"] for flag in way["flags"])
        assert all(way["fits"] and way["communication_bytes"] for way in found["alternatives"])
        assert "GB a card on the host)" in out
        return
    late = found["step_s"]["communication"]
    gbs = f"{found['communication_bytes'] / 1e9:,.0f} GB"
    assert f"{1e3 * late:.1f}  not hidden of {1e3 * found['communication_s']:,.0f} ms, {gbs}" in out
    assert late == pytest.approx(sum(found["not_hidden_s"].values()))
    sent = found["collectives"]
    assert sum(sent["bytes"].values()) == found["communication_bytes"] and sent["layers"] == MODELS[model].n_layers
    for kind, name in COLLECTIVES.items():
        blocks = sent["layers"] - (kind == "gather_backward")
        row = rf"{name} +{sent['bytes'][kind] / 1e9:.1f} +{1e3 * sent['seconds'][kind]:.1f} +{blocks} of "
        assert bool(re.search(row, out)) == (sent["bytes"][kind] > 0)
    assert f"{128 // gpus} examples a card of Alpaca" in out and f"at {gpus} x $" in out


def test_nothing_fits_on_several_cards(capsys):
    assert run("--gpu", "4090", "--gpus", 2, "--gpu-memory", 3) == 0
    assert "GB a card are the least that any setting takes" in capsys.readouterr().out


def test_measured_steps_are_one_cards(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine.planning.cards.BENCHMARKS", tmp_path)
    write_report(tmp_path / "h100.json", MACHINE | CEILINGS | {"step": {"records": [STEP]}})
    assert run("--optimizer-states", "8bit", "--gpus", 2) == 0 and "measured in" not in capsys.readouterr().out


# ---- the command line -----------------------------------------------------------------------------------------------

FIRST = {"model": "llama-7b"}


def run(*flags):
    """(exit code, found) of the command in this process."""
    argv = list(map(str, flags))
    return exit_code_of(main, argv)


def strict_json(path):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("card", CARDS)
def test_every_card_and_model_prints(card, capsys):
    for model in MODELS:
        assert run("--model", model, "--gpu", card) == 0
        out = capsys.readouterr().out
        assert f"on one {card}" in out and "total" in out and ("tokens/s" in out or "Nothing fits" in out)
        assert max(len(line.partition("  --")[0]) for line in out.splitlines()) <= 80


def test_flags_are_engine_finetunes():
    theirs = {field.name: field for field in dataclasses.fields(FinetuneConfig)}
    assert len(SHARED) > 15
    for field in dataclasses.fields(EstimateConfig):
        if field.name in SHARED and field.name != "model":
            assert field.default == theirs[field.name].default and field.metadata == theirs[field.name].metadata
            assert field.type == theirs[field.name].type


def test_help_is_complete():
    text = command("engine.estimate", "--help").stdout
    assert text.startswith("usage: python -m engine.estimate")
    for field in dataclasses.fields(EstimateConfig):
        assert f"  --{field.name.replace('_', '-')}" in text and field.metadata["help"] in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("--modle x", "unknown flag --modle; did you mean --model?"),
        ("--gpu H10", "did you mean H100?"),
        ("--gpu abacus", "of another card give --gpu-memory"),
        ("--gpus 0", "--gpus is 0, wanted 1 to 64"),
        ("--gpus 65", "--gpus is 65, wanted 1 to 64"),
        (
            "--gpus 3",
            "--global-batch-size 128 is not divisible by --gpus 3: every card takes the same number; pass 126 ",
        ),
        ("--gpus 8 --global-batch-size 4", "not divisible by --gpus 8: every card takes the same number; pass 8\n"),
        ("--gpus 8 --optimizer-in-backward --grad-clip 0", "with --gpus 8 is not projected: each card holds a part"),
        ("--gpus 8 --replicas 3", "--replicas 3 of --gpus 8; wanted one of 1, 2, 4, 8"),
        ("--replicas 2", "--replicas 2 of --gpus 1; wanted one of 1"),
        ("--model lama-7b", "did you mean llama-7b?"),
        ("--micro-batch-tokens 100", "an example must fit one forward"),
        ("--optimizer-in-backward", "pass --grad-clip 0"),
        ("--epochs 0", "--epochs is 0, wanted 1 or more"),
        ("--price-per-hour -1", "--price-per-hour is -1.0, wanted 0 or more"),
        ("--gpu-memory nan", "--gpu-memory is nan, wanted more than 0"),
        ("--max-length 4096", "--max-length 4096 is over the model's 2048 positions"),
        ("--json /nowhere/x.json", "--json /nowhere/x.json: cannot be written"),
    ],
)
def test_what_is_refused_exits_with_2(text, problem, capsys):
    try:
        code = run(*text.split())
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and problem in capsys.readouterr().err


def test_json_says_what_is_printed(tmp_path, capsys):
    path = tmp_path / "found.json"
    assert run("--model", "llama-7b", "--gpu", "rtx 4090", "--json", path) == 0
    found, out = strict_json(path), capsys.readouterr().out
    assert not found["fits"] and "does not fit" in out and "Nothing fits" in out and found["alternatives"] == []
    assert run("--json", path, "--price-per-hour", 3.6) == 0
    found, out = strict_json(path), capsys.readouterr().out
    kinds = found["memory_bytes"]
    total = kinds["total"] - max(kinds["head"], kinds["backward"])
    assert total == sum(kinds[k] for k in ("weights", "master", "states", "gradients", "activations", "overhead"))
    assert f"{kinds['total'] / 1e9:.2f}" in out and not found["fits"] and found["source"] == "projected"
    assert found["alternatives"][0]["flags"] == ["--optimizer-states 8bit"] and found["alternatives"][0]["fits"]
    first = found["alternatives"][0]
    assert first["dollars"] == pytest.approx(first["total_s"] / 1000)
    assert f"{first['tokens_per_s']:,.0f}" in out and f"${first['dollars']:.2f}" in out
    assert sum(v for k, v in first["step_s"].items() if k != "total") == pytest.approx(first["step_s"]["total"])


def test_another_card_by_its_figures(tmp_path, capsys):
    path = tmp_path / "found.json"
    card = ("--gpu-memory", 48, "--gpu-tflops", 100, "--gpu-bandwidth", 500)
    assert run("--model", "tinyllama-1.1b", *card, "--json", path) == 0
    found, out = strict_json(path), capsys.readouterr().out
    assert found["memory_bytes"]["room"] == 48 * GIB and found["dollars"] is None and "pass --price-per-hour" in out


def test_the_data_of_a_file(rows_file, smollm2, capsys):
    assert run("--model", smollm2, "--data", rows_file, "--gpu", "4090", "--global-batch-size", 8) == 0
    assert "8 examples of 24 examples of --data" in capsys.readouterr().out
    assert run("--model", "llama-7b", "--data", rows_file, "--gpu", "H200") == 0
    assert "24 rows, of Alpaca's lengths for want of a tokenizer" in capsys.readouterr().out
    assert run("--model", "smollm2-135m", "--data", "nowhere.json") == 3


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_on_a_terminal_keep_to_its_width(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    show(
        "A title",
        ("GB", "with"),
        [("1.50", "--optimizer-states 8bit --recompute block " * 2), ("12.00", "b")],
        terminal,
    )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert lines[0].strip() == "A title" and max(map(len, lines)) <= width
    assert any(line.startswith("12.00  b") for line in lines) and any(line.startswith(" 1.50  --") for line in lines)
    plain = io.StringIO()
    show("A title", ("GB", "with"), [("1.50", "a"), ("12.00", "b")], plain)
    assert plain.getvalue() == "A title\n     GB  with\n   1.50  a\n  12.00  b\n\n"
