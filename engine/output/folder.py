"""The output folder of a run: its lock, its free disk, its metrics, and the environment noted in run.json."""

import contextlib
import fcntl
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from engine.base.errors import UsageError, reading
from engine.base.files import read_json

RUN, LOCK, METRICS = "run.json", ".lock", "metrics.jsonl"
RESUME_REMEDY = "copy it again, go on in another --out by --resume STATE, or pass --resume never to start over"
STATUSES = ("running", "done", "stopped", "failed")  # of a run, in its run.json


@contextlib.contextmanager
def lock_output_folder(out: Path) -> Iterator[Path]:
    """Make the folder, and hold its lock for the length of a with block. A block that writes nothing leaves no folder.

    Raises UsageError where the folder cannot be written, has a run that is under way, or has files of something else.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in out.iterdir() if path.name != LOCK and not path.name.startswith(".tmp-")]
        if others and RUN not in others:
            raise UsageError(
                f"--out {out}: holds {', '.join(sorted(others)[:3])} and no {RUN} of ours; choose another folder"
            )
        lock = open(out / LOCK, "a+")  # noqa: SIM115 (held until the run ends)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--out {out}: another run is writing there; choose another folder") from None
        except OSError as error:
            raise UsageError(
                f"--out {out}: its file system has no locks ({error.strerror}); mount it with flock, or choose another"
            ) from None
        try:
            yield out
        finally:
            remove_if_unused(out, made)


def remove_if_unused(out: Path, made: Iterable[Path]) -> None:
    """Remove a folder's lock where the folder holds nothing else, and the folders of made that are then empty."""
    with contextlib.suppress(OSError):  # not empty, or no longer there
        if [path.name for path in out.iterdir()] == [LOCK]:
            (out / LOCK).unlink()
            for folder in made:
                folder.rmdir()


def require_disk_space(out: Path, need_bytes: int, remedy: str) -> None:
    """Raise UsageError when the disk has less than need_bytes free. remedy: what the user can do."""
    free = shutil.disk_usage(out).free
    if free < need_bytes:
        raise UsageError(
            f"--out {out}: about {need_bytes / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free there; "
            f"{remedy}"
        )


# ---- files of a run -------------------------------------------------------------------------------------------------


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_run(folder: Path, remedy: str = RESUME_REMEDY) -> dict[str, Any]:
    """Return the run.json of a folder, {} where it has none. Raise DataError, with the remedy, where it is damaged."""
    run = read_json(folder / RUN, remedy)
    with reading(folder / RUN, remedy):
        if run and run.get("status") not in STATUSES:
            raise ValueError(f"its status is {str(run.get('status'))[:40]!r}, wanted one of {', '.join(STATUSES)}")
        for name, kind in (("config", dict), ("facts", dict), ("tracked_as", str)):
            if not isinstance(run.get(name, kind()), kind):
                raise TypeError(f"its {name} is {str(run[name])[:40]!r}")
        if not 0 <= run.get("seconds", 0.0) < math.inf:
            raise ValueError(f"its seconds are {run['seconds']}")
    return run


def read_prompt_style(folder: Path) -> str | None:
    """Return the --prompt-style of the run that wrote a folder, None where it has no run.json of ours.

    Raise DataError for a damaged one: the model would be asked in another style than it was trained in.
    """
    remedy = "copy the file again, or remove it and pass --prompt-style"
    run = read_json(folder / RUN, remedy)
    with reading(folder / RUN, remedy):
        style = run.get("config", {}).get("prompt_style")
        if not isinstance(style, str | None):
            raise TypeError("its prompt_style is no text")
    return style


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return the device, the versions and the command of this process, for run.json."""
    root = Path(__file__).parents[2]
    commit = None
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
            )
            commit = done.stdout.strip() or None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "command": sys.argv,
        "git_commit": commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
