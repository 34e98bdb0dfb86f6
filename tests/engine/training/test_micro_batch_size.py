"""The largest micro-batch that fits, on cards that are not here."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.base.errors import CriaError, DataError, UsageError
from engine.data.batches import StepBatch
from engine.data.packing import Packing
from engine.model.config import MODELS
from engine.planning.memory import CONTEXT_BYTES, BatchShape, memory
from engine.training import micro_batch_size as fit
from engine.training.config import FinetuneConfig
from engine.training.planning_input import setting_from_config
from engine.training.run_ahead import Prefetcher

CUDA, CPU, BF16, GB = torch.device("cuda"), torch.device("cpu"), torch.bfloat16, 10**9
LENGTHS = SimpleNamespace(lengths=lambda: torch.full((52002,), 128).numpy())


@pytest.fixture(autouse=True)
def host_memory(monkeypatch):
    """A machine with much memory."""
    monkeypatch.setattr(fit, "read_free_bytes", lambda: 128 * GB)


def config_of(**changes):
    return FinetuneConfig(model="llama-7b", random_init=True, data=("rows.json",), optimizer_states="8bit", **changes)


def tokens_with(free_gb, monkeypatch, lengths=LENGTHS, **changes):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gb * GB), 85 * GB))
    return fit.choose_mesh_and_tokens(MODELS["llama-7b"], config_of(**changes), lengths, CUDA, BF16)[1]


@pytest.mark.parametrize("changes", [{}, {"recompute": "block"}, {"recompute": "none"}, {"offload_optimizer": True}])
def test_what_is_chosen_fits_and_64_tokens_more_do_not(changes, monkeypatch):
    free = 76 if changes.get("recompute") != "block" else 61
    tokens = tokens_with(free, monkeypatch, **changes)
    setting = setting_from_config(config_of(**changes), BF16)

    def used(n):
        return memory(MODELS["llama-7b"], setting, BatchShape(n, n)).total

    room = free * GB + CONTEXT_BYTES
    assert tokens % fit.TOKENS_MULTIPLE == 0 and used(tokens) <= room
    assert used(tokens + fit.TOKENS_MULTIPLE) > room or tokens >= 128 * 128, "no more than a step holds"


@pytest.mark.parametrize(
    ("device", "dtype", "multiple"),
    [(CUDA, BF16, 64), (CUDA, torch.float32, 64), (CPU, BF16, 32), (CPU, torch.float32, 1)],
)
def test_tokens_are_a_multiple_where_sizes_cost_something(device, dtype, multiple):
    assert fit.choose_multiple(device, dtype) == multiple


def test_no_more_than_a_step_holds(monkeypatch):
    short = SimpleNamespace(lengths=lambda: torch.full((52002,), 20).numpy())
    assert tokens_with(78, monkeypatch, short) == 128 * 20
    assert tokens_with(78, monkeypatch, short, global_batch_size=8) == 512, "an example of --max-length must fit"


def test_where_no_example_fits_what_does_is_said(monkeypatch):
    with pytest.raises(UsageError, match=r"an example of 512 tokens .* do not fit the 40\.7 GB .*--offload-optimizer"):
        tokens_with(40, monkeypatch)
    with pytest.raises(UsageError, match=r"engine\.estimate tells which"):
        tokens_with(8, monkeypatch)


def test_a_card_of_24_gb_trains_llama_7b_whose_gradients_leave_for_the_host(monkeypatch):
    offload = {"offload_optimizer": True, "recompute": "block"}
    assert tokens_with(24, monkeypatch, **offload) > 8192
    assert tokens_with(24, monkeypatch, offload_optimizer=True) > 2048
    monkeypatch.setenv("CRIA_OPTIMIZER", "triton")
    with pytest.raises(UsageError, match="do not fit the 24"):
        tokens_with(24, monkeypatch, **offload)


def test_what_is_offloaded_must_fit_the_hosts_memory(monkeypatch):
    """States that are left open are those that fit it; the memory is shared by the ranks of a machine."""

    def states_with(host_gb, ranks=1, **changes):
        monkeypatch.setattr(fit, "read_free_bytes", lambda: host_gb and host_gb * GB)
        monkeypatch.setattr(fit, "detect_card", lambda device: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GB, 85 * GB))
        config = dataclasses.replace(config_of(offload_optimizer=True), **{"optimizer_states": "auto"} | changes)
        return fit.choose_mesh_and_tokens(MODELS["llama-7b"], config, LENGTHS, CUDA, BF16, ranks)[0].states

    assert [states_with(gb) for gb in (None, 100, 60)] == ["fp32", "fp32", "8bit"]
    with pytest.raises(UsageError, match=r"keeps 94\.3 GB in the host's memory, of which 30\.0 GB are free; take a"):
        states_with(30)
    advice = r"of which 60\.0 GB are free; pass --optimizer-states 8bit \(54\.1 GB\), or --optimizer-states 8bit --m"
    with pytest.raises(UsageError, match=advice):
        states_with(60, optimizer_states="fp32")
    with pytest.raises(UsageError, match=r"keeps 33\.7 GB a rank in the host's memory, of which 30\.0 GB are free"):
        states_with(60, ranks=2, optimizer_states="fp32")
    assert states_with(70, ranks=2, optimizer_states="fp32") == "fp32"


@pytest.mark.parametrize(("max_length", "wanted"), [(512, 2048), (2048, 2048), (2049, 2049)])
def test_on_a_cpu_2048_or_an_example(max_length, wanted):
    setting, tokens = fit.choose_mesh_and_tokens(
        MODELS["llama-7b"], config_of(recompute="auto", max_length=max_length), LENGTHS, torch.device("cpu"), BF16, 4
    )
    assert (setting.replicas, setting.recompute, tokens) == (1, "cheap", wanted)


@pytest.mark.parametrize("replicas", [2, 4])
def test_on_a_cpu_the_model_is_in_as_many_replicas_as_asked_for(replicas):
    config, cpu = config_of(replicas=replicas), torch.device("cpu")
    assert fit.choose_mesh_and_tokens(MODELS["llama-7b"], config, LENGTHS, cpu, BF16, 4)[0].replicas == replicas


def test_no_more_than_micro_batch_size_rows(monkeypatch):
    assert tokens_with(78, monkeypatch, micro_batch_size=8) == 1024


@pytest.mark.parametrize(("free_gb", "recompute"), [(76, "cheap"), (92, "cheap"), (104, "none")])
def test_nothing_is_recomputed_where_a_step_has_no_more_micro_batches_then(free_gb, recompute, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * GB, 150 * GB))
    choose = functools.partial(fit.choose_mesh_and_tokens, MODELS["llama-7b"], train=LENGTHS, device=CUDA, dtype=BF16)
    found, tokens = choose(config_of(recompute="auto"))
    assert found.recompute == recompute
    sizes = [choose(config_of(recompute=asked))[1] for asked in ("cheap", "none")]
    n_cheap, n_none = (math.ceil(128 * 128 / size) for size in sizes)
    assert (n_none <= n_cheap) == (recompute == "none") and tokens in sizes


def test_an_optimizer_in_backward_needs_no_gradients_where_a_step_is_one_micro_batch(monkeypatch):
    changes = dict(
        optimizer_in_backward=True, grad_clip=0.0, global_batch_size=16, recompute="block", master_weights="stochastic"
    )
    assert tokens_with(33, monkeypatch, **changes) == 16 * 128
    with pytest.raises(UsageError, match="do not fit"):
        tokens_with(33, monkeypatch, **changes | {"optimizer_in_backward": False})


def test_the_largest_step_is_whole_tiles():
    odd = SimpleNamespace(lengths=lambda: torch.tensor([9, 100, 50, 70]).numpy())
    assert fit.count_largest_tokens(config_of(global_batch_size=3), odd, 64) == (256, 256)
    assert fit.count_largest_tokens(config_of(global_batch_size=3, micro_batch_size=1), odd, 64) == (128, 256)
    assert fit.count_largest_tokens(config_of(global_batch_size=3, micro_batch_size=2), odd, 1) == (170, 220)


def size_of(say, tokens=9024, multiple=64, out=None, ranks=1, device=CPU, **changes):
    """Return the MicroBatchSize of a run of llama-7b."""
    packing = Packing(tokens, multiple=multiple)
    plan = SimpleNamespace(
        config=dataclasses.replace(config_of(), **changes), device=device, dtype=BF16,
        model_config=MODELS["llama-7b"], packing=packing, out=out, recompute="cheap", on_cpu=None,
    )  # fmt: skip
    return fit.MicroBatchSize(plan, SimpleNamespace(packing=packing), SimpleNamespace(size=ranks, replicas=1), say)


def test_halving_twice_tells_the_peak_and_what_would_fit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 85 * GB))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 84 * GB)
    said = []
    size = size_of(said.append, device=CUDA)
    size.halve("no room")
    assert size.max_tokens == 4480 and "going on with 4480" in said[0]
    with pytest.raises(CriaError, match=r"the peak was 84\.0 of 85\.0 GB; pass --micro-batch-tokens \d+ \("):
        size.halve("no room")


def test_an_example_must_still_fit_after_halving():
    with pytest.raises(CriaError, match="micro-batches of 512 tokens"):
        size_of(print, tokens=512, multiple=1, max_length=512).halve("no room")


def test_half_of_a_micro_batch_is_an_example_at_least():
    size = size_of(print, tokens=800, multiple=1, max_length=512)
    size.halve("no room")
    assert size.max_tokens == 512


@pytest.mark.parametrize("ways", [[], ["--a 1"], ["--a 1", "--b"], ["--a 1", "--b", "--c", "--d"]])
def test_of_the_changes_that_fit_three_are_advised(ways, monkeypatch):
    """None where nothing would change; else what else can be done."""
    fits = [
        SimpleNamespace(flags=tuple(way.split()), memory=SimpleNamespace(total=n * GB)) for n, way in enumerate(ways)
    ]
    unchanged = SimpleNamespace(flags=(), memory=SimpleNamespace(total=0))
    for found in (fits, [unchanged, *fits][:3]):
        monkeypatch.setattr(fit, "find_cheapest_fits", lambda *_, found=found, **__: found)
        told = fit.advise_settings(None, None, 0, 64, 64, 64)
        kept = [f"{' '.join(one.flags)} ({one.memory.total / GB:.1f} GB)" for one in found[:3] if one.flags]
        assert told == "pass " + ", or ".join(kept) if kept else told.startswith("take a smaller --max-length")


def test_a_rank_halves_nothing_without_the_others_but_at_the_next_start(tmp_path):
    size = size_of(print, out=tmp_path, ranks=2)
    with pytest.raises(CriaError, match=r"micro-batches of 9024 tokens .* the same command goes on with 4480"):
        size.halve("no room")
    assert size.max_tokens == 9024
    whole = (tmp_path / "halved.json").read_text()
    for damaged in ("", whole[:9], whole.replace("to", "tp"), whole.replace("4480", "0")):
        (tmp_path / "halved.json").write_text(damaged)
        with pytest.raises(DataError, match=r"halved\.json.*remove the file"):
            fit.read_halving(size.plan, 9024, print)
    (tmp_path / "halved.json").write_text(whole)
    for asked, taken in ((9024, 4480), (4480, 4480), (8960, 4480), (2048, None)):
        assert fit.read_halving(size.plan, asked, print) == taken


def test_what_was_prepared_before_a_halving_is_dropped():
    """The step that failed and the next one are of the new size; the failed pass leaves no gradients."""
    size, dropped = size_of(print), []
    model = SimpleNamespace(norm=torch.zeros(1), prepare_batch=lambda tokens: tokens)
    size.batches.make_step = lambda step: StepBatch([size.max_tokens], np.arange(1), 0, 0, 0)
    optimizer = SimpleNamespace(step_in_backward=None, zero_grad=lambda: dropped.append(size.max_tokens))
    with Prefetcher(size.batches, model, last_step=9) as prefetcher:
        assert prefetcher.take(1).micro_batches == [9024]
        prefetcher.ahead[1].result()  # step 2, of the old size
        size.recover("no room", optimizer, prefetcher)
        assert prefetcher.take(2).micro_batches == [4480]
        assert prefetcher.take(1).micro_batches == [4480]
    assert dropped == [9024], "before what would fit is counted"


def layout(model, ranks, free_gb, monkeypatch, **changes):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gb * GB), 85 * GB))
    setting, tokens = fit.choose_mesh_and_tokens(MODELS[model], config_of(**changes), LENGTHS, CUDA, BF16, ranks)
    return setting.replicas, tokens


def test_a_shard_of_a_model_leaves_more_room(monkeypatch):
    """13B does not fit one card of 80 GB, and an eighth of it does."""
    with pytest.raises(UsageError):
        layout("llama-13b", 1, 84, monkeypatch)
    assert layout("llama-13b", 8, 84, monkeypatch, replicas=1)[1] > 4096


def test_a_model_that_fits_is_replicated_where_a_step_is_several_micro_batches(monkeypatch):
    """A rank's share of a step is 2,048 tokens on 8 ranks, one micro-batch: nothing is gained by replicas."""
    assert layout("tinyllama-1.1b", 8, 84, monkeypatch)[0] == 1
    replicas, tokens = layout("tinyllama-1.1b", 8, 84, monkeypatch, micro_batch_tokens=1024)
    assert replicas == 8 and tokens >= 1024
    assert layout("tinyllama-1.1b", 8, 84, monkeypatch, global_batch_size=4096)[0] == 8
    assert layout("llama-13b", 8, 84, monkeypatch, global_batch_size=4096)[0] < 8, "which would not fit"
    assert layout("tinyllama-1.1b", 8, 84, monkeypatch, global_batch_size=4096, replicas=2)[0] == 2, "as asked"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_pass_held_is_freed_before_the_next(device, monkeypatch):
    did = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("emptied"))
    size = size_of(did.append, device=torch.device(device))
    monkeypatch.setattr(size, "halve", lambda reason: did.append(reason))
    optimizer = SimpleNamespace(step_in_backward=None, zero_grad=lambda: did.append("no gradients"))
    prefetcher = SimpleNamespace(drop_prefetched=lambda: did.append("dropped"))
    size.recover("no room", optimizer, prefetcher)
    assert did == ["no gradients", *(["emptied"] if device == "cuda" else []), "no room", "dropped"]
    monkeypatch.setattr(size, "advise", lambda tokens: f"advice for {tokens}")
    optimizer.step_in_backward = (0.0, None, [])
    size.recover("no room", optimizer)
    with pytest.raises(
        CriaError, match=r"out of memory \(no room\) in a step whose updates .* had begun; advice for 4\d+"
    ):
        size.recover("no room", optimizer, prefetcher)


