"""What tests of the scripts share: a stand-in for transformers, whose import takes longer than all of these tests."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

OVER_TRANSFORMERS = (  # modules that import it at their top
    *(f"scripts.parity.{name}" for name in ("transformers_loop", "loss_curve", "tokenizer_ids", "peft_peer")),
    *(f"scripts.speed.{name}" for name in ("cpu_step", "cpu_adapter", "decoding")),
)


class Falling:
    """A schedule: the learning rate falls as a line."""

    def __init__(self, optimizer, total):
        self.group, self.total, self.taken = optimizer.param_groups[0], total, 0
        self.first = self.group["lr"]

    def step(self):
        self.taken += 1
        self.group["lr"] = self.first * (1 - self.taken / self.total)


@pytest.fixture
def load_beside_stand_in(monkeypatch):
    """Return a function that imports a module of OVER_TRANSFORMERS anew, under a stand-in for transformers."""
    stand_in = ModuleType("transformers")
    stand_in.__version__ = "1.2"
    stand_in.LlamaForCausalLM = stand_in.AutoTokenizer = SimpleNamespace(from_pretrained=lambda folder, **_: None)
    stand_in.get_cosine_schedule_with_warmup = lambda optimizer, warmup, total: Falling(optimizer, total)
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    for name in OVER_TRANSFORMERS:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    yield importlib.import_module
    for name in OVER_TRANSFORMERS:
        sys.modules.pop(name, None)


@pytest.fixture
def call_main(monkeypatch):
    """Return a function that calls a module's main() with arguments, and returns what it returns or exits with."""

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        try:
            return module.main()
        except SystemExit as done:
            return done.code

    return call
