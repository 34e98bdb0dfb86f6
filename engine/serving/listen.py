"""The socket and the loop of the server: uvicorn, from the first request to the last answer."""

import socket
import sys

import uvicorn

from engine.serving.app import Server

PATIENCE = 10  # seconds that answers may take to end after a signal


def listen(server: Server, host: str, port: int) -> None:
    """Answer requests until SIGINT or SIGTERM; then answers end and their clients are told. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)  # clients that come before the loop wait
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(
            server.application(), log_level="warning", access_log=False, server_header=False, date_header=False,
            timeout_graceful_shutdown=PATIENCE, timeout_keep_alive=30, lifespan="off",
        )  # fmt: skip
        for service in server.services.values():
            service.start()
        names = ", ".join(f"{service.name} ({service.style})" for service in server.services.values())
        print(f"serving {names or 'answers'} at http://{shown}:{listening.getsockname()[1]}", flush=True)
        places = ["the page is at /, OpenAI's API at /v1"] if names else []
        places += ["the blind comparison at /compare"] if server.comparison else []
        print(f"{', '.join(places)}; Ctrl-C ends it", file=sys.stderr, flush=True)
        try:
            StoppingServer(config, server).run(sockets=[listening])
        finally:
            for service in server.services.values():
                service.stop()


class StoppingServer(uvicorn.Server):
    """uvicorn's server, which ends all answers as soon as a signal comes, so that their clients are told why."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self.stopped = server

    def handle_exit(self, sig: int, frame: object) -> None:
        """Take a signal."""
        for service in self.stopped.services.values():
            service.is_stopping = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]