@pytest.mark.parametrize("changes", [
    {}, {"replicas": 3, "micro_batch_tokens": 640}, {"optimizer_in_backward": True, "grad_clip": 0.0},
    {"micro_batch_size": 2, "global_batch_size": 6},
])  # fmt: skip
def test_what_fits_is_looked_for_with_the_sizes_of_the_run(changes, monkeypatch):
    """On 24 cards of 8 a machine, whose host's memory each card has an eighth of."""
    asked, shape = {}, MODELS["tiny"]
    config = FinetuneConfig(model="tiny", random_init=True, data=("x",), max_length=100, **changes)
    steps = {"states": "8bit", "recompute": "none"}

    def stand_in(name, answer):
        def called(*given, **named):
            asked[name] = (*given, named)
            return answer(*given)

        monkeypatch.setattr(fit, name, called)

    stand_in("resolve_states", lambda c, setting, *_: dataclasses.replace(setting, states=steps["states"]))
    stand_in("find_shard_counts", lambda *_: [24, 12])
    stand_in("find_mesh_that_fits", lambda c, setting, *_: (setting.with_replicas(2), 900))
    stand_in("require_host_memory", lambda *_: None)
    stand_in("resolve_recompute", lambda c, setting, *_: (dataclasses.replace(setting, recompute="none"), 777))
    stand_in("detect_card", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 85 * GB))
    lengths = SimpleNamespace(lengths=lambda: np.full(500, 50))
    found = fit.choose_mesh_and_tokens(shape, config, lengths, CUDA, BF16, 24)

    first = setting_from_config(config, BF16, 24)
    second = dataclasses.replace(first, states="8bit")
    third = second.with_replicas(2)
    assert found == (dataclasses.replace(third, recompute="none"), 768), "a multiple of 64"
    n, most = (
        config.global_batch_size,
        -(-min(config.micro_batch_size or 128, config.global_batch_size) * 50 // 64) * 64,
    )
    step = -(-n * 50 // 64) * 64
    limits = fit.Limits(
        max(128, min(most, config.micro_batch_tokens or most)), step if config.optimizer_in_backward else None
    )
    room, share, host = 5 * GB + CONTEXT_BYTES, -(-step // 24), 128 * GB / 8
    *given, named = asked["resolve_states"]
    update_s = named.pop("update_s")
    assert (given, named) == (
        [shape, first, room, limits],
        {"least_tokens": 128, "replicas": config.replicas, "host_bytes": host},
    )
    counts = [8] if config.replicas else [24, 12]
    assert asked["find_mesh_that_fits"] == (
        shape, second, room, limits, {"share_tokens": share, "least_tokens": 128, "counts": counts}
    )  # fmt: skip
    assert config.replicas or asked["find_shard_counts"] == (shape, "8bit", 24, first.adapter, {})
    assert asked["require_host_memory"] == (shape, third, host, {})
    assert asked["resolve_recompute"] == (shape, third, room, limits, {"share_tokens": share, "tokens": 900})
    stand_in("update_seconds", lambda *_: 1.5)
    assert update_s(second) == 1.5 and asked["detect_card"] == (CUDA, {})
    h100 = fit.CARDS["H100"]
    assert asked["update_seconds"] == (h100, fit.find_rates(h100), fit.state_bytes(shape, second), second, {})


def test_advice_is_for_nine_tenths_of_the_card_and_what_the_run_decided(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * GB))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 70 * GB)
    monkeypatch.setattr(fit, "advise_settings", lambda *given: asked.append(given) or "ways")
    size = size_of(print, device=CUDA, ranks=4, max_length=77)
    size.plan.recompute, size.world.replicas = "block", 2
    assert size.advise(3000) == "the peak was 70.0 of 80.0 GB; ways"
    setting = dataclasses.replace(setting_from_config(size.plan.config, BF16, 4).with_replicas(2), recompute="block")
    assert asked == [(MODELS["llama-7b"], setting, 72 * GB, 9024, 3000, 77)]
    assert size_of(print).advise(3000) == "lower --micro-batch-tokens"
