"""Triton's cache of compiled kernels, carried from one machine to the next in an archive."""

import contextlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

ARCHIVE = "triton.tar.gz"


@contextlib.contextmanager
def carry_cache(out: Path, folder: Path) -> Iterator[None]:
    """Let Triton keep what it compiles in a folder while the context lasts: at first what the archive in `out` holds.

    Afterwards the archive holds the folder.
    """
    archive, before = out / ARCHIVE, os.environ.get("TRITON_CACHE_DIR")
    if archive.exists():
        unpack_cache(archive, folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder)  # of child processes too
    try:
        yield
    finally:
        pack_cache(folder, archive)
        os.environ.pop("TRITON_CACHE_DIR")
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before


def unpack_cache(archive: Path, folder: Path) -> None:
    """Unpack a cache. Triton notes where each kernel's files lie, so the notes get the new folder."""
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    for group in folder.glob("*/__grp__*.json"):
        noted = json.loads(group.read_text())
        paths = noted["child_paths"]
        noted["child_paths"] = {name: str(group.with_name(Path(paths[name]).name)) for name in paths}
        group.write_text(json.dumps(noted))


def pack_cache(folder: Path, archive: Path) -> None:
    """Write the archive of a cache, whole or not at all."""
    new = archive.with_suffix(".new")
    with tarfile.open(new, "w:gz", compresslevel=6) as packed:
        if folder.exists():
            packed.add(folder, arcname=".")
    os.replace(new, archive)
