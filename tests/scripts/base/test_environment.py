"""Environments of other people's packages."""

import json
import subprocess
from types import SimpleNamespace

from scripts.base import environment
from tests.helpers.calls import Calls


def test_packages_are_installed_into_the_folder_and_told_by_their_versions(monkeypatch, tmp_path):
    ran = []

    def run(command, check, **_):
        ran.append(command)
        assert check
        return SimpleNamespace(stdout=json.dumps([{"name": "a", "version": "1.2"}, {"name": "b", "version": "3"}]))

    monkeypatch.setattr(environment.venv, "create", lambda folder, with_pip: ran.append([folder, with_pip]))
    monkeypatch.setattr(subprocess, "run", run)
    commands, versions = environment.make_environment(tmp_path, ("a==1.2", "b"))
    assert commands == tmp_path / "bin" and versions == {"a": "1.2", "b": "3"}
    assert ran[0] == [tmp_path, True] and ran[1][0] == str(commands / "python") and ran[1][-2:] == ["a==1.2", "b"]


def test_each_command_of_an_environment(monkeypatch, tmp_path):
    calls = Calls()
    listed = SimpleNamespace(stdout="[]")
    monkeypatch.setattr(environment.venv, "create", calls.stand_in("create"))
    monkeypatch.setattr(subprocess, "run", calls.stand_in("run", listed))
    environment.make_environment(tmp_path, ("a==1.2", "b"))
    pip = [f"{tmp_path}/bin/python", "-m", "pip", "--disable-pip-version-check"]
    assert calls.lines == [
        f"create({tmp_path!r}, with_pip=True)", f"run({[*pip, 'install', '--quiet', 'a==1.2', 'b']}, check=True)",
        f"run({[*pip, 'list', '--format', 'json']}, check=True, capture_output=True, text=True)",
    ]  # fmt: skip
