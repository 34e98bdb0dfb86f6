"""Folders and files of other programs <-> our Transformer.

    hf     config.json + model.safetensors, its shards, or pytorch_model.bin     read and written
    meta   params.json + consolidated.00.pth ... one a model-parallel rank       read (any number) and written (one)
    gguf   one file, any quantisation that the gguf package undoes               read

open_source checks everything before anything big is allocated. Tensors then go one by one straight into their rows of
our merged parameters, so beside the model there is at most a copy of one tensor.
"""

import contextlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine.base.errors import DataError
from engine.formats.configs import config_from_gguf, config_from_hf, config_from_meta, join_problems
from engine.formats.find import is_training_state, kind_of, list_checkpoints
from engine.formats.folders import member, read_json
from engine.formats.gguf import open_gguf
from engine.formats.names import GLOBAL_NAMES, PROGRAMS, list_pieces, pairs_to_halves
from engine.formats.tensor_files import Stored, open_pth, open_safetensors
from engine.model.config import ModelConfig
from engine.model.llama import Transformer

IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|rope\.freqs")  # computed from the config; 2023 checkpoints hold them


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: everything known, nothing big allocated."""

    path: Path
    kind: str  # "hf", "meta" or "gguf"
    config: ModelConfig
    dtype: torch.dtype  # that most of the weights are stored in; of quantised ones fp32
    generation_config: dict  # of the folder's generation_config.json, {} if none
    stored: dict[str, Stored] = field(repr=False)

    @torch.no_grad()
    def read_into(self, model: Transformer, held=None) -> None:
        """Fills every parameter of a model of this config, converting to its dtype and device.

        held: {parameter: the rows that are here} of a sharded model: of what is here in part, one whole tensor of the
        checkpoint at a time is in memory.
        """
        if model.config != self.config:
            raise ValueError(f"read_into: the model is {model.config}, {self.path} holds {self.config}")
        parameters = dict(model.named_parameters())
        for name, piece in list_pieces(self.config, self.kind).items():
            here = held[piece.parameter] if held else None
            if here is None or not here.rows:
                self.fill(name, piece, piece.of(parameters))
                continue
            first, end = piece.first_row, piece.first_row + piece.shape[0]
            first, end = max(first, here.first), min(end, here.first + len(here.tensor))
            if first < end:
                whole = here.tensor.new_empty(piece.shape)
                self.fill(name, piece, whole)
                wanted = whole[first - piece.first_row : end - piece.first_row]
                here.tensor[first - here.first : end - here.first] = wanted

    def fill(self, name, piece, rows):
        """rows: all of a piece's."""
        for row, column, part in self.stored[name].blocks():
            target = rows[row : row + len(part)]
            if part.ndim == 2:
                target = target[:, column : column + part.shape[1]]
            target.copy_(part)
        if piece.paired_heads:
            rows.copy_(pairs_to_halves(rows, piece.paired_heads))


def open_source(path: Path) -> Source:
    """Opens a Hugging Face or Meta folder, or a .gguf file. Raises DataError listing every problem at once."""
    path, problems = Path(path), []
    with naming(path):
        kind = kind_of(path)
        config, stored, lost = OPENERS.get(kind, refuse)(path, problems)
        generation_config = {}
        if kind == "hf" and os.path.lexists(path / "generation_config.json"):
            generation_config = read_json(path, "generation_config.json", problems) or {}
        if config:
            check_tensors(config, kind, stored, lost, problems)
        if problems:
            raise DataError(join_problems(problems))
    sizes = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    return Source(path, kind, config, sizes.most_common(1)[0][0], generation_config, stored)


def refuse(path, problems):
    """What is no model, though one may be had from it."""
    export = "python -m engine.export --model {} --out DIR"
    if is_training_state(path):
        raise DataError(f"holds a training state, not a model; {export.format(path)} makes one of it")
    if states := list_checkpoints(path):
        raise DataError(f"holds training states, no model yet; {export.format(states[-1][1])} makes one of the newest")
    got = "holds neither" if path.is_dir() else "is none" if path.exists() else "does not exist"
    raise DataError(f"{got}; wanted a folder with config.json or params.json, or a .gguf file")


