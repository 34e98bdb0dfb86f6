"""Every file of examples/ runs, from another folder, and prints what it says."""

import re
import runpy

import pytest
import torch

from engine.model.config import MODELS
from engine.model.llama import new_model
from tests.helpers.run import ROOT, finetune
from tests.helpers.small_model import small_model

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "library.md").read_text()


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def run(name, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *map(str, args)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_page_names_every_example():
    assert set(re.findall(r"\(\.\./examples/(\w+\.py)\)", PAGE)) == set(EXAMPLES)


def test_logits(run):
    said = run("logits.py", small_model()).splitlines()
    assert len(said) == 3 and all(0 < float(line.split()[-1]) < 1 for line in said)


def test_own_module(run):
    assert re.fullmatch(r"\(10, 64\) gradient of W13: \d+\.\d{3}\n", run("own_module.py"))


def test_pack_rows(run):
    said = run("pack_rows.py", small_model())
    found = re.match(r"(\d+) rows of the tensors for (\d+) tokens in 3 examples\n", said)
    assert found and int(found[1]) < int(found[2])  # the template is computed once


def test_training_loop(run):
    losses = [float(line.split()[-1]) for line in run("training_loop.py", small_model()).splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_read_checkpoint(run, rows_file, tmp_path):
    out = tmp_path / "out"
    finetune("--model", small_model(), "--data", rows_file, "--out", out, "--max-steps", 2, "--save-every", 1)
    said = run("read_checkpoint.py", out / "checkpoint-1")
    assert re.match(r"step 1, [\d,]+ parameters in torch\.\w+, style alpaca\n", said)


def test_a_plain_row_needs_no_documents_and_no_positions():
    model = new_model(MODELS["tiny"], "cpu", torch.float32)
    model.init_weights(0)
    tokens = torch.arange(5, 17)
    named = model(tokens, torch.arange(12), torch.tensor([[0, 12, 0, 0]], dtype=torch.int32))
    assert model(tokens).equal(named)
