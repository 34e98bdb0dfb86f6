"""Gradients that leave in backward, and updates on the CPU: the bits of a run that keeps everything on the device."""

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import finetune
from engine.base.errors import run_main
from engine.data import packing
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.planning.memory import leaving_bytes
from engine.planning.setting import Setting
from engine.training import host_updates
from engine.training.config import FinetuneConfig
from engine.training.host_updates import HostUpdates, Lane
from engine.training.micro_batch_size import MicroBatchSize
from engine.training.optimizer import AdamW
from kernels.native.cpu import find_cpu
from kernels.ops import common
from tests.helpers.datasets import dataset
from tests.helpers.late_copies import LateLane
from tests.helpers.planning import SHAPES, SMALL
from tests.helpers.run import events
from tests.helpers.small_model import small_model

ROWS = [[*range(40, 48 + i), i, i + 1, i + 2] for i in range(12)]
SETTINGS = dict(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
KINDS = [("split", "fp32"), ("split", "8bit"), ("fp32", "bf16"), ("stochastic", "8bit")]
SHAPE = ModelConfig(**SMALL | {"dim": 96})  # some tensors are over 4,096 elements, some under


@pytest.fixture
def lanes(monkeypatch):
    """The lanes of the HostUpdates that a test makes, up and down, whose copies are made late."""
    made = []
    monkeypatch.setattr(host_updates, "Lane", lambda device: made.append(LateLane()) or made[-1])
    return made


@pytest.fixture
def fused(device, monkeypatch):
    """Kernels whose backward adds to gradients in its products; the interpreter would take minutes."""
    if device == "cuda":
        return "triton"
    if find_cpu() is None:
        pytest.skip("the CPU library is compiled by g++, which is missing")
    monkeypatch.setattr(common, "INTERPRETED", False)
    return "native"


def model_of(device, shape=SHAPE, dtype=torch.bfloat16, **options):
    model = new_model(shape, device, dtype, **options)
    model.init_weights(0)
    return model


def micro_batches(step, tokens=24):
    """Return three or more micro-batches of 6 rows, or with more tokens one."""
    examples = dataset(ROWS).get_examples(np.arange(step, step + 6))
    return packing.make_micro_batches(examples, packing.Packing(tokens), scale=1 / 100)


def take_step(model, optimizer, step, apply=True, **options):
    """Take a step as engine.training.step does, and return the gradients' norm."""
    batches = micro_batches(step, **options)
    assert len(batches) > 2 or options
    for i, batch in enumerate(batches, 1):
        with optimizer.micro_batch(i == len(batches)):
            model.loss(batch).backward()
    norm = optimizer.grad_norm()
    optimizer.step(1e-3, norm, 0.5, apply=torch.isfinite(norm) & apply)
    optimizer.n_updates -= not apply
    return norm


def state_of(optimizer):
    return {name: shard.tensor.clone() for name, shard in optimizer.tensors().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(t.cpu().equal(theirs[name].cpu()) for name, t in ours.items())


def impl_of(device):
    return "ref" if device == "cuda" or find_cpu() is None else "native"


def pair_of(device, master="split", states="fp32", **options):
    """Return equal models, one with an optimizer on its device and one whose parameters the CPU updates."""
    settings = SETTINGS | {"master": master, "states": states, "impl": impl_of(device)}
    plain, other = model_of(device, **options), model_of(device, **options)
    return (plain, AdamW(plain, **settings)), (other, AdamW(other, offload=True, on_cpu=True, **settings))


@pytest.mark.parametrize(("master", "states"), KINDS)
def test_updates_on_the_cpu_are_bit_equal(device, master, states, lanes):
    """As on the device; and after a return to an earlier state, whose weights another wrote, and a step left out."""
    (model, plain), (other, ours) = pair_of(device, master, states)
    for step in range(2):
        assert take_step(model, plain, step).equal(take_step(other, ours, step))
    earlier = state_of(ours)
    assert_same(earlier, state_of(plain))
    take_step(other, ours, 5)
    ours.n_updates -= 1
    for name, shard in ours.tensors().items():
        shard.tensor.copy_(earlier[name])
    take_step(other, ours, 4, apply=False)
    assert_same(earlier, state_of(ours))
    for step in (2, 3):
        assert take_step(model, plain, step).equal(take_step(other, ours, step))
    assert_same(state_of(ours), state_of(plain))
    assert all(t.device.type == "cpu" for state in ours.states.values() for t in state.tensors().values())


@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, "one layer, tied"])
def test_gradients_that_leave_are_added_up_as_those_that_stay(device, shape, accumulate, recompute, lanes, request):
    """By autograd, and in the kernels' products, which add to what has come back. No gradient stays behind."""
    shapes = SHAPES | {"one layer, tied": {"n_layers": 1, "tied": True}}
    impl = request.getfixturevalue("fused") if accumulate else "ref"
    options = {"impl": impl, "recompute": recompute, "accumulate": accumulate}
    (model, plain), (other, ours) = pair_of(device, shape=dataclasses.replace(SHAPE, **shapes[shape]), **options)
    if shape == "one layer, tied":  # whose gradients are still on their way when they are wanted again
        ours.host_updates.up = Lane(torch.device("cpu"))  # copies at once
    batches = micro_batches(0)
    for i, batch in enumerate(batches, 1):
        model.loss(batch).backward()
        with ours.micro_batch(i == len(batches)):
            other.loss(batch).backward()
        left = {name for name, p in other.named_parameters() if p.grad is None}
        stay = set(ours.params) - left
        assert stay == ({"tok_embeddings"} if model.config.tied and i < len(batches) else set())
    norm = plain.grad_norm()
    assert norm.equal(ours.grad_norm()) and norm > 0
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    ours.step(0.0, norm, 0.0)
    assert_same(ours.host_updates.grads, wanted)


