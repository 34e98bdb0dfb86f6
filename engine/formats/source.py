"""Models of other programs, checked and read into our Transformer.

    hf     config.json + model.safetensors, several of them, or pytorch_model.bin
    meta   params.json + consolidated.00.pth ..., one for each of any number of model-parallel ranks
    gguf   one file, in any quantisation that the gguf package can dequantise

open_source() checks everything before anything big is allocated. Source.read_into() then reads one tensor after the
other straight into its rows of our merged parameters. So beside the model there is at most a copy of one tensor.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.base.errors import DataError, reading
from engine.base.watching import Watch, watch_silently
from engine.formats.configs import config_from_gguf, config_from_hf, config_from_meta
from engine.formats.find import detect_kind, explain_no_model, explain_other_content
from engine.formats.folders import StandInError, find_member, read_json_member
from engine.formats.gguf import open_gguf
from engine.formats.names import GLOBAL_NAMES, PROGRAMS, list_pieces
from engine.formats.pieces import read_pieces
from engine.formats.settings import join_problems
from engine.formats.tensor_files import Block, Stored, as_one_block, open_pth, open_safetensors
from engine.model.config import ModelConfig
from engine.model.llama import Transformer
from engine.model.shard import Shard

# Frequencies of RoPE in checkpoints of 2023. They follow from the config.
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope\.freqs")
# Ends of the names of what quantisers store beside, or in place of, a weight: GPTQ, AWQ, compressed-tensors,
# bitsandbytes, fp8.
QUANTISED = re.compile(r".*\.(qweight|weight_packed|absmax|quant_map|weight_scale(_inv)?)")
FileOpener = Callable[[Path], dict[str, Stored]]


@dataclass(frozen=True)
class Opened:
    """The content of a model's files, before it is checked."""

    config: ModelConfig | None = None  # None after a fault, so that tensors cannot be checked
    stored: dict[str, Stored] = field(default_factory=dict)
    unreadable: Collection[str] = ()  # tensors in files that did not open, which is reported already


@dataclass(frozen=True)
class Source:
    """A checked model of another program, whose tensors can be read. Nothing big is allocated yet."""

    path: Path
    kind: str  # "hf", "meta" or "gguf"
    config: ModelConfig
    dtype: torch.dtype  # of most of the weights; fp32 where they are quantised
    generation_config: dict[str, Any]  # generation_config.json, {} if the folder has none
    stored: dict[str, Stored] = field(repr=False)

    @torch.no_grad()
    def read_into(
        self, model: Transformer, shards: Mapping[str, Shard] | None = None, watch: Watch = watch_silently
    ) -> None:
        """Fill every parameter of a model of this config, converted to its dtype and device.

        shards: {parameter: the rows that this rank holds} of a sharded model.
        Each tensor is then read whole, one at a time. Raise DataError for one that is not finite.
        """
        if model.config != self.config:
            raise ValueError(f"read_into: the model is {model.config}, {self.path} holds {self.config}")
        pieces = list_pieces(self.config, self.kind)
        parameters = dict(model.named_parameters()) | model.nf4_weights()
        read_pieces(self.path, self.stored, pieces, parameters, shards, watch)


def open_source(path: Path) -> Source:
    """Open a Hugging Face or Meta folder, or a .gguf file. Raise DataError that lists every problem at once."""
    path = Path(path)
    problems: list[str] = []
    try:
        return read_source(path, problems)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def read_source(path: Path, problems: list[str]) -> Source:
    """Return the source at a path. Raise DataError with the problems, which do not name the path."""
    with reading("the model"):
        kind = detect_kind(path)
        if kind is None or kind not in OPENERS:
            raise DataError(explain_no_model(path))
        opened = OPENERS[kind](path, problems)
        generation_config = None
        if kind == "hf" and os.path.lexists(path / "generation_config.json"):
            generation_config = read_json_member(path, "generation_config.json", problems)
        if opened.config:
            check_tensors(opened.config, kind, opened.stored, opened.unreadable, problems)
        if problems or opened.config is None:
            raise DataError(join_problems(problems))
    dtype = most_common_dtype(opened.stored)
    return Source(path, kind, opened.config, dtype, generation_config or {}, opened.stored)


def most_common_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """Return the dtype that most of the weights are stored in."""
    sizes: Counter[Any] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    return sizes.most_common(1)[0][0]


# ---- tensors against the config -------------------------------------------------------------------------------------


