"""The tuner's choice, its clock's results aside, and its check of results."""

import copy
import datetime
import math
from types import SimpleNamespace

import pytest
import torch
import triton

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


# ---- what reaches the parts -----------------------------------------------------------------------------------------


def test_tensors_are_found_in_lists_and_tuples():
    a, b, c = torch.ones(1), torch.zeros(2), torch.ones(3)
    assert [len(t) for t in tuner.find_tensors(a, 3, [b, ("x", [c])], None)] == [1, 2, 3]


@pytest.mark.parametrize("fails", [None, RuntimeError, ValueError, TypeError, triton.TritonError])
def test_the_truth_is_fp64_where_an_op_takes_it(fails):
    """Numbers widen, integers stay; nothing that the op writes is shared between both runs."""
    given = []

    def op(x, numbers, scale):
        given.append((x.dtype, numbers[0].dtype, scale))
        if fails and x.dtype == torch.float64:
            raise fails("bits of fp32")
        x.mul_(scale)
        return x + numbers[0], [numbers[0] * 2]

    op.cpu = op
    make = Make("cpu", **tuner.TOY)

    def build(make):
        return op, make(3, 2), (make.integers(3, 2, high=5),), 0.3

    own, truth = tuner.expected_results(Case("o", "c", build), make)
    assert given == [(torch.float32, torch.int64, 0.3), (torch.float64, torch.int64, 0.3)]
    torch.manual_seed(0)
    x, n = make(3, 2), make.integers(3, 2, high=5)
    for found, dtype in ((own, torch.float32), (truth, torch.float32 if fails else torch.float64)):
        assert [t.dtype for t in found] == [dtype, torch.int64, dtype, torch.int64]
        wide = x.to(dtype) * 0.3
        for a, b in zip(found, (wide + n, n * 2, wide, n), strict=True):
            assert torch.equal(a, b)


def test_what_is_allowed_is_twice_torchs_error_and_one_rounding():
    def op(x):
        return x

    op.launch = lambda x: (x * 4 + 1, torch.zeros(0), torch.ones(2, dtype=torch.int32))
    make = Make("cpu", **tuner.TOY)
    case = Case("o", "c", lambda make: (op, make(5, 5)))
    torch.manual_seed(0)
    x = make(5, 5)
    others = [torch.zeros(0), torch.ones(2, dtype=torch.int32), x]
    own = [(x.double() * 4 + 0.25).bfloat16(), *others]
    (error, allowed), (same, _) = tuner.measure_errors(case, make, own, [x.double() * 4, *others])
    torchs = (own[0].double() - x.double() * 4).abs().max()
    assert error == pytest.approx(1.0, abs=1e-5) and same == 0
    assert allowed == pytest.approx(float(2 * torchs + 2**-7 * (x.double() * 4).abs().max()), rel=1e-6)


def test_a_problem_is_the_first_error_that_is_too_large():
    wrong = tuner.find_problem([(1.0, 2.0), (0.25, 0.1), (9.0, 0.1)], [(1.0, 2.0), (0.1, 1.0), (1.0, 1.0)])
    assert wrong == "result 1 is off by 2.5e-01, wanted at most 2.0e-01"
    assert tuner.find_problem([(2.0, 2.0), (0.2, 0.1)], [(0.0, 9.0), (0.1, 9.0)]) is None
    assert tuner.find_problem([(9.0, 0.0)], None) is None


@pytest.mark.parametrize(("device", "repeats"), [("cuda", tuner.REPEATS), ("cpu", 1)])
def test_a_launch_is_timed_over_sets_that_exceed_the_l2_twice(device, repeats, monkeypatch):
    built, counted, timed, called = [], [], [], []

    def build(make):
        built.append(make)
        return len(built), torch.zeros(10), [torch.zeros(3, dtype=torch.float64)]

    def steps(sets, repeats, flush, warmup):
        ((step,),) = sets
        step(None)
        timed.append((repeats, flush(), warmup))
        return [(12.0, 3.0, 60.0)]

    monkeypatch.setattr(tuner, "count_input_sets", lambda n, **named: counted.append((n, named)) or 4)
    monkeypatch.setattr(tuner, "time_steps", steps)
    monkeypatch.setattr(tuner, "call_case", lambda call: called.append(call[0]))
    make = SimpleNamespace(device=torch.device(device))
    assert tuner.measure_ms(Case("o", "c", build), make) == 3.0  # the median of three, of four launches
    assert counted == [(64, {"times_l2": 2, "most": tuner.MAX_SETS})] and timed == [(repeats, None, 1)]
    assert called == [1, 2, 3, 4] and built == [make] * 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("toy", [False, True])
