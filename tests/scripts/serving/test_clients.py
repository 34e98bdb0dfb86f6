"""Other people's clients: what one says, what it leaves when it fails, and what ends with 1."""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.serving import clients
from tests.helpers.calls import Calls

RIGHT = {"feature": "plain", "right": True, "got": "x"}


@pytest.mark.parametrize("code", [0, 1, 3, -9])
def test_a_program_that_fails_is_told_after_what_it_has_said(code):
    end = f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
    program = f"import json, os, sys; print(json.dumps({RIGHT}), flush=True); sys.stderr.write('broken'); {end}"
    told = clients.run_client("it", [sys.executable, "-Sc", program])
    assert told[0] == {"client": "it", **RIGHT} and len(told) == 1 + bool(code)
    assert not code or (not told[1]["right"] and (told[1]["got"] == "broken" or code < 0))


@pytest.mark.parametrize(("wrong", "code"), [((), 0), (("openai",), 1), (("web pages", "openai"), 1)])
def test_one_wrong_feature_makes_the_exit_code(wrong, code, monkeypatch, tmp_path, call_main):
    given = []

    @contextlib.contextmanager
    def serve(flags, log):
        given.append(flags)
        yield SimpleNamespace(url="http://127.0.0.1:1")

    def run(name, command):
        assert command[-1] == "http://127.0.0.1:1"
        return [{**RIGHT, "client": name}, {**RIGHT, "client": name, "right": name not in wrong}]

    versions = {"openai": "1", "langchain-openai": "2", "httpx": "3"}
    monkeypatch.setattr(clients, "make_environment", lambda *_: (tmp_path, versions))
    monkeypatch.setattr(clients.shutil, "which", lambda _: None)
    monkeypatch.setattr(clients, "serve_model", serve)
    monkeypatch.setattr(clients, "run_client", run)
    assert call_main(clients, "--model", "mine", "--json", tmp_path / "x") == code
    assert given[0][:2] == ("--model", "mine")
    found = json.loads((tmp_path / "x").read_text())
    assert found["versions"] == {"openai": "1", "langchain-openai": "2"} and len(found["lines"]) == 6


def test_lines_of_a_client_are_a_table(monkeypatch, capsys):
    """A failure is told by its last words."""
    wrong = {"feature": "streaming", "right": False, "got": "y"}
    done = SimpleNamespace(stdout="\n".join(map(json.dumps, (RIGHT, wrong))), stderr="x" * 700 + "end", returncode=3)
    ran = []
    monkeypatch.setattr(clients.subprocess, "run", lambda command, **how: ran.append((command, how)) or done)
    told = clients.run_client("it", ["a", "b"])
    assert ran == [(["a", "b"], {"capture_output": True, "text": True, "check": False})]
    assert told[-1] == {"client": "it", "feature": "the program itself", "right": False, "got": "x" * 597 + "end"}
    assert capsys.readouterr().out.splitlines() == [
        f"it{' ' * 17}plain{' ' * 22}ok     x", f"it{' ' * 17}streaming{' ' * 18}WRONG  y",
        f"it{' ' * 17}the program itself{' ' * 9}WRONG  {'x' * 597}end",
    ]  # fmt: skip


def test_the_javascript_client_is_installed_beside_its_program(monkeypatch, tmp_path):
    ran = []

    def run(command, check):
        ran.append((command, check))
        (tmp_path / "new" / "node_modules" / "openai").mkdir(parents=True)
        (tmp_path / "new" / "node_modules" / "openai" / "package.json").write_text('{"version": "6.1"}')

    monkeypatch.setattr(clients.subprocess, "run", run)
    folder = tmp_path / "new"
    assert clients.make_node(folder) == (str(folder / "with_openai_js.mjs"), {"openai-js": "6.1"})
    assert ran == [(["npm", "install", "--silent", "--prefix", folder, "openai@6"], True)]
    assert (folder / "with_openai_js.mjs").read_text() == (clients.PROGRAMS / "with_openai_js.mjs").read_text()


@pytest.mark.parametrize("npm", ["npm", None])
def test_the_whole_measurement(npm, monkeypatch, tell, snapshot, capsys):
    calls = Calls()
    monkeypatch.setattr(clients.tempfile, "TemporaryDirectory", calls.folder)
    made = (Path("bin"), {"openai": "3", "langchain-openai": "2", "httpx": "1", "more": "0"})
    run = lambda name, command: [RIGHT | {"client": name}] * (1 + len(name) % 2)  # noqa: E731
    served = contextlib.nullcontext(SimpleNamespace(url="http://it"))
    for name, result in {
        "make_environment": made, "make_node": ("program", {"openai-js": "6"}), "run_client": run, "serve_model": served
    }.items():  # fmt: skip
        monkeypatch.setattr(clients, name, calls.stand_in(name, result))
    monkeypatch.setattr(clients.shutil, "which", lambda name: npm if name == "npm" else None)
    text = tell(clients, "--model", "mine") + "\n" + calls.text()
    assert text.replace(str(clients.PROGRAMS), "CLIENTS") == snapshot


def test_flags_have_defaults(defaults_of):
    assert defaults_of(clients) == {"model": "smollm2-135m", "json": None}
