"""Checkpoints: whole whatever kills the process, verified when they are opened, rotated."""

import json
import os
import pickle
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from engine.base.errors import DataError
from engine.formats.find import list_checkpoints
from engine.output import checkpoint
from engine.output.checkpoint import STATE
from tests.helpers.damage import with_value
from tests.helpers.training_states import (
    FACTS,
    blank,
    cut,
    equal,
    flip,
    killed_at,
    load_folder,
    loaded,
    newest,
    same_bytes,
    save_checkpoint,
    save_together,
    tensors,
)


def test_what_is_loaded_is_watched(tmp_path):
    found, seen = checkpoint.open_checkpoint(save_checkpoint(tmp_path, 7, tensors(7), FACTS, keep=2)), []

    @contextmanager
    def watch(label, total):
        counts = []
        yield counts.append
        seen.append((label, total, sum(counts)))

    wanted = tensors(0)
    checkpoint.load(found, wanted, watch=watch)
    n = sum(t.numel() for t in wanted.values())
    assert equal(wanted, tensors(7)) and seen == [("reading", n, n)]


def test_what_is_saved_is_loaded(tmp_path):
    folder = save_checkpoint(tmp_path, 7, tensors(7), FACTS, keep=2)
    found = newest(tmp_path)
    assert found.folder == folder == tmp_path / "checkpoint-7"
    assert found.step == 7 and found.manifest["settings"] == {"lr": 1.0}
    assert pickle.loads(pickle.dumps(found)) == found
    assert equal(loaded(folder), tensors(7))
    assert not any(b"pickle" in p.read_bytes() or p.suffix not in (".json", ".safetensors") for p in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2])
def test_kill_at_every_write_point_leaves_a_whole_state(tmp_path, keep):
    """Also while older states rotate out: one whole state is always there, and the next save removes what is left."""
    point, seen = 0, set()
    while True:
        point += 1
        out = tmp_path / str(point)
        out.mkdir()
        for step in (1, 2):
            save_checkpoint(out, step, tensors(step), FACTS, keep)
        killed = killed_at(point, out, 3, keep)
        found = newest(out)
        seen.add(found.step)
        assert equal(loaded(found.folder), tensors(found.step))
        for _, each in list_checkpoints(out):
            checkpoint.open_checkpoint(each)  # none is half there, old or new
        if not killed:
            break
        save_checkpoint(out, 4, tensors(4), FACTS, keep)
        assert newest(out).step == 4
        assert not list(out.glob(".tmp-*")) and len(list_checkpoints(out)) <= keep
    assert point > 8 and seen == {2, 3}, "kills must fall before and after the moment the new state counts"


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, tensors(step), FACTS, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100]


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 9])
def test_the_newest_states_are_kept_and_no_other_is_removed(keep, tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, tensors(step), FACTS, keep=keep)
        assert [number for number, _ in list_checkpoints(tmp_path)] == list(range(max(1, step - keep + 1), step + 1))


def test_what_a_killed_removal_has_left_is_in_nobodys_way(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(step), FACTS, keep=2)
    left = tmp_path / ".tmp-old-checkpoint-2"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    checkpoint.remove_checkpoints_after(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_state_just_saved_is_never_the_one_that_rotates_out(tmp_path):
    for step in (6, 8):
        save_checkpoint(tmp_path, step, tensors(step), FACTS, keep=2)
    assert save_checkpoint(tmp_path, 5, tensors(5), FACTS, keep=2).is_dir()
    checkpoint.remove_checkpoints_after(tmp_path, 5)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5]


