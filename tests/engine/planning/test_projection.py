"""Speed, cost and mesh of whole runs."""

import dataclasses

import pytest

from engine.base.errors import UsageError
from engine.model.adapter import AdapterConfig
from engine.model.config import MODELS
from engine.planning.cards import find_rates
from engine.planning.memory import (
    CONTEXT_BYTES,
    PLAN_BYTES,
    activation_bytes,
    leaving_bytes,
    state_bytes,
    worst_moments,
)
from engine.planning.projection import project
from engine.planning.setting import Setting
from engine.planning.step_time import (
    COMPUTING,
    block_seconds,
    flops_per_token,
    step_seconds,
    step_traffic,
    update_seconds,
)
from engine.planning.workload import alpaca_mix
from tests.helpers.planning import estimate_of, recipe_of


def test_savings_of_memory_and_slower_cards_cost_speed():
    def projected(card="H100", **changes):
        return estimate_of(card, optimizer_states="8bit", **changes).outcome.projection

    plain = projected()
    assert projected(share_prefix=False).tokens_per_s < 0.9 * plain.tokens_per_s
    assert 0.7 < projected(recompute="block").tokens_per_s / plain.tokens_per_s < 0.85
    assert projected(offload_optimizer=True).tokens_per_s < plain.tokens_per_s
    assert projected(micro_batch_tokens=512).tokens_per_s < plain.tokens_per_s
    assert projected("A100-80").tokens_per_s < 0.5 * plain.tokens_per_s
    few = projected(max_steps=10)
    assert few.steps == 10 and few.total_s == 10 * plain.seconds["total"]
    assert 15000 < plain.tokens_per_s < 25000  # a projection of 22,000 and up would be over the design's target
    assert plain.tokens_per_s * plain.seconds["total"] / 128 == pytest.approx(127.2, rel=0.005)


def test_every_micro_batch_computes_the_shared_prefixes():
    whole, halves = (estimate_of("H100", optimizer_states="8bit", micro_batch_tokens=n) for n in (20000, 8000))
    for n, one in ((1, whole), (2, halves)):
        assert one.outcome.cut.micro_batches == n
        assert one.outcome.projection.work.tokens == one.mix.own + n * one.mix.prefix
    apart = estimate_of("H100", optimizer_states="8bit", micro_batch_tokens=512)  # never more than without sharing
    assert apart.outcome.projection.work.tokens <= apart.mix.logical
    tiny = estimate_of("H100", optimizer_states="8bit", micro_batch_tokens=128, max_length=128)
    assert tiny.mix.own + tiny.outcome.cut.micro_batches * tiny.mix.prefix > tiny.mix.logical
    assert tiny.outcome.projection.work.tokens == tiny.mix.logical


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize(("offload", "on_cpu"), [(False, True), (True, False), (True, True)])
def test_one_gpu_has_no_communication(states, recompute, offload, on_cpu, monkeypatch):
    """Bytes and seconds are exactly the sums of their kinds, without any of communication."""
    if not on_cpu:
        monkeypatch.setenv("CRIA_OPTIMIZER", "triton")
    leaves = offload and on_cpu
    changes = {"optimizer_states": states, "recompute": recompute, "offload_optimizer": offload}
    found, c = estimate_of(**changes, micro_batch_tokens=4096), MODELS["llama-7b"]
    outcome, card, batch = found.outcome, found.card, found.outcome.cut.largest
    setting = Setting(states=states, recompute=recompute, offload=offload, on_cpu=on_cpu)
    assert outcome.setting == setting
    state, moments, keeps = (f(c, setting, *more) for f, *more in (
        (state_bytes,), (worst_moments, batch), (activation_bytes, batch)
    ))  # fmt: skip
    of_states = 0 if leaves else 3 * state.largest if offload else state.master + state.states
    tensors = state.weights + (leaving_bytes(c, setting, False) if leaves else state.weights) + of_states + keeps
    tensors += batch.tokens * (8 + PLAN_BYTES) + 12 * batch.loss_rows
    tensors += max(moments.head, moments.backward, moments.embedding - keeps)
    assert outcome.memory.total == tensors + CONTEXT_BYTES + round(0.03 * tensors)
    on_host = offload * (state.master + state.states) + leaves * 2 * state.weights
    assert outcome.memory.host == on_host and outcome.memory.gathered == 0
    projection = outcome.projection
    seconds = step_seconds(
        c, card, find_rates(card), projection.work, setting,
        update_s=update_seconds(card, find_rates(card), state, setting),
        offload_bytes=state.weights if leaves else state.master + state.states if offload else 0,
    )  # fmt: skip
    assert projection.seconds == seconds and seconds["communication"] == 0 and projection.communication_bytes == 0
    assert seconds["total"] == sum(seconds[k] for k in ("gemm", "attention", "memory", "update", "host", "offload"))
    assert projection.tokens_per_s == alpaca_mix(recipe_of()).logical / seconds["total"]
    assert projection.dollars == projection.total_s / 3600 * card.price_per_hour
    assert projection.total_s == seconds["total"] * (3 * 52002 / 128)