@contextlib.contextmanager
def naming(path):
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def check_tensors(config, kind, stored, lost, problems):
    """Names, shapes and dtypes of the stored tensors against the config. Drops from stored what nobody reads.

    lost: names that are in files which did not open, a problem that is told already.
    """
    n_tensors = len(stored) + len(lost)
    if config.n_layers > n_tensors:  # before a table is made of them
        problems.append(f"{config.n_layers} layers by the config, but there are only {n_tensors} tensors")
        return
    wanted = list_pieces(config, kind)
    column = PROGRAMS.index(kind)
    head, embedding = GLOBAL_NAMES["output"][column], GLOBAL_NAMES["tok_embeddings"][column]
    if config.tied and head in stored and embedding in stored:
        if same(stored[head], stored[embedding]):
            del stored[head]
        else:
            problems.append(f"{stored[head].file}: {head} differs from {embedding}, but the config ties them")
            wanted[head] = wanted[embedding]
    for name in [name for name in stored if IGNORED.fullmatch(name)]:
        del stored[name]
    problems += [f"{name} is missing" for name in wanted if name not in stored and name not in lost]
    for name, tensor in stored.items():
        if name not in wanted:
            note = ": LLaMA has no biases" if name.endswith(".bias") else ""
            note = ": mixtures of experts are no LLaMA" if "exp" in name else note
            problems.append(f"{tensor.file}: {name} {tensor.shape} is not wanted{note}")
            continue
        if tensor.shape != wanted[name].shape:
            problems.append(f"{tensor.file}: {name} is {tensor.shape}, wanted {wanted[name].shape} by the config")
        if not isinstance(tensor.dtype, torch.dtype) or not tensor.dtype.is_floating_point:
            problems.append(
                f"{tensor.file}: {name} is of type {tensor.dtype}, which is not read; wanted "
                + ("another quantisation" if kind == "gguf" else "fp32, fp16 or bf16")
            )


def same(a: Stored, b: Stored):
    """Whether two mapped tensors are equal, part by part where they overlap."""
    if len(a.shape) != 2 or a.shape != b.shape or a.dtype != b.dtype or isinstance(a.dtype, str):
        return False
    for row, column, x in a.blocks():
        for top, left, y in b.blocks():
            first, last = max(row, top), min(row + len(x), top + len(y))
            start, end = max(column, left), min(column + x.shape[1], left + y.shape[1])
            if first < last and start < end:
                x_part = x[first - row : last - row, start - column : end - column]
                if not torch.equal(x_part, y[first - top : last - top, start - left : end - left]):
                    return False
    return True


def open_each(folder, names, opener, problems):
    """{name: its tensors} of the files that can be opened; the others become problems."""
    opened = {}
    for name in names:
        try:
            opened[name] = opener(member(folder, name))
        except DataError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return opened


def open_hf(folder, problems):
    raw = read_json(folder, "config.json", problems)
    config = config_from_hf(raw, problems) if raw is not None else None
    choices = [  # transformers' own order
        ("model.safetensors", open_safetensors),
        ("model.safetensors.index.json", open_safetensors),
        ("pytorch_model.bin", open_pth),
        ("pytorch_model.bin.index.json", open_pth),
    ]
    found = [choice for choice in choices if os.path.lexists(folder / choice[0])]
    if not found:
        problems.append("no weights; wanted one of " + ", ".join(name for name, _ in choices))
        return None, {}, ()
    name, opener = found[0]
    if name.endswith(".index.json"):
        return config, *read_shards(folder, name, opener, problems)
    opened = open_each(folder, [name], opener, problems)
    return (config, opened[name], ()) if opened else (None, {}, ())