def check_tensors(
    config: ModelConfig, kind: str, stored: dict[str, Stored], unreadable: Collection[str], problems: list[str]
) -> None:
    """Add a problem for every tensor whose name, shape or dtype the config does not want, and for missing ones.

    Tensors that are valid but not read are removed from stored.
    """
    n_tensors = len(stored) + len(unreadable)
    if config.n_layers > n_tensors:  # before list_pieces() makes a table of as many
        problems.append(f"{config.n_layers} layers by the config, but there are only {n_tensors} tensors")
        return
    quantised = [name for name, t in stored.items() if QUANTISED.fullmatch(name) or "8_e" in str(t.dtype).lower()]
    if quantised:
        first, n = stored[quantised[0]], len(quantised)
        more = f", and {n - 1} more" if n > 1 else ""
        problems.append(
            f"{first.file}: {quantised[0]}, {first.dtype}{more}: quantised weights, which are not read; save the model "
            "unquantised first, in bf16"
        )
        return
    wanted = list_pieces(config, kind)
    column = PROGRAMS.index(kind)
    head, embedding = GLOBAL_NAMES["output"][column], GLOBAL_NAMES["tok_embeddings"][column]
    if config.tied and head in stored and embedding not in stored and embedding not in unreadable:
        stored[embedding] = stored.pop(head)
    if config.tied and head in stored and embedding in stored:
        if is_equal(stored[head], stored[embedding]):
            del stored[head]
        else:
            problems.append(f"{stored[head].file}: {head} differs from {embedding}, but the config ties them")
            wanted[head] = wanted[embedding]
    for name in [name for name in stored if IGNORED.fullmatch(name)]:
        del stored[name]
    problems += [f"{name} is missing" for name in wanted if name not in stored and name not in unreadable]
    of_type: dict[Any, list[str]] = {}
    for name, tensor in stored.items():
        if name not in wanted:
            note = ""
            if "exp" in name:
                note = ": mixtures of experts are no LLaMA"
            elif name.endswith(".bias"):
                note = ": the config has no bias there"
            problems.append(f"{tensor.file}: {name} {tensor.shape} is not wanted{note}")
            continue
        if tensor.shape != wanted[name].shape:
            problems.append(f"{tensor.file}: {name} is {tensor.shape}, wanted {wanted[name].shape} by the config")
        if not isinstance(tensor.dtype, torch.dtype) or not tensor.dtype.is_floating_point:
            of_type.setdefault(tensor.dtype, []).append(name)
    for dtype, names in of_type.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        problems.append(
            f"{stored[names[0]].file}: {names[0]}{more} is of type {dtype}, which is not read; wanted "
            + ("another quantisation" if kind == "gguf" else "fp32, fp16 or bf16")
        )


def is_equal(a: Stored, b: Stored) -> bool:
    """Return whether two matrices are equal. They are compared block by block, so that neither is in memory whole."""
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


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def open_each(
    folder: Path, names: Iterable[str], opener: FileOpener, problems: list[str]
) -> dict[str, dict[str, Stored]]:
    """Return {file: its tensors} of the files that can be opened. Add a problem for each of the others."""
    opened, stand_ins = {}, []
    for name in names:
        try:
            opened[name] = opener(find_member(folder, name))
        except StandInError as error:
            stand_ins.append(error)
        except DataError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    if stand_ins:  # one line, however many files of a clone were not downloaded
        more = f" (and {len(stand_ins) - 1} more)" if len(stand_ins) > 1 else ""
        problems.append(f"{stand_ins[0].name}{more} is {stand_ins[0].what}")
    return opened


def open_hf(folder: Path, problems: list[str]) -> Opened:
    """Open a Hugging Face folder, adding its faults to problems."""
    raw = read_json_member(folder, "config.json", problems)
    config = config_from_hf(raw, problems) if raw is not None else None
    choices = [  # transformers' own order
        ("model.safetensors", open_safetensors),
        ("model.safetensors.index.json", open_safetensors),
        ("pytorch_model.bin", open_pth),
        ("pytorch_model.bin.index.json", open_pth),
    ]
    found = [choice for choice in choices if os.path.lexists(folder / choice[0])]
    if not found:
        names = ", ".join(name for name, _ in choices)
        problems.append(explain_other_content(folder) or f"no weights; wanted one of {names}")
        return Opened()
    name, opener = found[0]
    if name.endswith(".index.json"):
        stored, unreadable = open_indexed(folder, name, opener, problems)
        unreadable = {name if name.startswith(PREFIXED) else f"model.{name}" for name in unreadable}
        return Opened(config, add_prefixes(stored, problems), unreadable)
    opened = open_each(folder, [name], opener, problems)
    return Opened(config, add_prefixes(opened[name], problems)) if opened else Opened()


PREFIXED = ("model.", "lm_head.")


def add_prefixes(stored: dict[str, Stored], problems: list[str]) -> dict[str, Stored]:
    """Return the tensors with `model.` before the names that a LlamaModel, a model without its head, stores without."""
    if not any(name.startswith(("layers.", "embed_tokens.")) for name in stored):
        return stored
    renamed: dict[str, Stored] = {}
    for name, tensor in stored.items():
        new = name if name.startswith(PREFIXED) else f"model.{name}"
        if new != name and new in stored:
            problems.append(f"{tensor.file}: {name} and {new} are both there")
        renamed[new] = tensor
    return renamed


