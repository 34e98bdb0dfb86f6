"""EleutherAI's lm-eval on a folder that the export command wrote, offline: the engine's log-likelihoods."""

import sys

import pytest

from scripts.parity.lm_eval_harness import CLOSE, make_rows, run_harness, score_answers
from tests.helpers.run import export
from tests.helpers.small_model import small_model

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install '.[lm-eval]'")


def test_the_same_log_likelihoods(tmp_path):
    model, rows = tmp_path / "model", make_rows(6)
    export("--model", small_model(), "--out", model)
    theirs = run_harness(sys.executable, str(model), rows, tmp_path)
    ours = score_answers(str(model), rows)
    assert len(set(theirs)) == 6 and max(theirs) < -10
    assert all(abs(a - b) < CLOSE * abs(b) for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