def test_a_step_that_failed_is_taken_anew(device, lanes):
    """In its second micro-batch, whose sums were on their way. The CPU has no gradients of it afterwards."""
    (model, plain), (other, ours) = pair_of(device)
    batches = micro_batches(0)
    with ours.micro_batch(False):
        other.loss(batches[1]).backward()
    with pytest.raises(RuntimeError, match="out of memory"), ours.micro_batch(True):
        loss = other.loss(batches[2])
        other.on_gradients, send = None, other.on_gradients
        loss.register_hook(lambda dx: send(len(ours.host_updates.groups) - 1) or (_ for _ in ()).throw(OUT_OF_MEMORY))
        loss.backward()
    ours.zero_grad()
    assert other.on_gradients is None and all(p.grad is None for p in other.parameters())
    assert take_step(model, plain, 0).equal(take_step(other, ours, 0))
    assert_same(state_of(ours), state_of(plain))


OUT_OF_MEMORY = RuntimeError("out of memory")


def test_gradients_made_without_micro_batch_go_down_after_backward(device, lanes):
    """As those of several ranks do."""
    (model, plain), (other, ours) = pair_of(device)
    ours.is_sharded = True
    for step in range(2):
        assert take_step(model, plain, step).equal(take_step(other, ours, step))
    assert_same(state_of(ours), state_of(plain))
    (batch,) = micro_batches(0, tokens=10**6)
    ours.is_sharded = False
    ours.host_updates.left = {"norm": None}
    other.loss(batch).backward()
    with pytest.raises(AssertionError, match=r"outside of micro_batch\(\)"):
        ours.step(1e-3, torch.ones((), device=device), 0.0)


