"""Loss curves: every setting reaches the run, its figures the file, and the distance is that of the worst step."""

import json
import os
from types import SimpleNamespace

import pytest

from scripts.parity import curves, kernel_curve, optimizer_states
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


def stand_in_runs(monkeypatch, module, curve_of):
    """Let finetune_curve of a module give curve_of(function from a flag to its value); return the folders of --out."""
    outs = []

    def run(args, out, *flags, environment=None):
        outs.append(out)
        return curve_of(lambda flag: flags[flags.index(flag) + 1])

    monkeypatch.setattr(module, "finetune_curve", run)
    return outs


def test_kernels_are_held_against_references(monkeypatch, tmp_path, call_main):
    of_kernels = {"triton": [(2.0, 1.0), (1.1, 1.0)], "ref": [(2.0, 1.0), (1.0, 1.0)]}
    stand_in_runs(monkeypatch, kernel_curve, lambda value_of: of_kernels[value_of("--kernels")])
    call_main(kernel_curve, "--json", tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["loss"] == {"kernels": [2.0, 1.1], "references": [2.0, 1.0]}
    assert found["worst_relative_difference"] == pytest.approx({"loss": 0.1, "grad_norm": 0.0})


def test_8_bit_states_are_held_against_fp32_over_the_last_tenth(monkeypatch, tmp_path, call_main):
    losses = {"fp32": [8.0] + [2.0] * 18 + [1.0] * 2, "8bit": [10.0] + [2.0] * 18 + [1.1] * 2}
    curve_of = lambda value_of: [(loss, 1.0) for loss in losses[value_of("--optimizer-states")]]  # noqa: E731
    outs = stand_in_runs(monkeypatch, optimizer_states, curve_of)
    call_main(optimizer_states, "--json", tmp_path / "x.json", "--steps", 20, "--runs", tmp_path / "kept")
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["loss"] == losses and found["final_loss"] == pytest.approx({"fp32": 1.0, "8bit": 1.1})
    assert found["final_relative_difference"]["8bit"] == pytest.approx(0.1)
    assert found["worst_relative_difference"]["8bit"] == pytest.approx(0.25)
    assert {out.parent for out in outs} == {tmp_path / "kept"} and len(set(outs)) == 2  # a second start goes on
