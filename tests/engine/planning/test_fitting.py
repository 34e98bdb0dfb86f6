"""The largest micro-batch, the mesh and the cheapest savings that fit."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base.flags import parse_flags
from engine.model.adapter import AdapterConfig
from engine.model.config import MODELS
from engine.planning.cards import GIB
from engine.planning.fitting import (
    GOOD_TOKENS,
    SAVINGS,
    Limits,
    find_allowed_savings,
    find_cheapest_fits,
    find_largest_micro_batch,
    find_least_bytes,
    find_least_bytes_of_adapters,
    find_mesh_that_fits,
    find_shard_counts,
    find_uncut_counts,
    resolve_recompute,
    resolve_states,
)
from engine.planning.memory import BatchShape, memory
from engine.planning.setting import Setting
from engine.training.config import FinetuneConfig
from tests.helpers.planning import DTYPES

MODEL = MODELS["tinyllama-1.1b"]
one_card_settings = st.builds(
    Setting, st.sampled_from(list(DTYPES.values())), st.sampled_from(("split", "fp32", "stochastic")),
    st.sampled_from(("fp32", "bf16", "8bit")), st.sampled_from(("none", "cheap", "block")), st.booleans(),
    st.booleans(),
)  # fmt: skip


@pytest.mark.parametrize("adapter", [None, AdapterConfig(saved=("lm_head",)), AdapterConfig(r=64)])
@pytest.mark.parametrize("n_cards", [1, 2, 8])
def test_no_saving_is_proposed_that_the_run_would_refuse(n_cards, adapter):
    setting = Setting(master="fp32", recompute="none", shards=n_cards, adapter=adapter)
    fields = {saving.field for saving in find_allowed_savings(setting)}
    refused = {"offload"} if adapter is not None else set()
    refused |= {"in_backward"} if n_cards > 1 else set()
    assert fields == {"states", "recompute", "master", "offload", "in_backward"} - refused


@given(one_card_settings, st.integers(1 << 30, 60 << 30), st.integers(0, 4 << 30), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_the_largest_micro_batch_fits_and_the_next_does_not(setting, available, more, share):
    limits = Limits(9000, loss_share=share)

    def total(tokens):
        return memory(MODEL, setting, BatchShape(tokens, math.ceil(share * tokens))).total

    found = find_largest_micro_batch(MODEL, setting, available, limits)
    assert 0 <= found <= 9000
    assert found == 0 or total(found) <= available
    assert found == 9000 or total(found + 1) > available
    assert found <= find_largest_micro_batch(MODEL, setting, available + more, limits)


@pytest.mark.parametrize(
    "tokens, share_tokens, expected",
    [
        (4000, 1000, "none"), (4000, 1001, "cheap"), (4000, 12001, "cheap"), (900, 1800, "none"), (900, 1801, "none"),
        (1200, 2400, "cheap"), (1200, 3000, "none"),
    ],
)  # fmt: skip
def test_nothing_is_recomputed_where_that_costs_no_micro_batch(tokens, share_tokens, expected):
    """1000 tokens fit without."""
    none, cheap = Setting(recompute="none"), Setting(recompute="cheap")
    available, limits = memory(MODEL, none, Limits().batch(1000)).total, Limits()
    fits = find_largest_micro_batch(MODEL, none, available, limits)
    assert 1000 <= fits < 1010 < find_largest_micro_batch(MODEL, cheap, available, limits)
    chosen = {"none": (none, min(tokens, fits)), "cheap": (cheap, tokens)}
    wish = {"share_tokens": share_tokens, "tokens": tokens}
    assert resolve_recompute(MODEL, Setting(recompute="auto"), available, limits, **wish) == chosen[expected]
    block = Setting(recompute="block")
    assert resolve_recompute(MODEL, block, available, limits, **wish) == (block, tokens)
    nothing = memory(MODEL, none, Limits().batch(0)).total - 1
    assert resolve_recompute(MODEL, Setting(recompute="auto"), nothing, limits, **wish) == (cheap, tokens)


def auto_states(available_gb, sooner="8bit", n_cards=1, replicas=None, model=MODEL, limits=Limits()):  # noqa: B008
    """Return the states of a model that are chosen where one of bf16 and 8 bits is updated sooner."""
    setting = Setting(states="auto", shards=n_cards)
    found = resolve_states(
        model, setting, int(available_gb * 1e9), limits, least_tokens=512, replicas=replicas,
        update_s=lambda way: float(way.states != sooner),
    )  # fmt: skip
    assert dataclasses.replace(found, states="auto") == setting
    return found.states


def bytes_of(states, tokens, **changes):
    return memory(MODEL, Setting(states=states, **changes), BatchShape(tokens, tokens)).total / 1e9


def test_states_are_exact_where_they_fit_and_else_what_is_updated_sooner():
    assert auto_states(bytes_of("fp32", GOOD_TOKENS)) == "fp32"
    short = bytes_of("fp32", GOOD_TOKENS) - 1e-9
    assert auto_states(short, "8bit") == "8bit" and auto_states(short, "bf16") == "bf16"
    assert auto_states(bytes_of("bf16", GOOD_TOKENS) - 1e-9, "bf16") == "8bit", "bf16 states do not fit"
    assert auto_states(bytes_of("8bit", 512), "bf16") == "8bit", "a small micro-batch beside 8 bits alone"
    assert auto_states(1) == "fp32", "nothing fits"
    few = Limits(most_tokens=GOOD_TOKENS // 2)  # as many as a step has: more are not waited for
    assert auto_states(bytes_of("fp32", few.most_tokens) - 1e-9, limits=few) == "8bit"
    one = Setting(states="bf16", shards=2)
    assert resolve_states(MODEL, one, 1, Limits(), least_tokens=1, replicas=None, update_s=lambda _: 0.0) == one


def test_states_of_several_gpus_are_those_of_their_shards():
    whole, half = bytes_of("fp32", GOOD_TOKENS), bytes_of("fp32", GOOD_TOKENS, shards=2)
    assert half < whole - 1
    assert auto_states(whole - 1, n_cards=2) == "fp32" and auto_states(whole - 1, n_cards=2, replicas=2) == "8bit"
    small = MODELS["smollm2-135m"]  # whose blocks 5 shards would cut
    short = memory(small, Setting(shards=5), BatchShape(GOOD_TOKENS, GOOD_TOKENS)).total / 1e9 - 1e-9
    assert auto_states(short, n_cards=5, replicas=1, model=small) == "bf16"


def test_offloaded_states_fit_the_hosts_memory_as_they_are_sharded():
    def states(host_bytes, replicas):
        setting = Setting(states="auto", shards=4, offload=True)
        return resolve_states(
            MODEL, setting, 1 << 40, Limits(), least_tokens=512, replicas=replicas,
            update_s=lambda way: float(way.states != "bf16"), host_bytes=host_bytes,
        ).states  # fmt: skip

    for replicas in (1, 2, 4):
        host = {
            name: memory(
                MODEL, Setting(states=name, shards=4, offload=True).with_replicas(replicas), BatchShape(1, 1)
            ).host
            for name in ("fp32", "bf16", "8bit")
        }
        assert host["fp32"] > host["bf16"] > host["8bit"]
        assert states(host["fp32"], replicas) == "fp32" and states(host["fp32"] - 1, replicas) == "bf16"
        assert states(host["bf16"] - 1, replicas) == "8bit"


def test_a_step_of_one_micro_batch_holds_fewer_gradients():
    several, one = (memory(MODEL, Setting(), BatchShape(4096, 3000, one)) for one in (False, True))
    at_once = memory(MODEL, Setting(in_backward=True), BatchShape(4096, 3000, True))
    assert one.gradients < several.gradients and at_once.total < several.total
    assert one.gradients + one.activations >= several.gradients  # at the end of backward all of them are there
    available, share = (one.total + several.total) // 2, 3000 / 4096
    assert find_largest_micro_batch(MODEL, Setting(), available, Limits(8192, 4096, share)) == 4096
    assert find_largest_micro_batch(MODEL, Setting(), available, Limits(8192, loss_share=share)) < 4096


@pytest.mark.parametrize("gib", [9, 11, 14, 18, 24])
def test_the_cheapest_ways_fit_and_need_each_of_their_changes(gib):
    setting, available, limits = Setting(recompute="none"), gib * GIB, Limits(8192)
    found = find_cheapest_fits(MODEL, setting, available, limits, tokens=4000, least_tokens=512)
    assert found and found == sorted(found, key=price_of)
    for fit in found:
        assert fit.memory.total <= available
        smaller = [flag for flag in fit.flags if "--micro-batch-tokens" in flag]
        assert smaller == [f"--micro-batch-tokens {fit.tokens}"] * (fit.tokens < 4000)
        names = [field.name for field in dataclasses.fields(Setting)]
        changed = [name for name in names if getattr(fit.setting, name) != getattr(setting, name)]
        assert len(changed) + any("--micro-batch-tokens" in flag for flag in fit.flags) == len(fit.flags)
        for name in changed:  # without this change it would not do, or not with so many tokens
            less = dataclasses.replace(fit.setting, **{name: getattr(setting, name)})
            tokens = find_largest_micro_batch(MODEL, less, available, limits)
            assert tokens < (512 if "--micro-batch-tokens" in fit.flags[0] else 4000)


def test_what_is_proposed_is_what_finetune_takes():
    proposed = set()
    for step, gib in itertools.product((512, 2048), (4, 5, 6, 7, 9, 14, 20)):
        limits, wish = Limits(step, step_tokens=step), {"tokens": step, "least_tokens": 512}
        for fit in find_cheapest_fits(MODEL, Setting(), gib * GIB, limits, **wish):
            parse_flags(FinetuneConfig, ["--model", "m", "--data", "d", *" ".join(fit.flags).split()])
            proposed |= set(fit.flags)
    assert {saving.flags for saving in SAVINGS if saving.field != "recompute"} <= proposed


def price_of(fit):
    """Return a key that sorts fits by their dearest change, then by the next."""
    flags = [saving.flags for saving in SAVINGS]
    return sorted((flags.index(f) if f in flags else -1 for f in fit.flags), reverse=True)


def test_what_makes_llama_7b_fit_one_80_gb_card():
    c, wish = MODELS["llama-7b"], {"tokens": 2048, "least_tokens": 512}
    fits = find_cheapest_fits(c, Setting(), int(79.11 * GIB), Limits(loss_share=0.7), **wish)
    assert fits[0].flags == ("--optimizer-states 8bit",)
    assert not any(fit.flags == () for fit in fits)  # as it stands, with fp32 states, it does not
    assert find_cheapest_fits(c, Setting(), 200 * GIB, Limits(), **wish)[0].flags == ()


def test_the_least_memory_is_that_of_the_most_savings():
    c, wish = MODELS["llama-7b"], {"tokens": 512, "least_tokens": 512}
    of_eight, limits = Setting(shards=8), Limits(512)
    least = find_least_bytes(c, of_eight, 512)
    assert find_cheapest_fits(c, of_eight, least, limits, **wish)
    assert not find_cheapest_fits(c, of_eight, least - 1, limits, **wish)
    adapters = {"lora": AdapterConfig(), "qlora": AdapterConfig(nf4_base=True)}
    of_adapters = {name: Setting(adapter=adapter) for name, adapter in adapters.items()}
    least_of = find_least_bytes_of_adapters(c, Setting(), 512)
    assert least_of == {name: find_least_bytes(c, one, 512) for name, one in of_adapters.items()}
    for name, one in of_adapters.items():
        assert find_cheapest_fits(c, one, least_of[name], Limits(512, step_tokens=512), **wish)
        assert not find_cheapest_fits(c, one, least_of[name] - 1, Limits(512, step_tokens=512), **wish)


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("name", ["smollm2-135m", "tinyllama-1.1b", "llama-7b", "llama3-8b"])
def test_on_one_gpu_something_fits_the_least_and_nothing_less(name, on_cpu):
    """A step of one micro-batch needs few gradients; and what saves no memory alone may save some beside others."""
    c, setting, limits = MODELS[name], Setting(on_cpu=on_cpu), Limits(512, step_tokens=512)
    least = find_least_bytes(c, setting, 512)
    assert find_cheapest_fits(c, setting, least, limits, tokens=512, least_tokens=512)
    assert not find_cheapest_fits(c, setting, least - 1, limits, tokens=512, least_tokens=512)


# ---- replicas and shards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("gib", [12, 24, 40, 60, 80, 140])
def test_replicas_are_for_steps_of_several_micro_batches(states, gib):
    """One replica is taken where it leaves one micro-batch, otherwise the most replicas that need no more of them."""
    c, limits, setting, available = MODELS["llama-7b"], Limits(9000, None, 0.7), Setting(states=states), gib * GIB
    of_eight = dataclasses.replace(setting, shards=8)
    fits = {r: find_largest_micro_batch(c, of_eight.with_replicas(r), available, limits) for r in (1, 2, 4, 8)}
    for share in (600, 2000, 5000, 20000, 200_000):
        mesh, tokens = find_mesh_that_fits(c, of_eight, available, limits, share_tokens=share, least_tokens=512)
        assert tokens == fits[mesh.replicas] and mesh.n_cards == 8
        batches = {r: math.ceil(share / fits[r]) for r in fits if fits[r] >= 512}
        most = max((r for r in batches if batches[r] <= batches.get(1, 0)), default=1)
        assert mesh.replicas == (1 if batches.get(1, 1) == 1 else most)
    for share in (
        (2000, fits[1] + 1) if fits[1] else ()
    ):  # the longest example fits wherever it fits the smallest shards
        mesh = find_mesh_that_fits(c, of_eight, available, limits, share_tokens=share, least_tokens=fits[1])
        assert mesh[1] >= fits[1]
    at = {"share_tokens": 600, "least_tokens": 512}
    allowed = [
        find_mesh_that_fits(c, of_eight, available, limits, counts=counts, **at)[0].replicas
        for counts in ([8], [4, 2], [1])
    ]  # fmt: skip
    assert allowed[0] == 1 and allowed[1] in (2, 4) and allowed[2] == 8
    with pytest.raises(ValueError, match="8 cards, wanted a multiple of one of 3, 5 shards"):
        find_mesh_that_fits(c, of_eight, available, limits, counts=[3, 5], **at)


def test_counts_of_shards_that_cut_no_block():
    assert find_uncut_counts([(4096, 4096), (576,)], 8) == list(range(1, 9))
    assert find_uncut_counts([(6, 1000)], 6) == [1]
    assert find_uncut_counts([(32, 128)], 4) == [1, 2, 4], "4,096 elements are the fewest with 8-bit states"
    assert find_uncut_counts([(31, 128)], 4) == [1, 2, 3, 4]
    assert 4 in find_uncut_counts([(5, 9 * 128)], 8), (
        "the third of four shards ends where the rows do, and cuts nothing"
    )
    assert 2 in find_uncut_counts([(512, 576)], 8)


def test_blocks_of_8_bit_states_are_not_cut_where_replicas_are_chosen():
    shape = dataclasses.replace(MODELS["tiny"], dim=96, vocab_size=1002)
    assert find_shard_counts(shape, "8bit", 4) == [1] and find_shard_counts(shape, "fp32", 4) == [1, 2, 4]
    assert find_shard_counts(MODELS["tiny"], "8bit", 4) == [1, 2, 4] and find_shard_counts(shape, "8bit", 1) == [1]
    assert find_shard_counts(shape, "8bit", 4, AdapterConfig(r=4)) == [1, 2, 4], "the adapter's alone have states"