def test_a_tuner_measures_full_sizes_and_checks_small_ones(device, toy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H200 of {device}")
    monkeypatch.setattr(tuner.time, "monotonic", lambda: 100.0)
    made = tuner.Tuner(device, "sm_90", 1.5, print, toy=toy, workers=3)
    facts = [(m.device.type, m.tokens, m.largest, m.dtype) for m in (made.make, made.small)]
    small = [(device, 24, 64, torch.float32)] * 2
    assert facts == (small if toy else [(device, n, 1 << 30, torch.bfloat16) for n in (8192, 515)])
    name = "H200 of cuda" if device == "cuda" else "no device"
    assert made.source == f"measured on {name}, Triton {triton.__version__}, {datetime.date.today()}"
    assert (made.chip, made.show, made.toy, made.workers) == ("sm_90", print, toy, 3)
    moments = iter((100.0, 190.0, 190.1))
    monkeypatch.setattr(tuner.time, "monotonic", lambda: next(moments))
    assert [made.is_late() for _ in range(3)] == [False, False, True]


def of_two_cases(monkeypatch, found):
    """Return a tuner, an entry of two cases, and its table. found: case -> (errors, milliseconds) or an error."""
    said, used = [], []
    made = tuner.Tuner("cpu", "sm_90", 1, said.append, toy=True)
    entry, table = entry_and_table("sm_90")
    entry = entry._replace(cases=(Case(OP, "first", None), Case(OP, "second", None)))

    def errors(case, make, own, truth):
        used.append((case.label, own, truth, common.launch_table(OP) is table, common.chip_override))
        assert make is made.small
        if isinstance(found[case.label], Exception):
            raise found[case.label]
        return found[case.label][0]

    def ms(case, make):
        assert make is made.make
        return found[case.label][1]

    monkeypatch.setattr(tuner, "measure_errors", errors)
    monkeypatch.setattr(tuner, "measure_ms", ms)
    return made, entry, table, said, used


def test_a_score_is_the_geometric_mean_of_the_cases(monkeypatch):
    small, large = [(0.1, 1.0)], [(5.0, 1.0)]
    found = {"first": (small, 2.0), "second": (large, 8.0)}
    made, entry, table, said, used = of_two_cases(monkeypatch, found)
    expected = [("own 1", "truth 1"), ("own 2", "truth 2")]
    score, errors = made.score(entry, table, entry.cases, expected, None)
    assert score == pytest.approx(4.0) and errors == [small, large] and said == []
    assert used == [("first", *expected[0], True, "sm_90"), ("second", *expected[1], True, "sm_90")]
    score, errors = made.score(entry, table, entry.cases, expected, [small, [(3.0, 1.0)]])
    assert score == pytest.approx(4.0)
    config = drop_source(entry.config(table))
    for incumbent, problem in (([small, small], "result 0 is off by 5.0e+00, wanted at most 1.0e+00"),):
        assert made.score(entry, table, entry.cases, expected, incumbent) == (math.inf, None)
        assert said.pop() == f"{entry}: {config} in second: {problem}"
    for error in (RuntimeError("out of memory"), triton.TritonError("no")):
        found["first"] = error
        assert made.score(entry, table, entry.cases, expected, None) == (math.inf, None)
        assert said.pop() == f"{entry}: {config} in first: {type(error).__name__}: {error}"
    assert said == []


@pytest.mark.parametrize("toy", [False, True])
def test_candidates_are_compared_with_the_incumbents_errors(toy, monkeypatch):
    """A quick try measures the first case and the first two candidates, of which none is refused."""
    entry, table = entry_and_table("sm_90")
    entry = entry._replace(cases=tuple(all_cases([OP])[:2]))
    made = tuner.Tuner("cpu", "sm_90", 1, print, toy=toy)
    configs = candidates.list_candidates(entry, entry.config(table))
    given, accepted = [], []
    monkeypatch.setattr(made, "_accepted", lambda *args: accepted.append(args) or configs[:3])
    monkeypatch.setattr(tuner, "expected_results", lambda case, make: (case.label, make))

    def score(of, tried, cases, expected, incumbent):
        given.append((drop_source(of.config(tried)), [case.label for case in cases], expected, incumbent))
        return 10.0 - len(given), ["errors", len(given)]

    monkeypatch.setattr(made, "score", score)
    best, ratio = made.choose(entry, table)
    n, cases = (2, entry.cases[:1]) if toy else (3, entry.cases)
    assert accepted == ([] if toy else [(entry, table, configs)])
    labels = [case.label for case in cases]
    expected = [(label, made.small) for label in labels]
    assert given == [(configs[i], labels, expected, ["errors", 1] if i else None) for i in range(n)]
    assert best == configs[n - 1] and ratio == (10 - n) / 9


def test_what_becomes_of_each_entry_is_said(monkeypatch):
    """Kept, replaced, or left as it is where nothing could be measured; what is new is read by the next entry."""
    said, written, advanced = [], [], []
    made = tuner.Tuner("cpu", "interpreter", 1, said.append, toy=True)
    entries = candidates.find_entries(OP, "interpreter", made.small, common.launch_table(OP))
    seen = []

    def choose(entry, table):
        seen.append(table)
        incumbent = drop_source(entry.config(table))
        return [(incumbent, 1.0), (incumbent | {"num_warps": 77}, 0.51234), (incumbent, math.nan), None][len(seen) - 1]

    monkeypatch.setattr(made, "choose", choose)
    monkeypatch.setattr(tuner, "find_entries", lambda op, chip, make, table: [*entries[:3], entries[0]])
    left = made.tune(OP, lambda op, table: written.append((op, table)), lambda: advanced.append(1))
    old = [drop_source(entry.config(common.launch_table(OP))) for entry in entries]
    assert said == [
        f"{entries[0]}: {old[0]} kept",
        f"{entries[1]}: {old[1]} -> {old[1] | {'num_warps': 77}}, 0.512 of its time",
        f"{entries[2]}: {old[2]} itself failed and nothing beat it; left as it is",
    ]
    assert left == [entries[0]] and len(advanced) == 3 and [op for op, _ in written] == [OP, OP]
    assert entries[0].config(written[0][1])["from"] == made.source == entries[1].config(seen[2])["from"]
    assert seen[2] is written[1][1] and common.launch_table(OP) == seen[0] is not common.launch_table(OP)
