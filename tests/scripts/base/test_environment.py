"""Environments of other people's packages."""

import json
import subprocess
from types import SimpleNamespace

from scripts.base import environment


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
