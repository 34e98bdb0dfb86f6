"""The tuner's choice, its clock's results aside, and its check of results."""

import copy
import math

import pytest

from kernels.compiled.launch_cases import Case, Make, all_cases
from kernels.measure import candidates, tuner
from kernels.measure.candidates import CANDIDATES, Entry, drop_source
from kernels.ops import common

OP = "rms_norm"


def unmeasured(monkeypatch, times, minutes=1, chip="sm_90"):
    """A Tuner that measures nothing: times gives the milliseconds of a configuration, math.inf for a wrong one."""
    said = []
    made = tuner.Tuner("cpu", chip, minutes, said.append, toy=True)
    monkeypatch.setattr(tuner, "SMOKE", 100)
    monkeypatch.setattr(tuner, "expected_results", lambda case, make: None)

    def score(entry, table, cases, answers, base):
        return times(drop_source(entry.config(table))), None

    monkeypatch.setattr(made, "score", score)
    return made, said


def entry_and_table(chip="interpreter"):
    table = copy.deepcopy(common.launch_table(OP))
    size = list(table["backward"][chip])[-1]
    return Entry(OP, "backward", chip, size, tuple(all_cases([OP])[:1])), table


@pytest.mark.parametrize(
    ("ratio", "changes"), [(0.97, True), (0.99, False), (1.0, False), (1.5, False), (math.nan, False)]
)
def test_an_entry_changes_for_more_than_noise_alone(monkeypatch, ratio, changes):
    entry, table = entry_and_table()
    incumbent = drop_source(entry.config(table))
    made, _ = unmeasured(monkeypatch, lambda config: 1.0 if config == incumbent else ratio)
    config, won = made.choose(entry, table)
    assert (config != incumbent) == changes
    assert won == (ratio if changes else 1.0)


def test_a_wrong_candidate_is_never_chosen_and_a_wrong_incumbent_is_replaced(monkeypatch):
    entry, table = entry_and_table()
    incumbent = drop_source(entry.config(table))
    made, _ = unmeasured(monkeypatch, lambda config: 1.0 if config == incumbent else math.inf)
    assert made.choose(entry, table)[0] == incumbent
    made, _ = unmeasured(monkeypatch, lambda config: math.inf if config == incumbent else 5.0)
    assert made.choose(entry, table)[0] != incumbent


@pytest.mark.parametrize("refused", [set(), {1, 3}, {0}, {0, 1, 2, 3}])
def test_the_incumbent_stays_the_first_though_the_gate_refuses_it(refused, monkeypatch):
    """The others are measured against it, so that what replaces it is faster than what ships."""
    entry, table = entry_and_table()
    configs = candidates.list_candidates(entry, entry.config(table))[:4]
    made, said = unmeasured(monkeypatch, lambda config: 1.0)
    monkeypatch.setattr(
        tuner, "try_tables", lambda *_: [[(None, None, ["wide"] * (i in refused))] * 2 for i in range(len(configs))]
    )
    assert made._accepted(entry, table, configs) == [c for i, c in enumerate(configs) if i not in refused - {0}]
    assert said == [f"{entry}: 4 candidates, {len(refused)} refused by the static gate"]


def test_out_of_time_leaves_entries_as_they_were(monkeypatch):
    made, _ = unmeasured(monkeypatch, lambda config: 1.0, minutes=0)
    entry, table = entry_and_table()
    assert made.choose(entry, table) is None


def test_tune_writes_what_it_measured_and_returns_what_it_did_not_reach(monkeypatch):
    written = {}
    made, said = unmeasured(monkeypatch, lambda config: 1.0 / config["num_warps"], chip="interpreter")
    left = made.tune(OP, lambda op, table: written.update({op: copy.deepcopy(table)}))
    assert left == [] and len(said) == len(common.launch_table(OP))
    for kernel, by_chip in common.launch_table(OP).items():
        (new,) = written[OP][kernel]["interpreter"].values()
        most = max(CANDIDATES[OP][kernel].get("num_warps", (1,)))
        assert new["num_warps"] == max(most, next(iter(by_chip["interpreter"].values()))["num_warps"])
        assert new["from"].startswith("measured on no device, Triton ")
        assert written[OP][kernel]["sm_90"] == by_chip["sm_90"]


def test_errors_are_those_of_the_launch():
    def double(x):
        return x * 2

    def almost(x):
        return x * 2.01

    double.cpu, almost.launch = double, almost
    make = Make("cpu", **tuner.TOY)
    own, truth = tuner.expected_results(Case("o", "c", lambda make: (double, make(4, 4))), make)
    ((error, allowed), (unchanged, _)) = tuner.measure_errors(
        Case("o", "c", lambda make: (almost, make(4, 4))), make, own, truth
    )
    assert 0.005 < error < 0.1 and allowed < 1e-5 and unchanged == 0
    assert tuner.find_problem([(error, allowed)], [(allowed, allowed)]) and not tuner.find_problem(
        [(error, allowed)], [(error, allowed)]
    )
    assert tuner.find_problem([(math.nan, 1.0)], None) and tuner.find_problem([(math.nan, 1.0)], [(1.0, 1.0)])
    assert tuner.find_problem([(math.inf, 1.0)], None) and not tuner.find_problem([(0.5, 1.0)], [(0.0, 1.0)])


def test_an_overwritten_argument_is_an_error():
    def clean(x):
        return x * 2

    def dirty(x):
        x.add_(1)
        return (x - 1) * 2

    clean.cpu, clean.launch = clean, dirty
    make = Make("cpu", **tuner.TOY)
    case = Case("o", "c", lambda make: (clean, make(4, 4)))
    assert tuner.find_problem(tuner.measure_errors(case, make, *tuner.expected_results(case, make)), [(0.0, 0.0)] * 2)
