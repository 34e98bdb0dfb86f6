"""What a save syncs before it gives a state its name, and after: a power cut must find the old state or the new one."""

import os
from pathlib import Path

import torch

from engine.model.shard import as_shards
from engine.output.saver import WriterGroup, write_checkpoint


def test_everything_is_on_the_disk_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def record_sync(handle):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path)))
        fsync(handle)

    def record_rename(old, new):
        events.append(("rename", Path(old).relative_to(tmp_path), Path(new).relative_to(tmp_path)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    write_checkpoint(tmp_path, 1, 5, lambda: as_shards({"a": torch.ones(3)}), {}, WriterGroup())
    new = Path(".tmp-5")
    at = events.index(("rename", new, Path("checkpoint-5")))
    before = [event[1] for event in events[:at] if event[0] == "sync"]
    assert before.index(new / "state.safetensors") < before.index(new / "manifest.json") < before.index(new)
    assert ("sync", Path()) in events[at:]
