"""What a command prints and writes, with all that differs between two machines or two runs replaced."""

import hashlib
import json
import re
from pathlib import Path

import pytest
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
        value = json.loads(text)
        assert text.rstrip("\n") == json.dumps(value, indent=1), "people read it"
        text = json.dumps(mask_json(value), indent=1)
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


def fill_exactly(parameters):
    """Fill parameters with numbers that fp16 and bf16 hold, the same on every machine: k / 64 with k of -125 to 125."""
    with torch.no_grad():
        for i, p in enumerate(parameters):
            numbers = (torch.arange(p.numel()) * 37 + 11 * i) % 251 - 125
            p.copy_((numbers / 64).view(p.shape))


def shorten(value):
    """Return a JSON value with a hash for each list and object of more than 40 entries, without a token's flags that
    are off."""
    if isinstance(value, (dict, list)) and len(value) > 40:
        return f"{len(value)} entries, {hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]}"
    if isinstance(value, dict):
        off = {key for key in ("single_word", "lstrip", "rstrip", "normalized") if value.get(key) is False}
        return {key: shorten(item) for key, item in value.items() if key not in off}
    return [shorten(item) for item in value] if isinstance(value, list) else value


def describe_gguf(path):
    """Return the metadata and the tensors of a GGUF file as the gguf package reads it."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    lines = [f"{name} = {json.dumps(shorten(field.contents()))}" for name, field in reader.fields.items()]
    for tensor in reader.tensors:
        content = hashlib.sha256(tensor.data.tobytes()).hexdigest()[:12]
        lines.append(f"{tensor.name} {tensor.tensor_type.name} {[int(n) for n in tensor.shape]} {content}")
    return "\n".join(lines)


def describe_files(folder):
    """Return what the files of a model hold: JSON but for long lists, and the tensors."""
    texts = []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".json":
            text = json.dumps(shorten(json.loads(path.read_text())), indent=1)
        elif path.suffix == ".safetensors":
            text = list_tensors(path)
        elif path.suffix == ".pth":
            tensors = torch.load(path, weights_only=True).items()
            text = "\n".join(f"{name} {t.dtype} {list(t.shape)} {hash_tensor(t)}" for name, t in tensors)
        else:
            text = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        texts.append(f"== {path.name}\n{text}")
    return "\n".join(texts)
