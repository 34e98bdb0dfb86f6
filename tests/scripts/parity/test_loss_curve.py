"""One curve by transformers and by us: what each is given, and every figure."""

import json
from types import SimpleNamespace

import pytest

from tests.helpers.calls import Calls


@pytest.fixture
def loss_curve(load_beside_stand_in):
    return load_beside_stand_in("scripts.parity.loss_curve")


def test_the_whole_comparison(loss_curve, monkeypatch, tell, snapshot, tmp_path):
    """transformers gets the file's rows, a batch a step; a curve of ours is of its own micro-batch."""
    calls, taken = Calls(), iter(range(1, 9))
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    loop = calls.thing("loop", step=lambda examples, micro: (4.0 / next(taken), 1.0))

    def curve(args, out, *flags):
        micro = flags[flags.index("--micro-batch-size") + 1]
        return [(4.0 * (1 + micro / 16) / step, 1.0 + micro / 4) for step in (1, 2, 3)]

    tokenizers = SimpleNamespace(from_pretrained=calls.stand_in("tokenizer", "their tokenizer"))
    ids = lambda rows, tokenizer, n: [([1] * (5 + i), row["output"]) for i, row in enumerate(rows)]  # noqa: E731
    monkeypatch.setattr(loss_curve.transformers, "AutoTokenizer", tokenizers)
    for name, result in {
        "TransformersLoop": loop, "run_module": None, "finetune_curve": curve, "encode_rows": ids
    }.items():  # fmt: skip
        monkeypatch.setattr(loss_curve, name, calls.stand_in(name, result))
    monkeypatch.setattr(loss_curve.tempfile, "TemporaryDirectory", calls.folder)
    flags = ("--data", tmp_path / "rows.json", "--steps", 3, "--batch", 2, "--micro", 1, 2, "--lr", 0.25)
    text = tell(loss_curve, *flags, "--max-length", 64)
    assert text + "\n" + calls.text().replace(str(tmp_path), "FOLDER") == snapshot


def test_by_default_four_micro_batches_are_compared(loss_curve, monkeypatch, call_main):
    monkeypatch.setattr(loss_curve, "run_module", lambda *_: None)
    monkeypatch.setattr(loss_curve, "read_rows", lambda paths: ([], []))
    monkeypatch.setattr(loss_curve, "encode_rows", lambda *_: [])
    tokenizers = SimpleNamespace(from_pretrained=lambda folder: None)
    monkeypatch.setattr(loss_curve.transformers, "AutoTokenizer", tokenizers, raising=False)
    told = []

    def stop(args, *_):
        told.append(vars(args))
        raise InterruptedError

    monkeypatch.setattr(loss_curve, "transformers_curve", stop)
    with pytest.raises(InterruptedError):
        call_main(loss_curve, "--json", "x", "--data", "y")
    assert told == [
        {"json": "x", "data": "y", "steps": 20, "batch": 8, "max_length": 512, "lr": 2e-5, "micro": [1, 2, 4, 8]}
    ]  # fmt: skip