def read_shards(folder, index_name, opener, problems):
    """The tensors of all shards that open, and the names of those in the others."""
    raw = read_json(folder, index_name, problems)
    where = raw.get("weight_map") if raw is not None else {}
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        problems.append(f"{index_name}: weight_map is missing or not an object of file names")
        where = {}
    stored = {}
    opened = open_each(folder, sorted(set(where.values())), opener, problems)
    for file, tensors in opened.items():
        problems += [f"{file}: {name} is in {stored[name].file} too" for name in tensors if name in stored]
        stored |= tensors
    for name, file in where.items():
        if file in opened and name not in opened[file] and not IGNORED.fullmatch(name):
            problems.append(f"{index_name}: {name} is not in {file}")
    return stored, {name for name, file in where.items() if file not in opened}


def open_meta(folder, problems):
    raw = read_json(folder, "params.json", problems)
    files = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"consolidated\.\d+\.pth", path.name))
    if not files:
        problems.append("no weights; wanted consolidated.00.pth")
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(files))]
    if files and files != wanted:
        last = int(files[-1].split(".")[1])
        missing = [name for i in range(min(last, 999)) if (name := f"consolidated.{i:02d}.pth") not in files]
        problems.append(f"{', '.join(missing) or 'a shard'} is missing; there are {', '.join(files)}")
    shards = list(open_each(folder, files, open_pth, problems).values())
    if files != wanted or len(shards) < len(files) or not shards:
        return None, {}, ()
    before = len(problems)
    stored = merge_shards(shards, raw or {}, problems)
    if raw is None or len(problems) > before:
        return None, {}, ()
    config = config_from_meta(raw, {name: tensor.shape for name, tensor in stored.items()}, problems)
    head, embedding = stored.get("output.weight"), stored.get("tok_embeddings.weight")
    if config and head and embedding and same(head, embedding):
        config = replace(config, tied=True)  # LLaMA 3.2 ties them and stores both: Meta's code wants them
    return config, stored, ()


def merge_shards(shards, params, problems):
    """Stored tensors over all model-parallel ranks, which split a matrix by rows or by columns and repeat a norm."""
    n, stored, dim = len(shards), {}, params.get("dim")
    split = shards[0].get("layers.0.attention.wo.weight")  # by columns: its shape tells the number of shards
    if split and len(split.shape) == 2 and type(dim) is int and split.shape[1] * n != dim:
        count = f"{dim / max(split.shape[1], 1):g}"
        problems.append(f"{split.file} is one of {count} shards by its shapes and params.json; there are {n}")
        return {}
    for name in dict.fromkeys(name for shard in shards for name in shard):
        parts = [shard[name] for shard in shards if name in shard]
        if len(parts) < n:
            problems.append(f"{name} is in {', '.join(part.file for part in parts)} alone, not in every shard")
            continue
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            shapes = ", ".join(f"{part.shape} {part.dtype} in {part.file}" for part in parts)
            problems.append(f"{name}: shards disagree: {shapes}")
            continue
        shape = parts[0].shape
        if n == 1 or len(shape) != 2:
            stored[name] = parts[0]
            continue
        # wo and w2 take split inputs; the embedding is split by columns in LLaMA 1 and 2, by rows in 3.
        by_columns = name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok_emb") and shape[1] != dim)
        stored[name] = join(parts, by_columns)
    return stored


def join(parts, by_columns):
    rows, columns = parts[0].shape

    def blocks():
        for i, part in enumerate(parts):
            for row, column, tensor in part.blocks():
                yield (row, column + i * columns, tensor) if by_columns else (row + i * rows, column, tensor)

    shape = (rows, columns * len(parts)) if by_columns else (rows * len(parts), columns)
    return replace(parts[0], file=f"{parts[0].file} and others", shape=shape, blocks=blocks)


def open_gguf_source(path, problems):
    metadata, stored = open_gguf(path)
    return config_from_gguf(metadata, stored, problems), stored, ()


OPENERS = {"hf": open_hf, "meta": open_meta, "gguf": open_gguf_source}
