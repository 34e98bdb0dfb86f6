"""The ledger of a judge: requests of this run under the numbers of what they send."""

import contextlib

from data_gen.judging.comparisons import VerdictLedger


def test_outcomes_come_in_the_order_of_this_runs_requests_and_no_others(tmp_path):
    """Whatever order an earlier run asked them in, and whatever else it asked."""
    with contextlib.closing(VerdictLedger(tmp_path)) as ledger:
        ledger.numbers = (40, 30, 10, 20)
        for request in (3, 0, 2, 1):
            attempt, intent = ledger.prepare_intent(request, "-", "m", 5)
            kind = "failed" if request == 2 else "refused" if request == 0 else "answer"
            ledger.commit([intent, ledger.prepare_outcome(attempt, kind, 200, f"body {request}")])
        found = [(entry.request, entry.kind, entry.body) for entry in ledger.read_outcomes()]
        assert found == [(0, "refused", "body 0"), (1, "answer", "body 1"), (3, "answer", "body 3")]
        ledger.numbers = (20, 5, 40)  # of a run on other answers
        assert [(entry.request, entry.body) for entry in ledger.read_outcomes()] == [(0, "body 3"), (2, "body 0")]
        assert set(ledger.read_seconds()) == {1, 4}
