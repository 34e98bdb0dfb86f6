"""The signals that stop a run, and the settings that it keeps to."""

import signal
from types import SimpleNamespace

import pytest

from data_gen.api.running import check_settings, list_stop_signals
from data_gen.base.cli import UsageError


@pytest.mark.parametrize("is_under_nohup", [False, True])
def test_a_hang_up_stops_a_run_unless_it_is_ignored(is_under_nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_under_nohup else signal.SIG_DFL)
    try:
        stops = set(list_stop_signals())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stops == {signal.SIGINT, signal.SIGTERM} | (set() if is_under_nohup else {signal.SIGHUP})


@pytest.mark.parametrize("allow_changed", [False, True])
@pytest.mark.parametrize("recorded", [None, "same", "another"])
def test_a_ledger_keeps_to_the_settings_it_was_begun_with(recorded, allow_changed):
    sampling = SimpleNamespace(model="m", max_output_tokens=9, temperature=1.0, extra={})
    builder = SimpleNamespace(sampling=sampling, prompter=SimpleNamespace(compute_fingerprint=lambda: {"seed": 0}))
    now = {"seed": 0, "model": "m", "max_output_tokens": 9, "temperature": 1.0, "extra": {}}
    settings = {None: {}, "same": {"requests": now}, "another": {"requests": now | {"seed": 1, "model": "n"}}}[recorded]
    written = []
    ledger = SimpleNamespace(
        read_settings=lambda: settings, write_settings=lambda **values: written.append(values), path="out/ledger"
    )
    if recorded == "another" and not allow_changed:
        told = "out/ledger was begun with other settings: seed was 1, is 0; model was 'n', is 'm'; pass another --out"
        with pytest.raises(UsageError, match=f"^{told}, or --allow-changed$"):
            check_settings(ledger, builder, allow_changed)
        assert written == []
    else:
        check_settings(ledger, builder, allow_changed)
        assert written == ([] if recorded == "same" else [{"requests": now}])


def test_a_setting_that_an_older_ledger_lacks_is_told_as_changed():
    sampling = SimpleNamespace(model="m", max_output_tokens=9, temperature=1.0, extra={"top_p": 0.5})
    builder = SimpleNamespace(sampling=sampling, prompter=SimpleNamespace(compute_fingerprint=lambda: {"seed": 0}))
    then = {"seed": 0, "model": "m", "max_output_tokens": 9, "temperature": 1.0}
    ledger = SimpleNamespace(read_settings=lambda: {"requests": then}, path="out/ledger")
    with pytest.raises(UsageError, match=r"other settings: extra was None, is \{'top_p': 0\.5\}; pass another"):
        check_settings(ledger, builder)
