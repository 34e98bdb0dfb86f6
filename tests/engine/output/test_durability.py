"""What is synced before it gets a name, and after: a power cut must find the old state or the new one."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.comparing.vote_file import VoteFile
from engine.data import dataset, token_cache
from engine.model.shard import as_shards
from engine.output.metrics import Metrics
from engine.output.saver import WriterGroup, write_checkpoint


@pytest.fixture
def events(tmp_path, monkeypatch):
    """What was done under tmp_path: ("sync", path), or ("rename", old, new) with the names that a folder holds."""
    events, fsync = [], os.fsync

    def record_sync(handle):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path)))
        fsync(handle)

    def record(rename):
        def record_rename(old, new):
            held = {Path(old).relative_to(tmp_path) / path.name for path in Path(old).glob("*")}
            events.append(("rename", Path(old).relative_to(tmp_path), Path(new).relative_to(tmp_path), held))
            rename(old, new)

        return record_rename

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record(os.rename))
    monkeypatch.setattr(os, "replace", record(os.replace))
    return events


def test_everything_is_on_the_disk_before_the_rename_and_the_name_after_it(tmp_path, events):
    write_checkpoint(tmp_path, 1, 5, lambda: as_shards({"a": torch.ones(3)}), {}, WriterGroup())
    new = Path(".tmp-5")
    at = next(i for i, event in enumerate(events) if event[:3] == ("rename", new, Path("checkpoint-5")))
    before = [event[1] for event in events[:at] if event[0] == "sync"]
    assert before.index(new / "state.safetensors") < before.index(new / "manifest.json") < before.index(new)
    assert ("sync", Path()) in events[at:]


def write_cache(folder):
    """Write an entry of the token cache."""
    table = dataset.Table(np.ones(2, np.int32), np.ones(2, bool), np.zeros(1, dataset.ROW), ("rows.json",), 9)
    token_cache.save_entry(folder, "0" * 64, table, [], Counter(), [Path("rows.json")], pytest.fail)


def write_metrics(folder):
    """Open metrics.jsonl, and write a line that crosses pages."""
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.write("sample", text="x" * 9000)
    metrics.close()


@pytest.mark.parametrize("write, n", [(write_cache, 1), (write_metrics, 2)])
def test_what_gets_a_name_is_on_the_disk_with_all_that_it_holds(tmp_path, events, write, n):
    write(tmp_path)
    named = [i for i, event in enumerate(events) if event[0] == "rename"]
    assert len(named) == n
    for begin, at in zip([0, *named], named, strict=False):
        _, old, _, held = events[at]
        assert {old, *held} <= {event[1] for event in events[begin:at]}


@pytest.mark.parametrize("write", [write_cache, lambda folder: VoteFile(folder / "votes.jsonl").close()])
def test_a_name_that_is_told_is_on_the_disk(tmp_path, events, write):
    write(tmp_path)
    assert events[-1] == ("sync", Path())
