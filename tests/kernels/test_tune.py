"""The tuner: its flow at toy size in the interpreter, its choice, and the launch tables that it writes."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import static, tune
from kernels.compiled.launch_cases import CANDIDATES, FOLLOWS, Case, Make, all_cases
from kernels.ops import common

ROOT = Path(__file__).parents[2]
OP = "rms_norm"


def command(*args, interpreter):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    if not interpreter:
        del env["TRITON_INTERPRET"]
    return subprocess.run(
        [sys.executable, "-m", "kernels.tune", *args],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=250,
    )  # fmt: skip


def tables():
    return {path.name: path.read_text() for path in common.LAUNCH.glob("*.json")}


def test_smoke_goes_through_every_kernel_and_writes_nothing():
    before = tables()
    done = command("--smoke", interpreter=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for op in {case.op for case in all_cases()}:
        for kernel in common.launch_table(op):
            assert f"{op}.{kernel} interpreter" in done.stderr
    assert "failed" not in done.stderr and "not reached" not in done.stderr
    assert tables() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so():
    done = command(interpreter=False)
    assert done.returncode == 2 and "--static" in done.stderr


def test_the_interpreter_is_for_smoke_alone():
    done = command(interpreter=True)
    assert done.returncode == 1 and "TRITON_INTERPRET" in done.stderr


def test_static_ranks_candidates_and_shows_refusals(tmp_path):
    done = command("--static", "--op", "rope", "--chip", "sm_90", interpreter=False)
    assert done.returncode == 0, done.stderr[-3000:]
    blocks = done.stdout.split("rope.rotate sm_90 up to ")[1:]
    assert len(blocks) == len(common.launch_table("rope")["rotate"]["sm_90"])
    for block in blocks:
        rows = [line for line in block.splitlines()[1:] if "KB in flight" in line]
        assert sum(line.lstrip().startswith("*") for line in rows) == 1  # the incumbent
        good = [float(line.replace("*", "").split()[0]) for line in rows if "refused" not in line]
        assert good == sorted(good, reverse=True) and good
        refused = ["refused" in line for line in rows]
        assert refused == sorted(refused)
    assert "refused: wide" in done.stdout  # a tile too small for 128 bits a thread


# ---- choosing -------------------------------------------------------------------------------------------------------


def tuner(monkeypatch, times, minutes=1, chip="sm_90"):
    """A Tuner that measures nothing: times gives the milliseconds of a configuration, math.inf for a wrong one."""
    said = []
    made = tune.Tuner("cpu", chip, minutes, said.append, toy=True)
    monkeypatch.setattr(tune, "SMOKE", 100)
    monkeypatch.setattr(tune, "expected", lambda case, make: None)

    def score(entry, table, cases, answers, base):
        return times(tune.without_source(entry.config(table))), None

    monkeypatch.setattr(made, "score", score)
    return made, said


def entry_and_table(chip="interpreter"):
    table = copy.deepcopy(common.launch_table(OP))
    size = list(table["backward"][chip])[-1]
    return tune.Entry(OP, "backward", chip, size, tuple(all_cases([OP])[:1])), table


@pytest.mark.parametrize(
    ("ratio", "changes"), [(0.97, True), (0.99, False), (1.0, False), (1.5, False), (math.nan, False)]
)
def test_an_entry_changes_for_more_than_noise_alone(monkeypatch, ratio, changes):
    entry, table = entry_and_table()
    incumbent = tune.without_source(entry.config(table))
    made, _ = tuner(monkeypatch, lambda config: 1.0 if config == incumbent else ratio)
    config, won = made.choose(entry, table)
    assert (config != incumbent) == changes
    assert won == (ratio if changes else 1.0)


def test_a_wrong_candidate_is_never_chosen_and_a_wrong_incumbent_is_replaced(monkeypatch):
    entry, table = entry_and_table()
    incumbent = tune.without_source(entry.config(table))
    made, _ = tuner(monkeypatch, lambda config: 1.0 if config == incumbent else math.inf)
    assert made.choose(entry, table)[0] == incumbent
    made, _ = tuner(monkeypatch, lambda config: math.inf if config == incumbent else 5.0)
    assert made.choose(entry, table)[0] != incumbent


def test_out_of_time_leaves_entries_as_they_were(monkeypatch):
    made, _ = tuner(monkeypatch, lambda config: 1.0, minutes=0)
    entry, table = entry_and_table()
    assert made.choose(entry, table) is None


def test_tune_writes_what_it_measured_and_returns_what_it_did_not_reach(monkeypatch):
    written = {}
    made, said = tuner(monkeypatch, lambda config: 1.0 / config["num_warps"], chip="interpreter")
    left = made.tune(OP, lambda op, table: written.update({op: copy.deepcopy(table)}))
    assert left == [] and len(said) == len(common.launch_table(OP))
    for kernel, by_chip in common.launch_table(OP).items():
        (new,) = written[OP][kernel]["interpreter"].values()
        most = max(CANDIDATES[OP][kernel].get("num_warps", (1,)))
        assert new["num_warps"] == max(most, next(iter(by_chip["interpreter"].values()))["num_warps"])
        assert new["from"].startswith("measured on no device, Triton ")
        assert written[OP][kernel]["sm_90"] == by_chip["sm_90"]


def test_candidates_begin_with_the_incumbent_and_differ():
    for op, kernels in CANDIDATES.items():
        for kernel in kernels:
            for size, incumbent in common.launch_table(op)[kernel]["sm_90"].items():
                configs = tune.candidates(tune.Entry(op, kernel, "sm_90", size, ()), incumbent)
                assert configs[0] == tune.without_source(incumbent) and len(configs) > 1
                assert all(configs[0].keys() == config.keys() for config in configs), (
                    f"{op}.{kernel}: no such constexpr"
                )
                assert len({json.dumps(config, sort_keys=True) for config in configs}) == len(configs)


def test_every_kernel_of_a_launch_table_has_candidates():
    tabled = {(path.stem, kernel) for path in common.LAUNCH.glob("*.json") for kernel in common.launch_table(path.stem)}
    assert tabled == {(op, kernel) for op, kernels in CANDIDATES.items() for kernel in kernels}


def test_a_kernel_that_follows_takes_the_tile_over():
    for (op, kernel), (follower, names) in FOLLOWS.items():
        table = common.launch_table(op)
        entry = tune.Entry(op, kernel, "sm_90", next(iter(table[kernel]["sm_90"])), ())
        config = tune.without_source(entry.config(table)) | dict.fromkeys(names, 77)
        new = tune.with_config(table, entry, config)
        assert all(new[follower]["sm_90"][entry.size][name] == 77 for name in names)
        assert table[follower]["sm_90"][entry.size] != new[follower]["sm_90"][entry.size]
        for size, values in table[kernel]["sm_90"].items():  # as shipped, too
            assert all(values[name] == table[follower]["sm_90"][size][name] for name in names)


# ---- checking -------------------------------------------------------------------------------------------------------


def test_errors_are_those_of_the_launch():
    def double(x):
        return x * 2

    def almost(x):
        return x * 2.01

    double.cpu, almost.launch = double, almost
    make = Make("cpu", **tune.TOY)
    own, truth = tune.expected(Case("o", "c", lambda make: (double, make(4, 4))), make)
    ((error, allowed), (unchanged, _)) = tune.errors(
        Case("o", "c", lambda make: (almost, make(4, 4))), make, own, truth
    )
    assert 0.005 < error < 0.1 and allowed < 1e-5 and unchanged == 0
    assert tune.off([(error, allowed)], [(allowed, allowed)]) and not tune.off([(error, allowed)], [(error, allowed)])
    assert tune.off([(math.nan, 1.0)], None) and tune.off([(math.nan, 1.0)], [(1.0, 1.0)])
    assert tune.off([(math.inf, 1.0)], None) and not tune.off([(0.5, 1.0)], [(0.0, 1.0)])


def test_an_overwritten_argument_is_an_error():
    def clean(x):
        return x * 2

    def dirty(x):
        x.add_(1)
        return (x - 1) * 2

    clean.cpu, clean.launch = clean, dirty
    make = Make("cpu", **tune.TOY)
    case = Case("o", "c", lambda make: (clean, make(4, 4)))
    assert tune.off(tune.errors(case, make, *tune.expected(case, make)), [(0.0, 0.0)] * 2)


# ---- launch tables --------------------------------------------------------------------------------------------------


def test_a_launch_table_is_written_one_configuration_a_line(tmp_path):
    for path in common.LAUNCH.glob("*.json"):
        tune.write_launch_table(path.stem, json.loads(path.read_text()), tmp_path)
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name
    assert not list(tmp_path.glob("*.new"))


def test_entries_are_what_cases_read():
    table = common.launch_table("rope")
    with static.patched(common, chip_override=None):
        found = tune.entries("rope", "sm_90", Make(), table) if not common.INTERPRETED else None
    found = found or tune.entries("rope", "interpreter", Make("cpu", **tune.TOY), table)
    assert [(e.op, e.kernel) for e in found] == [("rope", "rotate")] * len(found) and found
    assert sum(len(e.cases) for e in found) == len(all_cases(["rope"]))
