"""Loss curves: every setting reaches the run, its figures the file, and the distance is that of the worst step."""

import json
import os
from types import SimpleNamespace

import pytest

from scripts.parity import curves
from scripts.parity.curves import describe_settings, finetune_curve, new_curve_parser, worst_difference

SETTINGS = {"steps": 3, "batch": 5, "max_length": 7, "lr": 0.5}
OF_FINETUNE = {"steps": "--max-steps", "batch": "--global-batch-size", "max_length": "--max-length", "lr": "--lr"}


def test_the_worst_step_of_each_figure_counts_above_the_reference_or_below_it():
    reference = [(2.0, 10.0), (4.0, 10.0), (1.0, 10.0)]
    for curve, worst in (
        (reference, (0.0, 0.0)), ([(2.0, 10.0), (4.4, 9.0), (1.0, 10.5)], (0.1, 0.1)),
        ([(1.0, 10.0), (4.4, 10.0), (1.0, 12.5)], (0.5, 0.25)),
    ):  # fmt: skip
        assert worst_difference(curve, reference) == pytest.approx({"loss": worst[0], "grad_norm": worst[1]})


def test_a_curve_of_another_length_has_no_distance():
    with pytest.raises(ValueError):
        worst_difference([(1.0, 1.0)], [(1.0, 1.0), (1.0, 1.0)])


def parse(*words):
    return new_curve_parser("", steps=1, batch=1, max_length=1, lr=1.0).parse_args(["--json", "x", *words])


def test_every_setting_reaches_the_run(monkeypatch, tmp_path):
    """Each has its own number; so have the flags and the environment of a caller."""
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    args, started = parse(*flags), []

    def run(command, check, env):
        started.append((command, check, env))
        lines = [{"event": "train", "loss": 2.0, "grad_norm": 3.0}, {"event": "eval", "loss": 9.0}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(curves, "subprocess", SimpleNamespace(run=run))
    assert finetune_curve(args, tmp_path, "--kernels", "ref", environment={"MINE": "1"}) == [(2.0, 3.0)]
    ((command, check, env),) = started
    given = dict(zip(command[3::2], command[4::2], strict=True))
    assert check and env == os.environ | {"MINE": "1"} and command[1:3] == ["-m", "engine.finetune"]
    assert {name: float(given[flag]) for name, flag in OF_FINETUNE.items()} == SETTINGS == describe_settings(args)
    assert given["--kernels"] == "ref" and given["--dtype"] == "fp32" and given["--out"] == str(tmp_path)