BREAK = {
    "bit flipped": (lambda f: flip(f / "state.safetensors"), "changed since it was written"),
    "truncated": (lambda f: os.truncate(f / "state.safetensors", 100), "100 bytes, its manifest says"),
    "file missing": (lambda f: (f / "state.safetensors").unlink(), "missing"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "its save never finished"),
    "manifest torn": (lambda f: os.truncate(f / "manifest.json", 30), "not a manifest of ours"),
    "manifest strange": (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest of ours"),
    "manifest deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "not a manifest of ours"),
    "manifest points elsewhere": (
        lambda f: (f / "manifest.json").write_text(
            json.dumps({"format": 1, "step": 2, "files": {"../x": {"bytes": 1, "sha256": ""}}})
        ),
        "not a manifest of ours",
    ),
    "format of the future": (
        lambda f: (f / "manifest.json").write_text(
            (f / "manifest.json").read_text().replace('"format": 1', '"format": 9')
        ),
        "format 9, this version reads 1 and 2",
    ),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_state_is_named_and_passed_over(tmp_path, how):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(step), FACTS, keep=2)
    damage, message = BREAK[how]
    damage(tmp_path / "checkpoint-2")
    told = []
    assert checkpoint.find_newest(tmp_path, told.append).step == 1
    assert len(told) == 1 and "checkpoint-2" in told[0] and message in told[0]
    with pytest.raises(DataError, match="checkpoint-2"):
        checkpoint.open_checkpoint(tmp_path / "checkpoint-2")
    save_checkpoint(tmp_path, 2, tensors(2), FACTS, keep=2)  # the run comes by again
    assert newest(tmp_path).step == 2


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 9])
def test_as_many_states_stay_as_are_to_be_kept_with_the_newest(tmp_path, keep):
    """All of them where there are fewer. The newest is the one that was written last, whatever its step."""
    for step in (20, 100, 3, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.remove_oldest(tmp_path / "checkpoint-20", keep)
    left = sorted(int(folder.name.removeprefix("checkpoint-")) for folder in tmp_path.iterdir())
    assert left == sorted([20, *[3, 40, 100][max(0, 4 - keep) :]])


def test_a_state_is_removed_though_a_kill_left_half_of_one_of_its_step(tmp_path):
    for name in (".tmp-old-checkpoint-3", "checkpoint-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).touch()
    checkpoint.remove_checkpoint(tmp_path / "checkpoint-3")
    assert not any(tmp_path.iterdir())


def test_when_none_is_whole_that_is_said(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(1), FACTS, keep=1)
    flip(tmp_path / "checkpoint-1" / "state.safetensors")
    with pytest.raises(DataError, match=r"no checkpoint is whole; --resume never starts over"):
        newest(tmp_path)


def test_no_state_is_no_fault(tmp_path):
    assert newest(tmp_path) is None


def test_another_models_state_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, tensors(1), FACTS, keep=1)
    with pytest.raises(DataError, match=r"2 tensors do not fit this model, first c \(None, wanted \(2,\)\), m.a"):
        load_folder(folder, {**tensors(1), "m.a": torch.zeros(50, 8), "c": torch.zeros(2)})


def test_a_full_disk_leaves_the_older_states_and_no_temporary(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors(1), FACTS, keep=1)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, tensors(2), FACTS, keep=1)
    monkeypatch.undo()
    assert newest(tmp_path).step == 1 and not list(tmp_path.glob(".tmp-*"))
    shutil.rmtree(tmp_path)


