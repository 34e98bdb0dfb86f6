"""Rows of tensors: any number of readers finds what any number of writers left; copies of them."""

import errno
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base.errors import DataError
from engine.model.shard import Shard, as_shards
from engine.output import checkpoint, tensor_rows
from engine.output.tensor_rows import HostCopy
from tests.helpers.training_states import (
    FACTS,
    blank,
    cut,
    equal,
    load_folder,
    newest,
    read_by,
    same_bytes,
    save_checkpoint,
    save_together,
    tensors,
)


def random_bytes(shape, dtype, seed):
    """Return a tensor of random bits, but for NaN and infinities, which no state may hold."""
    n = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    made = raw.view(dtype).view(shape)
    return made.masked_fill(~made.isfinite(), 1)


SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
STATES = st.lists(
    st.tuples(SHAPES, st.sampled_from([torch.bfloat16, torch.float32, torch.int16, torch.uint8])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(STATES, st.sampled_from([1, 2, 3, 4, 7]), st.sampled_from([1, 2, 3, 4, 7]), st.data())
def test_any_number_of_readers_finds_what_any_number_wrote(tmp_path_factory, kinds, n_writers, n_readers, draw):
    out = tmp_path_factory.mktemp("out")
    whole = {f"t{i}": random_bytes(shape, dtype, i) for i, (shape, dtype) in enumerate(kinds)}

    def anywhere(n):
        if draw.draw(st.booleans()):
            return None
        return lambda name, rows: sorted(draw.draw(st.lists(st.integers(0, rows), min_size=n - 1, max_size=n - 1)))

    parts = cut(whole, n_writers, anywhere(n_writers))
    done = save_together(out, 1, parts)
    found = newest(out)
    folder, manifest = found.folder, found.manifest
    assert manifest["format"] == (1 if n_writers == 1 else 2) and manifest["rank"] == 0
    assert {d.bytes for d in done} == {sum(p.stat().st_size for p in folder.glob("*.safetensors"))}
    assert same_bytes(read_by(folder, whole, n_readers, anywhere(n_readers)), whole)
    shutil.rmtree(out)


def test_a_writer_that_holds_nothing_writes_no_file(tmp_path):
    whole = {"a": torch.arange(3.0)}
    done = save_together(tmp_path, 1, [*cut(whole, 4), {}, {}])  # of 4 shards the last is empty; two replicas
    files = [f"state-0000{i}-of-00006.safetensors" for i in range(3)]
    assert sorted(p.name for p in done[5].folder.iterdir()) == ["manifest.json", *files]
    manifest = checkpoint.open_checkpoint(done[0].folder).manifest
    assert manifest["tensors"] == {"a": {"dtype": "F32", "shape": [3]}}
    assert [manifest["files"][file]["rows"] for file in files] == [{"a": [i, i + 1]} for i in range(3)]
    assert len({(d.step, d.folder, d.bytes) for d in done}) == 1


def test_a_reader_opens_only_the_files_that_hold_its_rows(tmp_path):
    folder = save_together(tmp_path, 1, cut({"a": torch.arange(10.0)}, 5))[0].folder
    state = checkpoint.open_checkpoint(folder)
    for i in (0, 3, 4):
        (folder / f"state-0000{i}-of-00005.safetensors").unlink()
    found = torch.zeros(3)
    checkpoint.load(state, {"a": Shard(found, 2, 10)})
    assert found.tolist() == [2, 3, 4]
    with pytest.raises(DataError, match="state-00000-of-00005"):
        checkpoint.load(state, {"a": Shard(found, 1, 10)})


@pytest.mark.parametrize("n", [1, 2])
def test_readers_name_what_does_not_fit(tmp_path, n):
    folder = save_together(tmp_path, 1, cut({"a": torch.zeros(4, 2), "b": torch.zeros(4, dtype=torch.int16)}, n))[
        0
    ].folder
    for wanted, message in (
        ({"a": Shard(torch.zeros(2, 2), 0, 5)}, r"2 .*: *a \(\(4, 2\), wanted \(5, 2\)\), b \(\(4,\), wanted None\)"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(4)}, r"1 .*b \(torch.int16, wanted torch.float32\)"),
        ({}, "2 tensors"),
    ):
        with pytest.raises(DataError, match=message.replace(": *", "")):
            load_folder(folder, wanted)
    narrow = {"a": torch.ones(4, 2, dtype=torch.bfloat16), "b": torch.ones(4, dtype=torch.int16)}
    load_folder(folder, narrow)  # under --allow-changed
    assert not any(t.any() for t in narrow.values())


@pytest.mark.parametrize("n", [1, 2])
def test_a_part_of_a_state_is_read_without_the_rest(tmp_path, n):
    whole = {"param.a": torch.arange(6.0), "param.b": torch.tensor(1.0), "m.a": torch.ones(6), "count": torch.ones(1)}
    parts = cut(whole, n)
    last = {name: parts[-1].pop(name) for name in ("m.a", "count") if name in parts[-1]} if n > 1 else {}
    folder = save_together(tmp_path, 1, [*parts, last])[0].folder
    state = checkpoint.open_checkpoint(folder)
    if n > 1:  # who holds nothing of it
        (folder / "state-00002-of-00003.safetensors").unlink()
    wanted = {name: t for name, t in whole.items() if name.startswith("param.")}
    found = blank(wanted)
    checkpoint.load(state, found, "param.")
    assert same_bytes(found, wanted)
    for other, message in (
        ({"param.a": found["param.a"]}, r"1 .*param.b \(\(\), wanted None\)"),
        (found | {"param.c": torch.zeros(2)}, r"1 .*param.c \(None, wanted \(2,\)\)"),
        (found | {"m.a": torch.zeros(6)}, r"1 .*m.a \(None"),
    ):
        with pytest.raises(DataError, match=message):
            checkpoint.load(state, other, "param.")


def test_rows_that_do_not_add_up_are_refused_on_all(tmp_path):
    t = torch.zeros(4)
    for parts, message in (
        ([{"a": Shard(t[:2], 0, 4)}, {"a": Shard(t[1:], 1, 4)}], r"a: rows \[1, 2\) are held twice"),
        ([{"a": Shard(t[:2], 0, 4)}, {"a": Shard(t[3:], 3, 4)}], r"a: rows \[2, 3\) are held by no file"),
        ([{"a": Shard(t[:3], 0, 4)}, {}], r"a: rows \[3, 4\) are held by no file"),
        ([{"a": Shard(t)}, {"a": Shard(t)}], r"a: rows \[0, 4\) are held twice"),
        ([{"a": Shard(t[:2], 0, 4)}, {"a": Shard(t[2:].half(), 2, 4)}], "a: .*F16.*another one of .*F32"),
        ([{"a": Shard(t[:2], 0, 4)}, {"a": Shard(t[2:], 2, 5)}], "a: .*5.*another one of .*4"),
    ):
        for error in save_together(tmp_path, 1, parts):
            with pytest.raises(ValueError, match=message):
                raise error
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"rows \[3, 7\) of a tensor of shape \(4,\)"):
        Shard(t, 3, 4)
    with pytest.raises(ValueError, match="held by no file"):
        save_checkpoint(tmp_path, 1, {"a": Shard(t[:2], 0, 4)}, FACTS, keep=1)