# ---- several GPUs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ["A100-80", "L40S"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_step_waits_for_communication_that_is_not_hidden(card, offload, replicas):
    found = estimate_of(
        card, 8, optimizer_states="8bit", offload_optimizer=offload, replicas=replicas, global_batch_size=512,
        micro_batch_size=32,
    )  # fmt: skip
    projection, seconds, mix = found.outcome.projection, found.outcome.projection.seconds, found.mix
    c, shards = MODELS["llama-7b"], 8 // replicas
    sent = step_traffic(c, found.card, Setting(shards=shards, replicas=replicas)).step_bytes(2)
    assert projection.work.micro_batches == 2 and projection.communication_bytes == sum(sent.values())
    link = {"A100-80": 0.8 * 300e9, "L40S": 0.8 * 25e9}[card]
    assert projection.communication_s == pytest.approx(sum(sent.values()) / link)
    computing = sum(seconds[k] for k in COMPUTING)
    assert projection.block_s == block_seconds(c, projection.work, Setting(), computing)
    assert seconds["communication"] == sum(projection.not_hidden_seconds.values()) > 0
    assert (projection.not_hidden_seconds["backward"] == projection.not_hidden_seconds["forward"] == 0) == (
        card == "A100-80"
    )
    assert seconds["total"] == pytest.approx(
        computing + sum(seconds[k] for k in ("communication", "update", "offload"))
    )
    assert (seconds["offload"] > 0) == offload
    state = state_bytes(c, Setting(states="8bit"))
    whole = update_seconds(found.card, find_rates(found.card), state, Setting(states="8bit"))
    assert shards * seconds["update"] == pytest.approx(whole, rel=0.001)
    assert projection.tokens_per_s == 8 * mix.logical / seconds["total"]
    assert projection.mfu == pytest.approx(
        projection.work.tokens / seconds["total"] * 6 * c.n_parameters / (1e12 * found.card.peak_tflops)
    )
    assert projection.work.tokens < mix.logical
    assert projection.steps == 3 * 102 and projection.total_s == seconds["total"] * (3 * 52002 / 512)
    assert projection.dollars == pytest.approx(8 * found.card.price_per_hour * projection.total_s / 3600)


@pytest.mark.parametrize(
    ("card", "changes", "mesh"),
    [
        ("H100", {"model": "tinyllama-1.1b"}, (8, 1)),
        ("H100", {"model": "tinyllama-1.1b", "global_batch_size": 4096}, (1, 8)),
        ("H100", {"replicas": 2}, (4, 2)),
        ("H100", {"model": "llama-13b", "optimizer_states": "8bit"}, (8, 1)),
    ],
)
def test_replicas_are_chosen_by_memory_and_micro_batches(card, changes, mesh):
    setting = estimate_of(card, 8, **changes).outcome.setting
    assert (setting.shards, setting.replicas) == mesh


def test_states_are_chosen_for_the_replicas_that_are_asked_for():
    """Cards that each hold a whole model have no room for fp32 states, those that share one have."""
    auto = {"model": "llama3-8b", "optimizer_states": "auto", "micro_batch_tokens": 2048}
    whole, sharded = (estimate_of("H200", 8, replicas=r, **auto) for r in (8, 1))
    assert whole.fits and sharded.fits and sharded.outcome.setting.states == "fp32" != whole.outcome.setting.states


def test_the_share_of_the_peak_counts_what_an_adapter_computes():
    found, adapter = estimate_of("H100", optimizer_states="8bit"), AdapterConfig()
    setting = dataclasses.replace(found.outcome.setting, adapter=adapter)
    made = project(found.model, found.card, found.rates, found.mix, found.outcome.cut, found.recipe, setting)
    per_token = flops_per_token(found.model, adapter)
    assert made.mfu == pytest.approx(per_token * made.work.tokens / made.seconds["total"] / 989e12)
    assert per_token < 4.1 * found.model.n_parameters


def test_a_card_that_costs_nothing_has_a_price():
    found = estimate_of("H100", optimizer_states="8bit")
    args = found.model, dataclasses.replace(found.card, price_per_hour=0.0), found.rates, found.mix
    assert project(*args, found.outcome.cut, found.recipe, found.outcome.setting).dollars == 0.0


def test_a_model_that_fits_no_card_is_sharded():
    assert estimate_of("4090", 8).outcome.setting.shards > 1


def test_replicas_within_machines_communicate_less_across_them():
    plain = estimate_of("H100", 64, model="tinyllama-1.1b", replicas=64).outcome.projection.traffic
    assert plain.gather == plain.reduce == (0, 0) and plain.sum[0] > 0
    many = {"global_batch_size": 4096, "micro_batch_size": 16}
    far, near = (estimate_of("H100", 64, replicas=r, **many).outcome.projection for r in (1, 8))
    assert near.work.micro_batches == 4 and near.traffic.apart and not far.traffic.apart
    assert near.seconds["communication"] < far.seconds["communication"]


def test_blocks_of_8_bit_states_are_not_cut(monkeypatch):
    """--replicas that would cut 8-bit states are refused, and such states are not proposed over so many shards.

    Every matrix of 7B and 13B divides into 64 shards of whole blocks. Vectors have no 8-bit states.
    """
    many = {"replicas": 1, "optimizer_states": "8bit"}
    assert estimate_of("H100", 64, **many).outcome.setting.shards == 64
    assert estimate_of("H100", 64, model="llama-13b", **many).outcome.setting.shards == 64
    with pytest.raises(UsageError, match="over 64 shards would cut a block of 256 elements; wanted --replicas 4 or 8"):
        estimate_of("H100", 64, model="smollm2-135m", **many)  # 9 rows of 576

    def proposed():
        return {way.setting.states for way in estimate_of("4090", 8, replicas=1, model="llama-13b").alternatives}

    assert "8bit" in proposed()
    monkeypatch.setattr("engine.planning.projection.find_8bit_shard_counts", lambda c, **others: [1, 2, 4])
    assert proposed() and "8bit" not in proposed()
