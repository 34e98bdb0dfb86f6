"""AdamW of a CPU: equal bits, turns with a copy and torch, and the figures."""

from types import SimpleNamespace

import torch

from scripts.speed import adamw
from tests.helpers.calls import Calls
from tests.helpers.clocks import Clock, Ticks


def test_equal_steps_end_at_the_first_bit_that_differs(monkeypatch):
    """In the parameter, or in any one tensor of its state."""
    real = adamw.kernels.adamw
    for broken in range(4):

        def update(param, grad, state, impl, broken=broken, **given):
            real(param, grad, state, impl="ref", **given)
            if impl == "native" and given["step"] == 3:
                tensors = [param, *state.tensors().values()]
                tensors[broken % len(tensors)].view(-1)[0:1].view(torch.uint8)[0] ^= 1

        monkeypatch.setattr(adamw.kernels, "adamw", update)
        assert adamw.count_equal_steps("split", "bf16", 300, 5) == 2
    monkeypatch.setattr(adamw.kernels, "adamw", lambda *args, impl, **given: real(*args, impl="ref", **given))
    assert adamw.count_equal_steps("none", "fp32", 300, 5) == 5


def test_a_parameter_has_the_type_of_its_mode():
    for master, states in adamw.MODES:
        assert adamw.make(256, master, states)[0].dtype == (torch.float32 if master == "none" else torch.bfloat16)


def test_the_first_round_of_adamw_touches_memory_and_is_not_told(monkeypatch):
    clock, steps = Clock(monkeypatch, adamw), []

    def update(param, grad, state, step, **settings):
        assert settings == {"lr": 1e-3, "impl": "native"} | adamw.SETTINGS
        steps.append(step)
        clock.take(100.0 if step == 1 else 1.0)

    monkeypatch.setattr(adamw.kernels, "adamw", update)
    monkeypatch.setattr(adamw, "TorchsWay", lambda n: SimpleNamespace(update=lambda grad: None))
    found = adamw.measure_in_turns(64, rounds=2)
    assert all(found[f"{a}, {b}"] == [1.0, 1.0] for a, b in adamw.BYTES) and set(steps) == {1, 2, 3}


def test_the_whole_measurement(monkeypatch, tell, snapshot):
    """Every call of the kernel, and every figure."""
    Ticks(monkeypatch, adamw)
    real, calls = adamw.kernels.adamw, Calls()
    monkeypatch.setattr(adamw, "TorchsWay", lambda n: calls.thing(f"torch's {n}", update=None))
    update = lambda param, grad, state, impl, **given: real(param, grad, state, impl="ref", **given)  # noqa: E731
    monkeypatch.setattr(adamw.kernels, "adamw", calls.stand_in("adamw", update))
    monkeypatch.setattr(adamw.AdamWState, "label", property(lambda state: "state"), raising=False)
    monkeypatch.setattr(adamw, "BYTES", {("fp32", "fp32"): 28, ("split", "8bit"): 14 + 16 / 256})
    monkeypatch.setattr(adamw, "MODES", [("none", "8bit"), ("stochastic", "bf16")])
    flags = ("--parameters", 512, "--rounds", 2, "--times", 2, "--steps", 2, "--sizes", 300, 600)
    assert tell(adamw, *flags) == snapshot
    assert calls.text() == snapshot(name="calls")


def test_all_modes_are_compared_and_those_of_the_table_timed():
    """The bytes that each moves, by hand: what is read and written of gradient, parameter, masters and moments."""
    assert {(a, b) for a, b in adamw.MODES} == {
        (a, b) for a in ("none", "fp32", "split", "stochastic") for b in ("fp32", "bf16", "8bit")
    }
    assert adamw.BYTES == {
        ("fp32", "fp32"): 2 + 2 + 8 + 16, ("split", "fp32"): 2 + 4 + 4 + 16, ("split", "bf16"): 2 + 4 + 4 + 8,
        ("split", "8bit"): 2 + 4 + 4 + 4 + 4 * 4 / 256, ("stochastic", "bf16"): 2 + 4 + 8,
    }  # fmt: skip


def test_gradients_of_the_comparison_are_of_many_sizes_and_of_both_types(monkeypatch):
    grads = []
    monkeypatch.setattr(adamw.kernels, "adamw", lambda param, grad, state, **given: grads.append(grad))
    assert adamw.count_equal_steps("split", "bf16", 4000, 2) == 2
    assert [grad.dtype for grad in grads] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for grad in grads:
        assert 0 < grad.abs().median() < 0.01 and 0.5 < grad.abs().max() < 5 and grad.abs().min() < 1e-6


class Descent:
    """In place of torch.optim.AdamW, whose first use imports much: a step subtracts the gradient."""

    def __init__(self, params, **settings):
        (self.param,), self.settings = params, settings

    def step(self):
        self.param -= self.param.grad


def test_torchs_way_is_adamw_on_a_master_that_is_never_rounded(monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", Descent)
    way, grads = adamw.TorchsWay(300), 1e-3 * torch.randn(3, 300).bfloat16()
    assert way.optimizer.settings == {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "fused": True
    }  # fmt: skip
    master = way.param.float()
    for grad in grads:
        way.update(grad)
        master -= grad.float()
        assert torch.equal(way.master, master) and torch.equal(way.param, master.bfloat16())
        assert way.param.dtype == torch.bfloat16


def test_flags_have_defaults(defaults_of):
    assert defaults_of(adamw, "--json", "x") == {
        "json": "x", "parameters": 50_000_000, "rounds": 15, "times": 4, "steps": 1000, "sizes": [4353, 8192]
    }  # fmt: skip