# ---- copies ---------------------------------------------------------------------------------------------------------


def test_the_copys_memory_is_used_again(tmp_path):
    room = HostCopy(pinned=False)
    first = {name: s.tensor.data_ptr() for name, s in room.copy_shards(as_shards(tensors(1))).items()}
    again = room.copy_shards(as_shards(tensors(2)))
    assert {name: s.tensor.data_ptr() for name, s in again.items()} == first
    assert equal({name: s.tensor for name, s in again.items()}, tensors(2))
    other = {"m.a": torch.ones(9)}
    assert room.copy_shards(as_shards(other))["m.a"].tensor.equal(other["m.a"]) and list(room.views) == ["m.a"]


def test_a_copy_without_memory_is_a_fault_of_the_machine(monkeypatch):
    """An OSError costs this state, as a full disk does. Any other error would end the run."""
    room = HostCopy(pinned=False)

    def fail(layout):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(room, "_allocate", fail)
    with pytest.raises(OSError, match="no memory for a copy of the state: DefaultCPUAllocator") as caught:
        room.copy_shards(as_shards(tensors(1)))
    assert caught.value.errno == errno.ENOMEM
    monkeypatch.undo()
    assert room.copy_shards(as_shards(tensors(1))).keys() == tensors(1).keys()


def test_pinned_memory_is_taken_in_powers_of_two(monkeypatch):
    real, sizes = torch.empty, []

    def empty(size, pin_memory=False, **kwargs):
        sizes.append(size) if pin_memory else None
        return real(size, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(tensor_rows, "COPY_ARENA_BYTES", 1024)
    wanted = {str(i): torch.randn(n) for i, n in enumerate((100, 3, 0, 1, 60, 700, 2))}
    more = {"t": torch.randn(6, 4).t()}
    kept = HostCopy(pinned=True).copy_shards(as_shards(wanted | more))
    for name, t in wanted.items():
        assert kept[name].tensor.equal(t) and kept[name].tensor.data_ptr() % 4 == 0
    assert kept["t"].tensor.equal(more["t"]) and sizes == [1024, 4096]
