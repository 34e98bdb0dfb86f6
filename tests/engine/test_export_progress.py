"""What engine.export shows while it reads, merges, quantises and writes: a bar with an ETA, on a terminal alone."""

import os
import re
from contextlib import contextmanager

import pytest

from engine import export as command
from engine.serving.models import open_weights
from tests.helpers.adapters import write_adapter
from tests.helpers.run import export, finetune
from tests.helpers.small_model import small_model, write_model
from tests.helpers.terminals import Terminal


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    finetune("--model", small_model(), "--data", "orders-held-out", "--max-steps", 1, "--out", out, "--save-every", 1,
             "--warmup-ratio", 0, "--max-length", 256, "--global-batch-size", 8)  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        ([], ["reading", "writing"]),
        (["--max-shard-bytes", "300000"], ["reading", "writing"]),
        (["--layout", "meta"], ["reading", "writing"]),
        (["--layout", "gguf", "--gguf-type", "q8_0"], ["reading", "quantising"]),
        (["--layout", "gguf"], ["reading", "writing"]),
        (["--merge"], ["reading", "merging", "writing"]),
        (["state"], ["reading", "writing"]),
    ],
    ids=["folder", "shards", "meta", "q8_0", "gguf", "merge", "state"],
)
def test_all_that_is_announced_is_counted(flags, labels, adapter, run_folder, tmp_path, monkeypatch):
    """The parameters of a phase are announced before it and counted one tensor after the other, to the last."""
    seen = []

    @contextmanager
    def watch(label, total):
        counts = []
        yield counts.append
        seen.append((label, total, counts))

    monkeypatch.setattr(command, "watch_parameters", watch)
    model = run_folder / "checkpoint-1" if flags == ["state"] else small_model()
    flags = [flag for flag in flags if flag != "state"]
    more = ["--adapter-dir", str(adapter)] if flags == ["--merge"] else []
    out = tmp_path / ("out.gguf" if "gguf" in flags else "out")
    command.main(["--model", str(model), "--out", str(out), *flags, *more])
    assert [label for label, _, _ in seen] == labels
    for label, total, counts in seen:
        assert sum(counts) == total and (len(counts) > 9 or label == "merging")
        assert label == "merging" or total >= open_weights(str(model)).config.n_parameters


EXPORT = """
from engine import export
from engine.base.errors import run_main
from engine.base.terminal import Progress
real = Progress.advance
def advance(self, n=1):
    real(self, n)
    self.live.refresh()  # a small model is done before the bar is drawn again
Progress.advance = advance
sys.exit(run_main(export.main))
"""


def export_on_terminal(*arguments):
    """Return what a terminal shows of an export, whose bar is drawn at each tensor."""
    terminal = Terminal(EXPORT, *arguments, env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"})
    shown = terminal.read_all()
    terminal.process.communicate()
    assert terminal.process.returncode == 0, shown
    terminal.close()
    return shown


def test_a_terminal_shows_each_phase_and_a_pipe_its_result_alone(tmp_path):
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", dim=256, hidden_dim=1024, n_layers=10, head_dim=64)  # of 10.9 M
    flags = ["--model", tmp_path / "model", "--layout", "gguf", "--gguf-type", "q8_0"]
    shown = export_on_terminal(*flags, "--out", tmp_path / "a.gguf")
    for label in ("reading", "quantising"):
        assert re.search(rf"{label}, M parameters 11/11\b.*took \d+s", shown), (label, shown)
        assert re.search(rf"{label}, M parameters \d/11\b.*eta \d+s", shown), (label, shown)
    assert export("--model", small_model(), "--out", tmp_path / "hf").stdout.startswith("wrote ")