def test_a_lane_copies_on_a_stream_of_its_own_after_what_the_gpu_was_given(monkeypatch):
    """Memory that is dropped meanwhile is kept for the copy, and nobody waits who does not ask for it."""
    log, current, event = [], [], SimpleNamespace(synchronize=lambda: log.append("host waits"))

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} after {other.name}")

        def record_event(self):
            log.append(f"event of {self.name}")
            return event

        def wait_event(self, waited):
            log.append(f"{self.name} waits {waited is event}")

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    class Tensor:
        def __init__(self, is_cuda):
            self.is_cuda = is_cuda

        def copy_(self, source, non_blocking):
            log.append(f"copy on {current[-1].name}, {self.is_cuda} from {source.is_cuda}, {non_blocking}")

        def record_stream(self, stream):
            log.append(f"kept for {stream.name}, {self.is_cuda}")

    current.append(Stream("main"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("lane"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    lane, host, gpu = Lane(torch.device("cuda")), Tensor(False), Tensor(True)
    for pair, text in (((host, gpu), "False from True"), ((gpu, host), "True from False")):
        log.clear()
        copied = lane.copy([pair])
        kept = "kept for lane, True"
        assert log == ["lane after main", f"copy on lane, {text}, True", kept, "event of lane"]
        log.clear()
        copied.wait_on_device()
        copied.wait_on_host()
        assert log == ["main waits True", "host waits"]


def test_the_largest_micro_batch_is_tried_with_gradients_that_leave(device, monkeypatch):
    """In two backward passes, the second with sums that come back: as much memory as a step will take."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 << 30))
    forgotten = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    _, (model, ours) = pair_of(device)
    sent, send = [], ours.host_updates._send
    ours.host_updates._send = lambda group: sent.append(group) or send(group)
    config = FinetuneConfig(model="tiny", random_init=True, data=("rows.json",), max_length=32)
    packing_ = packing.Packing(64)
    plan = SimpleNamespace(config=config, train=dataset(ROWS), packing=packing_, model_config=SHAPE, device=device)
    MicroBatchSize(plan, SimpleNamespace(packing=packing_), None, print).try_largest(model, ours)
    assert sent == 2 * [4, 3, 2, 1, 0] and not ours.host_updates.left
    assert all(p.grad is None for p in model.parameters())
    assert forgotten == [device], "the peak of a step is its own"
    assert model.on_gradients is None, "what comes between steps sends nothing"


# ---- by the command --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_cpu() is None, reason="the CPU library is compiled by g++, which is missing")
def test_a_run_may_change_to_updates_on_the_cpu_and_back(tmp_path, rows_file, monkeypatch, fused, capsys):
    """The CPU updates by itself where csrc/cpu is, and CRIA_OPTIMIZER insists; losses, norms and weights stay equal."""
    common_flags = ("--model", small_model(), "--data", rows_file, "--device", "cpu", "--dtype", "bf16")
    common_flags += (
        "--kernels",
        "native",
        "--global-batch-size",
        8,
        "--micro-batch-tokens",
        128,
        "--max-length",
        64,
        "--max-steps",
        6,
    )

    def run(out, *more):
        args = map(str, (*common_flags, "--out", tmp_path / out, *more))
        assert run_main(finetune.main, list(args)) == 0
        said = capsys.readouterr().out
        lines = [(line["step"], line["loss"], line["grad_norm"]) for line in events(tmp_path / out)]
        return said, lines, load_file(tmp_path / out / "model.safetensors")

    plain, curve, weights = run("plain", "--save-every", 2, "--keep", 3)
    assert "optimizer:" not in plain and len(curve) == 6
    monkeypatch.setattr(HostUpdates, "send", None)  # which takes gradients after backward
    for out, more in (("new", ()), ("resumed", ("--resume", tmp_path / "plain" / "checkpoint-2"))):
        said, lines, ours = run(out, "--offload-optimizer", "--save-every", 2, *more)
        assert "updated by the CPU; gradients go there in backward" in said
        assert lines == curve[len(more) :] and all(t.equal(weights[name]) for name, t in ours.items())
    monkeypatch.setenv("CRIA_OPTIMIZER", "triton")
    back = tmp_path / "new" / "checkpoint-4"
    said, lines, ours = run("back", "--offload-optimizer", "--resume", back)
    assert "they visit the device for their updates" in said and lines == curve[4:]
    assert all(t.equal(weights[name]) for name, t in ours.items())


# ---- what is on the device at one time ------------------------------------------------------------------------------


def watch_gradients(model, optimizer, batches, lanes):
    """Return the most bytes of gradients on the device: parameters' own, and those that wait for a copy to the host."""
    params, (_, down), most = dict(model.named_parameters()), lanes, 0

    def look(real):
        def call(*args):
            nonlocal most
            for moment in (None, real):
                if moment:
                    moment(*args)
                held = sum(p.grad.nbytes for p in params.values() if p.grad is not None)
                most = max(most, held + sum(source.nbytes for _, source in down.waiting()))

        return call

    host = optimizer.host_updates
    host._send, host._fetch = look(host._send), look(host._fetch)
    for i, batch in enumerate(batches, 1):
        with optimizer.micro_batch(i == len(batches)):
            model.loss(batch).backward()
    return most


@pytest.mark.parametrize("vocab_size", [60, 301, 3000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [24, 10**6])
def test_the_gradients_on_the_device_are_those_that_planning_counts(tokens, tied, vocab_size, device, lanes, fused):
    shape = dataclasses.replace(SHAPE, n_layers=5, vocab_size=vocab_size, tied=tied)
    model = model_of(device, shape, impl=fused, accumulate=True)
    optimizer = AdamW(model, offload=True, on_cpu=True, **SETTINGS)
    batches = micro_batches(0, tokens)
    found = watch_gradients(model, optimizer, batches, lanes)
    assert found == leaving_bytes(shape, Setting(), len(batches) == 1)
