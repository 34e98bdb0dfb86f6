"""What tests of the scripts share: a stand-in for transformers, whose import takes longer than all of these tests."""

import argparse
import builtins
import importlib
import importlib.metadata
import os
import platform
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

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


@pytest.fixture
def tell(monkeypatch, tmp_path, call_main, capsys):
    """Return a function that calls a measurement's main() with flags and --json on a machine that is the same
    everywhere, and returns the file and what was printed as one text."""
    facts = {
        "describe_cpu": lambda: {"cpu": "a processor", "cores": 6}, "read_cpu_name": lambda: "a processor",
        "today": lambda: "2026-01-31", "load_cpu": lambda: SimpleNamespace(cria_instruction_set=lambda: b"plain"),
    }  # fmt: skip
    threads = [4]

    def measure(module, *flags):
        for name, fact in facts.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fact)
        show = print
        progress = lambda *words, flush=False, **how: show(*["»"] * flush, *words, **how)  # noqa: E731
        monkeypatch.setattr(builtins, "print", progress)  # what must be seen at once is told apart
        monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 2.5, 3.5))
        monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.append(n))
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
        assert not call_main(module, "--json", tmp_path / "new" / "record.json", *flags)
        text = (tmp_path / "new" / "record.json").read_text() + "\n" + capsys.readouterr().out
        return hide_versions(text).replace(str(tmp_path), "FOLDER")

    return measure


def hide_versions(text):
    """Return a record without the versions of Python and of packages, each of which stands beside its own name."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "openai", "rapidfuzz", "sentencepiece", "tokenizers", "triton"):
        versions[name] = importlib.metadata.version(name)
    for name, version in versions.items():
        text = text.replace(f'"{name}": "{version}"', f'"{name}": "its version"')
    return text


@pytest.fixture
def defaults_of(monkeypatch):
    """Return a function that returns what a command's flags are where only those given are given."""
    told = []

    def parse(self, argv=None):
        told.append(vars(parse_args(self, argv)))
        raise InterruptedError

    parse_args = argparse.ArgumentParser.parse_args

    def find(module, *flags):
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            patch.setattr(sys, "argv", ["it", *flags])
            with pytest.raises(InterruptedError):
                module.main()
        return told.pop()

    return find
