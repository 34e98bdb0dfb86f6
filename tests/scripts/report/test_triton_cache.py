"""Triton's cache, filled by one run and carried to the next."""

import json
import os
import shutil
import tarfile

import pytest

from scripts.report import kernel_parts
from scripts.report.report import Report
from scripts.report.triton_cache import ARCHIVE, carry_cache, pack_cache, unpack_cache
from tests.helpers.compiler import run_compiler

COMPILE_AGAIN = """
import triton
from kernels.compiled import launch_cases, launches
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
for case in launch_cases.all_cases(["grad_norm"]):
    for launch in launches.record_launches(case, "sm_90"):
        launches.compile_source(*launches._source_of(launch))
print(hits)
"""


def test_what_the_first_run_compiles_the_next_one_finds(tmp_path, monkeypatch):
    """On another machine, where the cache lies in another folder."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    with carry_cache(tmp_path, tmp_path / "one"):
        report = Report(tmp_path / "report.json", minutes=600, smoke=True)
        kernel_parts.warm_up(report)
    found = report.result["parts"]["warm_up"]
    assert found["launches"] == 6 and found["violations"] == 0 and "failed" not in found
    shutil.rmtree(tmp_path / "one")
    assert (tmp_path / ARCHIVE).stat().st_size < 2e6 and os.environ["TRITON_CACHE_DIR"] == "before"
    with carry_cache(tmp_path, tmp_path / "two"):
        done = run_compiler("-c", COMPILE_AGAIN)
    assert done.stdout == f"{[True] * 6}\n", done.stderr[-2000:]


def test_an_archive_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    """A machine that is taken back while it packs leaves what the next run begins with."""
    with carry_cache(tmp_path, tmp_path / "one"):
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "kernel").write_text("kept")
    before = (tmp_path / ARCHIVE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "add", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack_cache(tmp_path / "one", tmp_path / ARCHIVE)
    assert (tmp_path / ARCHIVE).read_bytes() == before
    with carry_cache(tmp_path, tmp_path / "two"):
        assert (tmp_path / "two" / "kernel").read_text() == "kept"


@pytest.mark.parametrize("before", ["another", None])
def test_the_cache_of_before_is_used_again_also_after_a_failure(before, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if before:
        monkeypatch.setenv("TRITON_CACHE_DIR", before)
    with pytest.raises(InterruptedError), carry_cache(tmp_path, tmp_path / "cache"):
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "cache")
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "a").write_text("kept")
        raise InterruptedError
    assert os.environ.get("TRITON_CACHE_DIR") == before
    with tarfile.open(tmp_path / ARCHIVE) as packed:
        assert packed.getnames() == [".", "./a"]


def test_notes_of_files_lead_to_the_new_folder(tmp_path):
    group = tmp_path / "old" / "hash"
    group.mkdir(parents=True)
    (group / "__grp__k.json").write_text(json.dumps({"child_paths": {"k.ttir": "/gone/hash/k.ttir"}, "more": 1}))
    (group / "k.json").write_text("{}")
    pack_cache(tmp_path / "old", tmp_path / "packed.tar.gz")
    unpack_cache(tmp_path / "packed.tar.gz", tmp_path / "new")
    note = json.loads((tmp_path / "new" / "hash" / "__grp__k.json").read_text())
    assert note == {"child_paths": {"k.ttir": str(tmp_path / "new" / "hash" / "k.ttir")}, "more": 1}
    assert (tmp_path / "new" / "hash" / "k.json").read_text() == "{}"
    pack_cache(tmp_path / "none", tmp_path / "empty.tar.gz")
    with tarfile.open(tmp_path / "empty.tar.gz") as packed:
        assert packed.getnames() == []