def open_indexed(
    folder: Path, index_name: str, opener: FileOpener, problems: list[str]
) -> tuple[dict[str, Stored], set[str]]:
    """Open the files of an index. Return (their tensors, names of the tensors in files that could not be opened)."""
    raw = read_json_member(folder, index_name, problems)
    file_of = raw.get("weight_map") if raw is not None else {}
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        problems.append(f"{index_name}: weight_map is missing or not an object of file names")
        file_of = {}
    stored: dict[str, Stored] = {}
    opened = open_each(folder, sorted(set(file_of.values())), opener, problems)
    for file, tensors in opened.items():
        problems += [f"{file}: {name} is in {stored[name].file} too" for name in tensors if name in stored]
        stored |= tensors
    for name, file in file_of.items():
        if file in opened and name not in opened[file] and not IGNORED.fullmatch(name):
            problems.append(f"{index_name}: {name} is not in {file}")
    return stored, {name for name, file in file_of.items() if file not in opened}


# ---- Meta -----------------------------------------------------------------------------------------------------------


def open_meta(folder: Path, problems: list[str]) -> Opened:
    """Open a Meta folder, adding its faults to problems."""
    raw = read_json_member(folder, "params.json", problems)
    files = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"consolidated\.\d+\.pth", path.name))
    if not files:
        problems.append("no weights; wanted consolidated.00.pth")
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(files))]
    if files and files != wanted:
        last = int(files[-1].split(".")[1])
        missing = [name for i in range(min(last, 999)) if (name := f"consolidated.{i:02d}.pth") not in files]
        problems.append(f"{', '.join(missing) or 'a shard'} is missing; there are {', '.join(files)}")
    ranks = list(open_each(folder, files, open_pth, problems).values())
    if files != wanted or len(ranks) < len(files) or not ranks:
        return Opened()
    before = len(problems)
    stored = merge_ranks(ranks, raw or {}, problems)
    if raw is None or len(problems) > before:
        return Opened()
    config = config_from_meta(raw, {name: tensor.shape for name, tensor in stored.items()}, problems)
    head, embedding = stored.get("output.weight"), stored.get("tok_embeddings.weight")
    if config and head and embedding and is_equal(head, embedding):
        config = replace(config, tied=True)  # LLaMA 3.2 ties them, and stores both for Meta's code
    return Opened(config, stored)


def merge_ranks(ranks: list[dict[str, Stored]], params: dict[str, Any], problems: list[str]) -> dict[str, Stored]:
    """Return the whole tensors of a model that is split over model-parallel ranks, adding faults to problems.

    The ranks split a matrix by rows or by columns and repeat a norm.
    """
    n, dim = len(ranks), params.get("dim")
    stored: dict[str, Stored] = {}
    split = ranks[0].get("layers.0.attention.wo.weight")  # split by columns, so its width gives the number of ranks
    if split and len(split.shape) == 2 and type(dim) is int and split.shape[1] * n != dim:
        count = f"{dim / max(split.shape[1], 1):g}"
        problems.append(f"{split.file} is one of {count} shards by its shapes and params.json; there are {n}")
        return {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        parts = [rank[name] for rank in ranks if name in rank]
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
        stored[name] = join_parts(parts, by_columns)
    return stored


def join_parts(parts: list[Stored], by_columns: bool) -> Stored:
    """Join parts of equal shape into one matrix, side by side (by_columns) or one below the other."""
    rows, columns = parts[0].shape

    def blocks() -> Iterator[Block]:
        for i, part in enumerate(parts):
            for row, column, tensor in part.blocks():
                yield (row, column + i * columns, tensor) if by_columns else (row + i * rows, column, tensor)

    shape = (rows, columns * len(parts)) if by_columns else (rows * len(parts), columns)
    return replace(parts[0], file=f"{parts[0].file} and others", shape=shape, blocks=blocks)


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def open_gguf_model(path: Path, problems: list[str]) -> Opened:
    """Open a GGUF file, adding its faults to problems."""
    metadata, stored = open_gguf(path)
    config = config_from_gguf(metadata, stored, problems)
    if config and (config.attention_bias or config.mlp_bias) and config.n_layers <= len(stored):
        for name, piece in list_pieces(config, "gguf").items():
            if name.endswith(".bias"):  # a bias that a file lacks is none
                zeros = Stored(path.name, piece.shape, torch.float32, as_one_block(partial(torch.zeros, piece.shape)))
                stored.setdefault(name, zeros)
    return Opened(config, stored)


OPENERS: dict[str, Callable[[Path, list[str]], Opened]] = {
    "hf": open_hf,
    "meta": open_meta,
    "gguf": open_gguf_model,
}
