"""What a command prints and writes, with all that differs between two machines or two runs replaced."""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.training.next_commands import name_python
from tests.helpers.small_model import small_model

MEASURED = {  # keys of JSON whose values are those of one machine and one run
    "seconds", "held_seconds", "step_seconds", "tokens_per_second", "peak_memory_bytes", "started", "environment",
    "tracked_as", "command", "sha256", "data_sha256", "base_sha256",
}  # fmt: skip


def replace_places(text, folder):
    """Return a text without the places of this machine. folder: that of the test."""
    for place, name in ((folder, "FOLDER"), (small_model(), "MODEL"), (name_python(), "PYTHON")):
        text = text.replace(str(place), name)
    return text


def describe_printed(text, folder):
    """Return what a command printed, without speeds, times and gradient norms of two digits."""
    text = re.sub(r"norm +[\d.]+  +[\d,.]+ tok/s( +eta \S+)?", "norm # tok/s", replace_places(text, folder))
    return re.sub(r"\b\d\S* s\b|(?<=CPU: about )[^,]+", "#", text)


def mask_json(value):
    """Return a JSON value with "#" for each that was measured."""
    if isinstance(value, dict):
        return {key: "#" if key in MEASURED and item else mask_json(item) for key, item in value.items()}
    return [mask_json(item) for item in value] if isinstance(value, list) else value


def describe_json(path, folder):
    """Return a JSON or JSONL file, without what was measured."""
    text = Path(path).read_text()
    if Path(path).suffix == ".jsonl":
        lines = [mask_json(json.loads(line)) for line in text.splitlines()]
        lines.sort(key=lambda line: (line["event"] == "save") + 2 * (line["event"] == "end"))  # a thread saves
        text = "\n".join(map(json.dumps, lines))
    else:
        text = json.dumps(mask_json(json.loads(text)), indent=1)
    return replace_places(text, folder)


def describe_changes(path, folder):
    """Return what run.json tells beside its settings: a line each."""
    run = json.loads(Path(path).read_text())
    config = {name: run["config"][name] for name in run["changed"]}
    rest = {key: value for key, value in run.items() if key not in ("config", "model", "facts")}
    return replace_places(json.dumps(mask_json(rest | {"config": config}), indent=1), folder)


def list_tensors(path, hashed=True):
    """Return a line a tensor of a safetensors file: name, dtype, shape and the start of a hash of its bytes."""
    lines = []
    for name, tensor in sorted(load_file(path).items()):
        line = f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        if hashed:
            line += f" {hash_tensor(tensor)}"
        lines.append(line)
    return "\n".join(lines)


def hash_tensor(tensor):
    """Return the start of a hash of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()[:12]


def list_files(folder):
    """Return the names of all files below a folder, a line each."""
    return "\n".join(sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()))
