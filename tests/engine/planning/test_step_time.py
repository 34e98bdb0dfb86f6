"""The seconds of a step, and what GPUs send each other: by hand, and as FSDP2 does."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine.model.adapter import AdapterConfig, list_updates
from engine.model.config import MODELS, ModelConfig
from engine.planning.cards import BENCHMARKS, CARDS, find_rates
from engine.planning.setting import Setting
from engine.planning.step_time import (
    COMPUTING,
    KERNEL_SHARE,
    UPDATE_INSTRUCTIONS,
    Traffic,
    Work,
    block_seconds,
    bytes_of_update,
    crossing_bytes,
    flops_per_token,
    gemm_flops,
    host_update_bytes,
    host_update_seconds,
    step_seconds,
    step_traffic,
    update_seconds,
)
from engine.planning.weights import StateBytes, state_bytes, whole_bytes
from kernels.ops.adamw import adamw_state, states_of
from tests.helpers.planning import SHAPES, SMALL, TINY, sharded_model


def test_adamw_moves_what_its_table_says():
    doc, c = sys.modules["kernels.ops.adamw"].__doc__, MODELS["llama-7b"]
    table = re.findall(r'^    (fp32 p|"\w+") +(\d+) +(\d+) +([\d.]+) ', doc, re.M)
    assert len(table) == 4
    for name, *wanted in table:
        dtype = torch.float32 if name == "fp32 p" else torch.bfloat16
        master = "split" if name == "fp32 p" else name.strip('"')
        for states, moved in zip(("fp32", "bf16", "8bit"), wanted, strict=True):
            state = state_bytes(c, Setting(dtype, master, states))
            gradients = c.n_parameters * (dtype.itemsize - 2)  # the table's are bf16
            found = (bytes_of_update(state, master) - gradients) / c.n_parameters
            assert found == pytest.approx(float(moved), abs=0.05), (name, states)


def test_weights_without_a_master_are_read_too():
    """A master is what is read in place of the weights. In fp32 the weights are their own, whatever the flag says."""
    found = {master: bytes_of_update(StateBytes(100, 100, master, 200, 0), "fp32") for master in (0, 400)}
    assert found == {0: 3 * 100 + 2 * 200, 400: 2 * 100 + 2 * (400 + 200)}


@pytest.mark.parametrize(("adapter", "passes"), [(None, 4), (AdapterConfig(r=1, targets=("q_proj",)), 2)])
@pytest.mark.parametrize("again", [0, 1])
def test_products_of_few_tokens_take_as_long_as_the_weights_are_read(adapter, passes, again):
    """Twice a micro-batch, three times where blocks are computed again; gradients, of weights that are trained, once
    read and once written."""
    c, card = MODELS["llama-7b"], CARDS["H100"]
    setting, rates = Setting(adapter=adapter, recompute="block" if again else "cheap"), find_rates(card)
    found = step_seconds(c, card, rates, Work(1, 1, 1, 1, 3), setting, update_s=0.0)["gemm"]
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 4096 * 32000
    assert found == pytest.approx(3 * (passes + again) * 2 * weights / rates.copy_bytes_per_s)


def test_a_frozen_weight_counts_four_operations_and_a_trained_one_six():
    c, adapter = MODELS["tinyllama-1.1b"], AdapterConfig(r=4)
    n_trained = sum(u.rank * (u.rows + u.columns) for u in list_updates(c, adapter))
    assert flops_per_token(c) == 6 * c.n_parameters
    assert flops_per_token(c, adapter) == 4 * c.n_parameters + 6 * n_trained


def test_launches_cost_time_only_where_computing_does_not_hide_them():
    c, card = MODELS["tiny"], CARDS["H100"]
    large, small = (
        step_seconds(c, card, find_rates(card), Work(n, n, 100 * n, 100 * n, 1), Setting(), update_s=0.0)
        for n in (10_000_000, 1)
    )
    assert large["host"] == 0 < small["host"]
    assert small["total"] == pytest.approx((2 + 2) * 45 * 8e-6)


@pytest.mark.parametrize(("shards", "replicas"), [(8, 1), (4, 4), (2, 32), (16, 4), (1, 8)])
def test_sums_over_replicas_go_over_links_of_their_own(shards, replicas):
    card = CARDS["H100"]
    sent = step_traffic(MODELS["tiny"], card, Setting(shards=shards, replicas=replicas))
    rates = card.bus_bytes_per_s(shards, replicas), card.sum_bytes_per_s(shards, replicas)
    assert (sent.bytes_per_s, sent.sum_bytes_per_s) == rates


@pytest.mark.parametrize("recompute", ["cheap", "block"])
def test_attention_takes_its_operations_at_its_share_of_the_rate(recompute):
    """4 operations a pair in forward, twice where blocks are computed again, 14 in backward; the last layer alone has
    only the queries with a loss. Each query multiplies 100 keys that it does not see."""
    c, card = MODELS["llama-7b"], CARDS["H100"]
    work, rates = Work(1000, 400, 50_000, 30_000, 2), find_rates(card)
    found = step_seconds(c, card, rates, work, Setting(recompute=recompute), update_s=0.0)["attention"]
    pairs = 31 * (50_000 + 100 * 1000) + 30_000 + 100 * 400
    operations = (22 if recompute == "block" else 18) * pairs * 4096
    assert found == pytest.approx(operations / (0.4 * rates.gemm_flops_per_s))


def test_an_update_on_the_cpu_is_bound_by_the_hosts_memory_or_by_the_bus():
    """Gradients that come in backward are not part of it; those of several GPUs, which share the memory, are."""
    c = MODELS["llama-7b"]
    n, card = c.n_parameters, CARDS["RTX-4090"]
    wide = dataclasses.replace(card, host_gb_per_s=10_000)
    for states, moved in (("fp32", 26), ("bf16", 18)):
        setting = Setting(states=states, offload=True, on_cpu=True)
        state = state_bytes(c, setting)
        assert host_update_bytes(state, setting) == (moved + 2) * n and crossing_bytes(state, setting) == 2 * n
        assert host_update_seconds(card, state, setting) == (moved + 2) * n / 60e9
        assert host_update_seconds(wide, state, setting) == 2 * n / 25e9
        norm_s = 2 * n / (0.9 * find_rates(card).copy_bytes_per_s)
        assert update_seconds(card, find_rates(card), state, setting) == norm_s + (moved + 2) * n / 60e9
        of_two = dataclasses.replace(setting, shards=2)
        half = state_bytes(c, of_two)
        assert host_update_seconds(card, half, of_two) == pytest.approx((moved + 4) * n / 60e9, rel=1e-3)
        visiting = dataclasses.replace(setting, on_cpu=False)
        assert crossing_bytes(state, visiting) == state.master + state.states
        assert update_seconds(card, find_rates(card), state, visiting) < 0.25
    assert crossing_bytes(state, Setting(on_cpu=True)) == 0


def test_what_leaves_in_backward_takes_time_only_where_backward_is_shorter():
    c, setting = MODELS["llama-7b"], Setting(offload=True, on_cpu=True, recompute="block")
    bus_s = 2 * c.n_parameters / 25e9
    for micro_batches, tokens in ((1, 16000), (8, 16000), (4, 400)):
        work = Work(tokens, 0.7 * tokens, 0, 0, micro_batches)
        card = CARDS["RTX-4090"]
        seconds = step_seconds(c, card, find_rates(card), work, setting, update_s=0.1, offload_bytes=2 * c.n_parameters)
        blocks = block_seconds(c, work, setting, sum(seconds[k] for k in COMPUTING))
        assert seconds["offload"] == pytest.approx(micro_batches * max(0, bus_s - 32 * blocks[1]), rel=1e-6)
        assert (seconds["offload"] > 0) == (tokens == 400)


def test_an_update_takes_as_long_as_its_bytes_or_its_instructions():
    """Instructions are those of the largest record for many tensors, in which a thread updates BLOCK / threads."""
    for states, wanted in UPDATE_INSTRUCTIONS.items():
        case = f"split, states {states}, many tensors"
        records = [
            r
            for r in json.loads((BENCHMARKS / "static.json").read_text())["records"]
            if (r["case"], r["chip"]) == (case, "sm_90")
        ]
        each = [r["instructions"] * 32 * r["num_warps"] / r["tile"]["BLOCK"] for r in records]
        assert len(each) == 2 and wanted == pytest.approx(max(each), abs=0.05)
    card = CARDS["H200"]
    slow, speed = dataclasses.replace(card, sms=13), find_rates(card)
    setting = Setting(states="8bit")
    state = state_bytes(MODELS["llama-7b"], setting)
    n, bytes_per_s = MODELS["llama-7b"].n_parameters, 0.9 * speed.copy_bytes_per_s
    norm_s = 2 * n / bytes_per_s
    assert update_seconds(card, speed, state, setting) == pytest.approx(norm_s + 14 * n / bytes_per_s, rel=0.02)
    assert update_seconds(slow, speed, state, setting) == pytest.approx(
        norm_s + UPDATE_INSTRUCTIONS["8bit"] * n / (13 * 128 * 1.83e9)
    )


@pytest.mark.parametrize(
    ("recompute", "x", "h", "heads"), [("cheap", 18, 9, 10), ("block", 26, 12, 14), ("none", 16, 8, 10)]
)
def test_the_bytes_of_row_wise_kernels_worked_out_by_hand(recompute, x, h, heads):
    """Forward moves 8 rows of dim, 3 of hidden_dim, 4 of the heads; backward 10, 6 and 6, fewer where more is kept."""
    c, speed = MODELS["llama-7b"], find_rates(CARDS["H100"])
    work = Work(4000, 3000, 0, 0, 2)
    found = step_seconds(c, CARDS["H100"], speed, work, Setting(recompute=recompute), update_s=0.1)
    rows = 31 * 4000 + 3000
    numbers = rows * (x * 4096 + h * 11008 + heads * 2 * 4096) + 2 * 3000 * 32000 + 4 * 4000 * 4096
    numbers += 2 * 3 * 32000 * 4096  # the embedding's gradient, a micro-batch
    assert found["memory"] == pytest.approx(2 * numbers / (KERNEL_SHARE * speed.copy_bytes_per_s))


@pytest.mark.parametrize(("recompute", "forward"), [("cheap", 1 / 3), ("block", 1 / 4)])
def test_a_blocks_seconds_are_its_share_of_a_steps(recompute, forward):
    c, work = MODELS["llama-7b"], Work(4000, 3000, 0, 0, 2)
    ahead, back = block_seconds(c, work, Setting(recompute=recompute), 1.0)
    head = 6 * 3000 * c.dim * c.vocab_size / gemm_flops(c, work, recompute)
    assert 64 * (ahead + back) == pytest.approx(1 - head) and ahead == pytest.approx(forward * (ahead + back))


def test_waits_are_those_worked_out_by_hand():
    """Three blocks and two micro-batches at 1 byte/s, sums at 2. A block computes 4 s forward and 25 s backward."""
    sent = Traffic(3, (10, 4), (20, 8), (6, 3), 1.0, 2.0, apart=False)
    assert sent.step_bytes(2) == {"gather_forward": 68, "gather_backward": 40, "reduce": 136, "sum": 21}
    assert sent.seconds(2) == {"gather_forward": 68, "gather_backward": 40, "reduce": 136, "sum": 10.5}
    assert sent.backward_seconds(False) == [20, 30, 10] and sent.backward_seconds(True) == [23, 33, 10]
    late = sent.not_hidden_seconds(2, 4.0, 25.0)
    assert late == {"begin": 2 * 14, "forward": 4 * 6, "backward": 5 + 8, "end": 28 + 28 + 3 + 1.5}
    late = dataclasses.replace(sent, apart=True).not_hidden_seconds(2, 4.0, 25.0)  # beside reductions, but for the last
    assert late == {"begin": 2 * 14, "forward": 4 * 6, "backward": 5 + 5, "end": 28 + 28 + 1.5}
    assert sent.not_hidden_seconds(2, 10.0, 33.0) == {"begin": 28, "forward": 0, "backward": 0, "end": 60.5}
    assert dataclasses.replace(sent, layers=1).not_hidden_seconds(1, 0.0, 0.0)["backward"] == 0


def sent(c, dtype, shards, replicas=1):
    """Return the bytes that a GPU sends for a micro-batch, and for the sums over replicas."""
    kinds = step_traffic(c, CARDS["H100"], Setting(dtype, shards=shards, replicas=replicas)).step_bytes(1)
    return kinds["gather_forward"] + kinds["gather_backward"] + kinds["reduce"], kinds["sum"]


def test_bytes_sent_are_those_worked_out_by_hand():
    """Four GPUs, each with 3 of the embedding's 10 rows. A block: two norms of 8, 16, 8 and 24 rows of 8, 8 of 12."""
    block, embedding = 2 * (8 + 8 + 16 * 8 + 8 * 8 + 24 * 8 + 8 * 12), 2 * 12 * 8
    whole = 2 * block + 2 * embedding + 2 * 8
    found = whole_bytes(TINY, torch.bfloat16, 4)
    assert (found.block, found.others) == (block, 2 * embedding + 16)
    assert sent(TINY, torch.bfloat16, 4)[0] == (3 * whole + block) * 3 / 4
    assert sent(TINY, torch.float32, 4)[0] == 2 * (2 * whole + block) * 3 / 4
    assert sent(TINY, torch.bfloat16, 1)[0] == sent(TINY, torch.bfloat16, 4, 1)[1] == 0
    for dtype in (torch.float32, torch.bfloat16):  # each collective is rounded down by itself, two blocks and the rest
        assert 0 <= 2 * 2 * whole // 4 * 2 // 3 - sent(TINY, dtype, 4, 3)[1] < 3
    tied = dataclasses.replace(TINY, tied=True)
    assert sent(tied, torch.bfloat16, 4)[0] == (3 * (whole - embedding) + block) * 3 / 4


