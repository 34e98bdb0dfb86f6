"""python -m engine.serve as a user runs it: from the first line to the signal that ends it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from engine.base.errors import run_main
from engine.serve import main
from tests.helpers.run import ROOT
from tests.helpers.small_model import small_model


def test_it_serves_until_a_signal(tmp_path):
    serve = subprocess.Popen(
        [sys.executable, "-m", "engine.serve", "--model", str(small_model()), "--port", "0", "--max-length", "100"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log: list[str] = []
    try:
        url = re.search(r"at (http://127\.0\.0\.1:\d+)$", serve.stdout.readline())[1]
        reader = threading.Thread(target=lambda: log.extend(serve.stderr))
        reader.start()
        body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}).encode()
        with urllib.request.urlopen(f"{url}/v1/chat/completions", body) as response:
            assert json.load(response)["usage"]["completion_tokens"] <= 3
        serve.send_signal(signal.SIGTERM)
        assert serve.wait() in (-signal.SIGTERM, 143)
    finally:
        serve.kill()
        serve.wait()
    reader.join()
    assert "Traceback" not in "".join(log) and any("POST /v1/chat/completions 200" in line for line in log)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "0.0.0.0"], "lets other machines in; name a key by --api-key-env"),
        (["--port", "70000"], "--port wants 0 to 65535"),
        (["--max-queue", "-1"], "--max-queue wants 0 or more"),
        (["--api-key-env", "NO_SUCH_VARIABLE_HERE"], "this environment variable is not set"),
    ],
)
def test_what_cannot_be_served_is_told(capsys, words, told):
    try:
        code = run_main(main, words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and told in capsys.readouterr().err


def test_a_port_in_use_is_told(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert run_main(main, ["--model", str(small_model()), "--port", port, "--max-length", "50"]) == 1
    assert f"--port {port}: cannot be listened on" in capsys.readouterr().err
