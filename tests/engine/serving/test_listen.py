"""The server's socket, and what a signal does, without a loop."""

import contextlib
import signal
import socket
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")

import uvicorn

from engine.serving import listen


def server_of(events):
    service = SimpleNamespace(
        name="m", style="alpaca", is_stopping=False, start=lambda: events.append("start"),
        stop=lambda: events.append("stop"),
    )  # fmt: skip
    return SimpleNamespace(services={"m": service}, comparison=[], application=lambda: None)


@pytest.mark.parametrize(
    ("host", "family", "shown"), [("127.0.0.1", socket.AF_INET, "127.0.0.1"), ("::1", socket.AF_INET6, "[::1]")]
)
@pytest.mark.parametrize("fails", [False, True])
def test_a_server_listens_where_it_says_and_its_models_end_with_it(fails, host, family, shown, monkeypatch, capsys):
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        try:
            tried.bind((host, 0))
        except OSError as error:  # a container without IPv6
            pytest.skip(f"nothing can listen on {host} here: {error}")
    events, ports = [], []

    def run(self, sockets):
        (one,) = sockets
        ports.append(one.getsockname()[1])
        events.append((one.family, one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) != 0))
        if fails:
            raise OSError("gone")

    monkeypatch.setattr(listen.StoppingServer, "run", run)
    with pytest.raises(OSError, match="gone") if fails else contextlib.nullcontext():
        listen.listen(server_of(events), host, 0)
    assert events == ["start", (family, True), "stop"]
    assert f"serving m (alpaca) at http://{shown}:{ports[0]}\n" in capsys.readouterr().out


def test_a_signal_ends_all_answers_at_once(monkeypatch):
    taken = []
    monkeypatch.setattr(uvicorn.Server, "handle_exit", lambda self, sig, frame: taken.append(sig))
    server = server_of([])
    listen.StoppingServer(uvicorn.Config(None), server).handle_exit(signal.SIGINT, None)
    assert server.services["m"].is_stopping and taken == [signal.SIGINT]