def test_sums_are_beside_gathers_where_replicas_lie_in_machines_of_their_own():
    meshes = ((8, 1), (4, 2), (8, 2), (2, 8), (16, 2))
    apart = {
        mesh: step_traffic(TINY, CARDS["H100"], Setting(shards=mesh[0], replicas=mesh[1])).apart for mesh in meshes
    }
    assert apart == {(8, 1): False, (4, 2): False, (8, 2): True, (2, 8): True, (16, 2): False}


LORA = AdapterConfig(r=4)
PATTERNED = AdapterConfig(r=4, rank_pattern=(("v_proj", 3),), saved=("embed_tokens",))
QLORA = AdapterConfig(r=4, nf4_base=True)


class Sent(TorchDispatchMode):
    """Counts the bytes of the whole tensors in each collective: gathered, scattered, or summed over replicas."""

    def __init__(self):
        super().__init__()
        self.bytes = {"_allgather_base_": 0, "_reduce_scatter_base_": 0, "allreduce_": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.bytes:
            self.bytes[name] += max(t.nbytes for t in tree_iter(args) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("fake_ranks", "replicas"), [(2, 1), (7, 1), (4, 2), (6, 2), (6, 3), (3, 3)], indirect=["fake_ranks"]
)
@pytest.mark.parametrize(
    ("shape", "recompute", "adapter"),
    [
        *[(shape, recompute, None) for shape in ("grouped queries", "tied") for recompute in ("cheap", "block")],
        *[("grouped queries", "cheap", adapter) for adapter in (LORA, PATTERNED, QLORA)],
    ],
)
def test_shards_and_bytes_sent_are_fsdp2s(shape, recompute, adapter, fake_ranks, replicas):
    c, shards = ModelConfig(**SMALL | SHAPES[shape]), fake_ranks // replicas
    model, step = sharded_model(c, torch.bfloat16, replicas, shards, recompute, adapter)
    held = [p.to_local() for p in model.parameters()]
    trained = [p.to_local() for p in model.trained_parameters().values()]
    states = [adamw_state(t, "split", states_of(t, "8bit")).tensors() for t in trained]
    setting = Setting(states="8bit", shards=shards, replicas=replicas, adapter=adapter)
    found = state_bytes(c, setting)
    assert sum(t.nbytes for t in (*held, *model.buffers())) == found.weights
    assert sum(t.nbytes for state in states for t in state.values()) == found.master + found.states
    with Sent() as sent:
        step()
    gathered, reduced, summed = sent.bytes.values()
    traffic = step_traffic(c, CARDS["H100"], setting).step_bytes(2)
    assert (traffic["gather_forward"] + traffic["gather_backward"]) * shards == gathered * (shards - 1)
    assert traffic["reduce"] * shards == reduced * (shards - 1)
    rounded = summed * 2 * (replicas - 1) - traffic["sum"] * replicas  # down to a byte, in each group
    assert 0 <= rounded < replicas * (c.n_layers + 1)
