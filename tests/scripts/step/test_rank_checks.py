"""Checks of ranks on one device: what is wrong or not possible is reported as such."""

import math
import os

import pytest

from engine.output import checkpoint
from scripts.step import rank_checks
from scripts.step.bench import Variant
from scripts.step.rank_checks import Differs
from tests.helpers.forks import Started


@pytest.fixture
def variant():
    return Variant("tinyllama-1.1b", steps=2, warmup=1)


@pytest.mark.parametrize(
    ("value", "is_right"), [(0.0, True), (1.0, True), (1.001, False), (math.inf, False), (math.nan, False)]
)
def test_a_difference_over_the_most_that_is_wanted_is_told_and_nan_is_one(value, is_right):
    if is_right:
        assert rank_checks.check_difference("losses", value, 1.0) == value
    else:
        with pytest.raises(Differs, match=r"losses: .* apart, wanted at most 1\.00e\+00"):
            rank_checks.check_difference("losses", value, 1.0)


def test_a_difference_counts_to_either_side():
    assert rank_checks.relative_difference(3.0, 2.0) == rank_checks.relative_difference(1.0, 2.0) == 0.5
    assert rank_checks.relative_difference(-3.0, -2.0) == 0.5


def test_a_state_that_is_read_back_otherwise_is_told(variant, monkeypatch):
    load = checkpoint.load

    def flipped(folder, tensors):
        load(folder, tensors)
        next(iter(tensors.values())).tensor.view(-1)[0] += 1

    monkeypatch.setattr(checkpoint, "load", flipped)
    with pytest.raises(Differs, match="1 tensors of a state that was read back, plain"):
        rank_checks.check_one_rank(variant, smoke=True)


@pytest.mark.parametrize("name", ["loss", "norm"])
@pytest.mark.parametrize("times", [4, 4.1])
def test_a_whole_curve_may_differ_by_four_roundings(name, times, variant, monkeypatch):
    apart = {f"largest_{one}_apart": 0.0 for one in ("loss", "norm")}
    apart[f"largest_{name}_apart"] = times * rank_checks.ROUNDING
    monkeypatch.setattr(rank_checks, "run_block", lambda *_: None)
    monkeypatch.setattr(rank_checks, "compare_curves", lambda *_: apart)
    monkeypatch.setattr(rank_checks, "check_save_and_resume", lambda *_: {"saved_bytes": 1})
    if times > 4:
        with pytest.raises(Differs, match=f"{name} of 6 steps"):
            rank_checks.check_one_rank(variant, smoke=True)
    else:
        assert rank_checks.check_one_rank(variant, smoke=True).items() >= {**apart, "saved_bytes": 1}.items()


class Rank(Started):
    """A rank's process, forked from one that has imported the engine."""

    def __init__(self, folder, out, place):
        environment = os.environ | place | {"MASTER_ADDR": "127.0.0.1"}
        super().__init__(rank_checks.RANK_CODE, *rank_checks.finetune_flags(folder, out), env=environment)
        self.log = folder / f"{out.name}-{place['RANK']}.log"

    def wait(self, timeout=None):
        self.log.write_text("".join(self.communicate(timeout)))
        return self.returncode


def test_two_ranks_of_one_device(monkeypatch):
    monkeypatch.setattr(rank_checks, "start_rank", Rank)
    monkeypatch.setattr(rank_checks, "RANKS_LIMIT_S", 280)
    found = rank_checks.check_two_ranks(smoke=True)
    assert found["steps"] == 4 and found["largest_loss_apart"] < 1e-5 and found["largest_norm_apart"] < 1e-5


@pytest.fixture
def ended(monkeypatch):
    """Ranks that end as told, and what they wrote."""

    def of(codes, log):
        def finetuned(folder, runs):
            (folder / "two-0.log").write_text("a note\n")
            (folder / "two-1.log").write_text(log)
            return codes

        monkeypatch.setattr(rank_checks, "finetune_with_ranks", finetuned)

    return of


def test_what_ranks_of_one_card_cannot_do_is_told_and_what_is_broken_fails(ended):
    ended([77, 77, 0], "x\nnot possible: gloo between ranks of one card: no such op\n")
    found = rank_checks.check_two_ranks(smoke=True)
    assert found == {"absent": "not possible: gloo between ranks of one card: no such op"}
    ended([1, 1, 0], "error: rank 1 broke\n")
    with pytest.raises(RuntimeError, match=r"exit codes \[1, 1, 0\] of two ranks and of one: rank 1 broke"):
        rank_checks.check_two_ranks(smoke=True)
    ended([0, -9, 0], "")
    with pytest.raises(RuntimeError, match=r"-9.*a note"):
        rank_checks.check_two_ranks(smoke=True)


def test_wrong_collectives_are_told(monkeypatch):
    with rank_checks.one_rank():
        rank_checks.check_collectives("cpu")
        monkeypatch.setattr(rank_checks, "reduce_scatter", lambda part, whole: part.zero_())
        with pytest.raises(Differs, match="reduce_scatter over 1 ranks"):
            rank_checks.check_collectives("cpu")
