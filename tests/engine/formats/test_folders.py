"""Model folders: what is on the disk before a file gets its name, and what a save that is interrupted leaves."""

import os
from pathlib import Path

import pytest
import torch

from engine.formats import folders
from engine.formats.adapters import save_adapter
from engine.formats.folders import make_json_writer, read_json_member, replace_files
from engine.formats.save import save_hf, save_meta
from engine.formats.save_gguf import save_gguf
from engine.model.adapter import AdapterConfig
from engine.model.llama import new_model
from tests.helpers.checkpoints import BASE, random_model


def save_factors(folder):
    model = new_model(BASE, "cpu", torch.float32, adapter=AdapterConfig(r=4))
    for p in model.trained_parameters().values():
        torch.nn.init.ones_(p)
    save_adapter(folder, model, "org/base")


SAVES = {
    "hf": lambda folder: save_hf(folder, random_model(BASE), max_shard_bytes=40_000),
    "meta": lambda folder: save_meta(folder, random_model(BASE)),
    "gguf": lambda folder: save_gguf(folder / "a.gguf", random_model(BASE), {"tokenizer.ggml.model": "llama"}, "f16"),
    "adapter": save_factors,
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_power_cut_finds_whole_files_under_their_names_and_the_last_one_last(save, tmp_path, monkeypatch):
    save(tmp_path)
    events = []

    def record(name, path_of):
        real = getattr(os, name)

        def recorded(*args, **options):
            events.append((name, path_of(*args)))
            return real(*args, **options)

        monkeypatch.setattr(os, name, recorded)

    record("fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    record("replace", lambda old, new: Path(new).name)
    record("unlink", lambda path, **_: Path(path).name)
    save(tmp_path)  # over the old model
    monkeypatch.undo()
    sync = ("fsync", tmp_path.name)
    renames = [at for at, (what, _) in enumerate(events) if what == "replace"]
    assert {events[at][1] for at in renames} == {path.name for path in tmp_path.iterdir()}
    for at in renames:
        assert ("fsync", f".tmp-{events[at][1]}") in events[:at], f"{events[at][1]} is named before it is on the disk"
    last = renames[-1]
    gone = events.index(("unlink", events[last][1]))
    assert events[gone + 1] == sync and renames[0] > gone + 1, "the old model's other files go before its last one has"
    assert events[last - 1] == events[last + 1] == sync


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_an_interrupted_save_leaves_the_old_model_and_nothing_else(error, tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise error

    replace_files(tmp_path, {"a.json": make_json_writer(1), "b.json": make_json_writer(2)}, r".\.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(type(error)):
        replace_files(tmp_path, {"a.json": make_json_writer(3), "b.json": fail}, r".\.json")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_sound_objects_in_files_of_the_folder_are_read(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "out.json").write_text("{}")
    (folder / "bom.json").write_text('\ufeff{"a": 1}')
    (folder / "list.json").write_text("[]")
    (folder / "large.json").write_text('{"a": "a long text"}')
    (folder / "link.json").symlink_to(tmp_path / "out.json")
    (folder / "folder.json").mkdir()
    monkeypatch.setattr(folders, "MAX_HEADER_BYTES", 15)
    for name, told in (
        ("bom.json", None), ("list.json", "holds a list, wanted an object"),
        ("large.json", "20 bytes, wanted under 15"),
        ("link.json", "is a link out of the folder"),
        ("folder.json", "is not a file"),
        ("none.json", "is missing"),
        ("../out.json", "is not the name of a file in this folder"),
    ):  # fmt: skip
        problems = []
        found = read_json_member(folder, name, problems)
        assert (found, problems) == ({"a": 1}, []) if told is None else (found is None and told in problems[0]), name


def test_files_of_the_old_model_go_and_all_others_stay(tmp_path):
    for name in ("model-1.bin", "model.bin", "notes.txt", ".tmp-model-3.bin", ".tmp-notes"):
        (tmp_path / name).write_text("old")
    replace_files(tmp_path, {"model.bin": make_json_writer(1), "config.json": make_json_writer(2)}, r"model(-\d)?\.bin")
    assert {path.name for path in tmp_path.iterdir()} == {"model.bin", "config.json", "notes.txt", ".tmp-notes"}
