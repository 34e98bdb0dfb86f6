"""What the commands that ask a server share: signals that stop a run, and settings that a ledger keeps to."""

import asyncio
import os
import signal

from data_gen.api.attempt import RequestBuilder
from data_gen.api.collector import Collector
from data_gen.api.ledger import Ledger
from data_gen.base.cli import Stopped, UsageError


def interrupt_at_stop_signals() -> None:
    """Let every signal that stops a run raise KeyboardInterrupt, until handle_stop_signals()."""
    for name in list_stop_signals():
        signal.signal(name, signal.default_int_handler)


def handle_stop_signals(collector: Collector) -> None:
    """Let the signals stop a collector. To be called inside its event loop."""
    loop = asyncio.get_running_loop()
    for name in list_stop_signals():
        loop.add_signal_handler(name, stop_run, collector, name)


def list_stop_signals() -> list[signal.Signals]:
    """Return the signals that stop a run: SIGHUP, of a closed terminal, unless it is ignored, as under nohup."""
    names = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    return names[:2] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else names


def stop_run(collector: Collector, name: signal.Signals) -> None:
    """Wait for the requests in flight after a first signal; exit at a second one, which leaves the ledger whole.

    A terminal that is closed may send SIGHUP twice, so that is never a second one.
    """
    if collector.stopping and name == signal.SIGHUP:
        return
    if collector.stopping:
        collector.progress.close()
        os._exit(Stopped.exit_code)
    collector.progress.print_line("stopping: waiting for the answers in flight; once more to leave at once")
    collector.stop()


def check_settings(ledger: Ledger, builder: RequestBuilder, allow_changed: bool = False) -> None:
    """Record the settings of the requests. Raise UsageError if the ledger has others, unless allow_changed."""
    sampling = builder.sampling
    now = builder.prompter.compute_fingerprint() | {
        "model": sampling.model,
        "max_output_tokens": sampling.max_output_tokens,
        "temperature": sampling.temperature,
        "extra": sampling.extra,
    }
    then = ledger.read_settings().get("requests")
    if then is not None and then != now and not allow_changed:
        names = [name for name in now if then.get(name) != now[name]]
        changes = "; ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in names)
        raise UsageError(
            f"{ledger.path} was begun with other settings: {changes}; pass another --out, or --allow-changed"
        )
    if then != now:
        ledger.write_settings(requests=now)