def test_a_state_of_the_first_format_is_read_for_ever(tmp_path):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    save_file(tensors(4), folder / "state.safetensors")
    entry = {
        "bytes": (folder / "state.safetensors").stat().st_size,
        "sha256": checkpoint.hash_file(folder / "state.safetensors"),
    }
    manifest = {"format": 1, "step": 4, **FACTS, "files": {"state.safetensors": entry}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    assert newest(tmp_path) == checkpoint.Checkpoint(folder, manifest)
    assert equal(loaded(folder), tensors(4))
    ours = save_checkpoint(tmp_path, 5, tensors(4), FACTS, keep=2)  # and of one writer, written for ever
    written = json.loads((ours / "manifest.json").read_text())
    assert list(written) == list(manifest) and written["format"] == 1 and list(written["files"]) == [STATE]


def test_a_state_replaced_by_one_of_its_own_step_is_never_lost(tmp_path):
    """Though it is the only one, and the kill comes between its two renames."""
    point, seen = 0, set()
    killed = True
    while killed:
        point += 1
        out = tmp_path / str(point)
        out.mkdir()
        save_checkpoint(out, 3, tensors(1), FACTS, keep=1)
        killed = killed_at(point, out, 3, keep=1, seed=2)
        between = not (out / "checkpoint-3").exists()
        folder = newest(out).folder
        if between:  # clean() finds it too
            os.rename(folder, out / ".tmp-was-checkpoint-3")
            checkpoint.remove_temporaries(out)
            seen.add("between")
        seen.add(next(seed for seed in (1, 2) if equal(loaded(folder), tensors(seed))))
        save_checkpoint(out, 3, tensors(3), FACTS, keep=1)
        assert equal(loaded(folder), tensors(3)) and not list(out.glob(".tmp-*"))
    assert point > 12 and seen == {1, 2, "between"}


def test_a_save_leaves_alone_what_others_are_writing_beside_it(tmp_path):
    """A thread that saves must not remove the temporaries of run.json and of the model."""
    for name in (".tmp-run.json", ".tmp-model.safetensors"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".tmp-2").mkdir()
    (tmp_path / ".tmp-old-checkpoint-1").mkdir()
    save_checkpoint(tmp_path, 3, tensors(3), FACTS, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-model.safetensors", ".tmp-run.json", "checkpoint-3"]
    checkpoint.remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


# ---- manifests of several writers -----------------------------------------------------------------------------------


def places(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def accepts(folder, manifest, whole):
    """Whether a state with this manifest verifies and loads; all but a DataError is a fault."""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = blank(whole)
    try:
        load_folder(folder, found)
    except DataError:
        return False
    assert same_bytes(found, whole)
    return True


def test_an_odd_manifest_is_a_data_error(tmp_path):
    whole = {"a": torch.arange(6.0).view(3, 2), "s": torch.tensor(1.0)}
    folder = save_together(tmp_path, 1, cut(whole, 2))[0].folder
    manifest = checkpoint.open_checkpoint(folder).manifest
    one, two = manifest["files"]
    assert accepts(folder, manifest, whole)
    odd = (None, [], {}, -1, 0, 1.5, 10**30, True, "", "../x", [[]], {"a": 1}, [0, 3], [float("nan"), 1], [1, 0])
    for path in places(manifest):
        for value in odd:
            free = path and path[0] in ("settings", "rank", "step")  # facts, and any number will do for a step
            other = with_value(manifest, path, value)
            assert free or other == manifest or not accepts(folder, other, whole), (path, value)
    files, rows = manifest["files"], manifest["files"][one]["rows"]
    for name in ("../x", "/etc/passwd", "state.safetensors", "manifest.json", one + "\n", one.replace("0", "\u0660")):
        assert not accepts(folder, manifest | {"files": {name: files[one], two: files[two]}}, whole), name
    (folder / f"{one}-").mkdir()
    shutil.copy(folder / one, tmp_path / "elsewhere")
    out_of_it = {f"{one}-/../../elsewhere": files[one], two: files[two]}
    assert not accepts(folder, manifest | {"files": out_of_it}, whole)
    for name in ("b", "../a", ""):
        assert not accepts(folder, with_value(manifest, ("files", one, "rows"), rows | {name: [0, 1]}), whole)
    for span in ([0.0, 2.0], [False, 2]):  # equal to what is right, and no row numbers
        assert not accepts(folder, with_value(manifest, ("files", one, "rows", "a"), span), whole)
    swapped = {one: files[one] | {"rows": files[two]["rows"]}, two: files[two] | {"rows": rows}}
    assert not accepts(folder, manifest | {"files": swapped}, whole)


def test_each_file_of_several_is_verified(tmp_path):
    for damage, message in (
        (flip, "changed since"), (lambda p: os.truncate(p, 10), "10 bytes, its manifest says"), (os.unlink, "missing"),
    ):  # fmt: skip
        for i in range(3):
            folder = save_together(tmp_path, 1, cut(tensors(1), 3))[0].folder
            path = folder / f"state-0000{i}-of-00003.safetensors"
            damage(path)
            with pytest.raises(DataError, match=f"{path.name}: {message}"):
                checkpoint.open_checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_updates", "3"),
        ("n_updates", 1.5),
        ("max_tokens", None),
        ("max_tokens", -1),
        ("settings", "x"),
        ("model", []),
    ],
)
def test_a_manifest_whose_facts_are_of_another_type(key, value, tmp_path):
    folder = save_checkpoint(tmp_path, 1, tensors(1), FACTS, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(DataError, match=rf"manifest.json: not a manifest of ours .*{key}"):
        checkpoint.open_checkpoint(folder)


@pytest.mark.parametrize("clear", [checkpoint.remove_save_temporaries, checkpoint.remove_temporaries])
def test_states_that_a_kill_left_without_their_names_are_no_leftovers(clear, tmp_path):
    """They are put back, each where nothing took its place; what a removal or a save left is removed."""
    left = (
        ".tmp-was-checkpoint-3",
        ".tmp-was-checkpoint-9",
        ".tmp-was-checkpoint-12",
        ".tmp-old-checkpoint-1",
        ".tmp-4",
    )
    for name in (*left, "checkpoint-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    clear(tmp_path)
    found = {folder.name: [path.name for path in folder.iterdir()] for folder in tmp_path.iterdir()}
    put_back = {f"checkpoint-{step}": [f".tmp-was-checkpoint-{step}"] for step in (3, 12)}
    assert found == put_back | {"checkpoint-9": ["checkpoint-9"]}


@pytest.mark.parametrize("key", ["n_updates", "max_tokens"])
@pytest.mark.parametrize(
    ("value", "is_taken"), [(0, True), (2**63 - 1, True), (2**63, False), (-1, False), (True, False)]
)
def test_a_count_in_a_manifest_is_a_whole_number_from_0(key, value, is_taken, tmp_path):
    folder = save_checkpoint(tmp_path, 0, tensors(7), FACTS | {key: value}, keep=2)
    if is_taken:
        assert (
            checkpoint.open_checkpoint(folder).manifest[key] == value and checkpoint.open_checkpoint(folder).step == 0
        )
    else:
        with pytest.raises(DataError, match=f"its {key} is no number"):
            checkpoint.open_checkpoint(folder)
