"""Tokenised rows on disk, so that data is tokenised once: an entry is a folder of mapped .npy files, named by the
sha256 of everything that decides what is in it.

An entry is written under another name, synced, then renamed: it is there whole or not at all, and of two processes that
write the same one the first to end wins. Its bytes are checked whenever it is opened. A cache that cannot be used costs
a note, never the run; removing an entry leaves the processes that have it mapped their pages.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from engine.base.errors import DataError
from engine.base.files import sync_file, sync_folder
from engine.data import dataset as data
from engine.data import rows
from engine.data.rows import Skipped, mapped
from engine.text import templates, tokenizer, tokenizer_files, tokenizer_json
from engine.text.tokenizer import Tokenizer

FORMAT = 1  # of an entry
# The modules that turn bytes into ids: a changed template makes another key.
CODE = (data, rows, templates, tokenizer, tokenizer_files, tokenizer_json)
ARRAYS, MANIFEST = ("tokens", "is_target", "rows"), "manifest.json"
NAME = re.compile("[0-9a-f]{64}")  # what is not named so is not ours to remove
MAX_ENTRIES, MAX_BYTES = 20, 4 << 30  # kept; 52,000 Alpaca rows take 35 MB
STALE_SECONDS = 3600  # a temporary folder of this age is a killed process's; writing takes seconds

# The files of a tokenizer that are kept do not say all: config.json may name the class whose pre-tokenizer is used. So
# the ids of a text in which the pre-tokenizers that there are differ belong to its identity.
PROBE = " The quick  brown\nﬁx: 1234\n 56 \n\n\té ①𝔘 e\u0301don't</s>  "


def folder(choice: str) -> Path | None:
    """Where entries lie: the choice itself, or for "auto" the user's cache; None for "off", or with no home."""
    if choice != "auto":
        return None if choice in ("off", "") else Path(choice)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the XDG specification wants it
        base = os.path.expanduser("~/.cache")
    return Path(base, "cria", "tokens") if os.path.isabs(base) else None


def key(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    style: str,
    max_length: int,
    train_on_prompt: bool,
    skip_bad_rows: bool,
) -> str:
    """sha256 of what decides the tokens: the files' bytes in order, the tokenizer, the settings, code and versions.

    Raises DataError for a file that cannot be read.
    """
    files = [mapped(path) for path in paths]  # a missing one is found before any is read
    ingredients = {
        "format": FORMAT,
        "data": [sha256(file) for file in files],
        "tokenizer": tokenizer.describe(),
        "settings": [style, max_length, train_on_prompt, skip_bad_rows],
        "code": [sha256(Path(module.__file__).read_bytes()) for module in CODE],
        "versions": [sentencepiece.__version__, tokenizers.__version__],
    }
    return sha256(json.dumps(ingredients, sort_keys=True).encode())


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


def load(
    root: Path, key: str, paths: Sequence[Path], max_length: int, say: Callable[[str], None]
) -> tuple[data.Table, list[Skipped]] | None:
    """The entry's rows and the bad rows that were skipped, both named after the paths of this run; None when there is
    none.

    That there is a manifest, and the size and crc32 of each whole file that it lists, are checked. A damaged entry is
    removed, and said.
    """
    entry, names = root / key, tuple(map(str, paths))
    if not os.path.exists(entry):
        return None
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        arrays = {name: read(entry / f"{name}.npy", manifest[name]) for name in ARRAYS}
        skipped = [Skipped(f"{names[file]}:{number}", reason) for file, number, reason in manifest["skipped"]]
    except (OSError, DataError, ValueError, KeyError, TypeError, IndexError):
        say(f"note: the cached tokens in {entry} are damaged; the data is tokenised again")
        remove(entry)
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # the newest are kept
    return data.Table(**arrays, paths=names, max_length=max_length), skipped


def read(path, expected):
    """The array in the file, mapped. Raises ValueError where the file is not as it was written."""
    if checksum(path) != expected:
        raise ValueError(path)
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def checksum(path):
    """[bytes, crc32]; 4 GB/s, where sha256 makes 1.8."""
    content = mapped(path)
    return [len(content), zlib.crc32(content)]


# ---- writing --------------------------------------------------------------------------------------------------------


def save(root: Path, key: str, table: data.Table, skipped: Sequence[Skipped], paths: Sequence[Path], say) -> None:
    """Keeps the rows as an entry, and the newest entries with it. What goes wrong is said, and costs nothing else."""
    temporary = root / f".tmp-{secrets.token_hex(8)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        clean(root)
        temporary.mkdir()
        write(temporary, table, skipped, tuple(map(str, paths)))
        try:
            os.rename(temporary, root / key)
        except OSError:  # another process was faster, or it is no folder of ours
            if not (root / key / MANIFEST).is_file():
                raise
        sync_folder(root)
        clean(root)
    except OSError as error:
        reason = error.strerror or error
        say(f"note: the tokens are not cached in {root} ({reason}); --token-cache names another folder")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(entry, table, skipped, names):
    place = {name: number for number, name in reversed(list(enumerate(names)))}
    rows = table.rows.copy()
    rows["file"] = np.array([place[path] for path in table.paths])[rows["file"]]
    manifest = {"skipped": []}
    for bad in skipped:
        path, _, number = bad.source.rpartition(":")
        manifest["skipped"].append((place[path], int(number), bad.reason))
    for name, array in zip(ARRAYS, (table.tokens, table.is_target, rows), strict=True):
        path = entry / f"{name}.npy"
        with open(path, "wb") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
            sync_file(file)
        manifest[name] = checksum(path)
    with open(entry / MANIFEST, "w") as file:
        json.dump(manifest, file)
        sync_file(file)
    sync_folder(entry)


def clean(root):
    """Removes all but the newest entries, and what killed processes left."""
    found, size = [], 0
    for path in root.iterdir():
        with contextlib.suppress(OSError):  # another process removes too
            if NAME.fullmatch(path.name):
                found.append((path.stat().st_mtime, sum(f.stat().st_size for f in path.iterdir()), path))
            elif path.name.startswith(".tmp-") and time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path)
    for n, (_, n_bytes, path) in enumerate(sorted(found, reverse=True)):
        size += n_bytes
        if n and (n >= MAX_ENTRIES or size > MAX_BYTES):
            remove(path)


def remove(path):
    """Gone under its own name at once, so that nobody finds half of it."""
    gone = path.with_name(f".tmp-{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        os.rename(path, gone)
        shutil.rmtree(gone)
