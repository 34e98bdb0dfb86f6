"""Tokenizers of checkpoints: SentencePiece (tokenizer.model), Hugging Face (tokenizer.json), and those inside a GGUF.

The ids are those that transformers gives with add_special_tokens=False and split_special_tokens=True. As there, a
folder with both files is read by its tokenizer.json, and for the class LlamaTokenizer with the pre-tokenizer that this
class sets. Three things differ from transformers:

- A folder that has only tokenizer.model gives SentencePiece's ids, the reference of Meta and of Stanford. The class
  LlamaTokenizer of transformers 5 adds no prefix space before a leading space: " a" is ▁a with it and ▁ ▁a here. It
  ranks merges by id, not by score: "a  b" is ▁a ▁▁ b with it and ▁a ▁ ▁b here. It adds BOS only where
  tokenizer_config.json says so; SentencePiece's LLaMA always does.
- Merges that make a special token out of plain text are dropped.
- Classes with another pre-tokenizer of their own, like GPT2Tokenizer, are not imitated: tokenizer.json says what the
  model learned. From the GGUF of SmolLM2, transformers 5 lets digits swallow a space: "\\n 1" is Ċ Ġ 1 with it and
  ĊĠ 1 here.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.base.errors import DataError, UsageError, reading
from engine.formats.find import find_embedded_gguf, find_model
from engine.formats.folders import explain_stand_in
from engine.model.config import EMBEDDED_MODEL, MODELS, ModelConfig
from engine.text.tokenizer import SAVED, Encode, Tokenizer, Vocabulary
from engine.text.tokenizer_gguf import read_files_from_gguf
from engine.text.tokenizer_json import is_chat_token, make_decoder, write_json
from engine.text.tokenizer_parts import (
    CONFIG,
    TOKENS_MAP,
    Files,
    make_tokenizer,
    piece_to_bytes,
    read_json,
    read_named_tokens,
)
from engine.text.tokenizer_sentencepiece import add_tokenizer_model, load_sentencepiece

READ = (*SAVED, "generation_config.json", "config.json")
DECODERS = {"ByteLevel", "Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}  # of a LLaMA


def find_tokenizer(config: ModelConfig, name: str, model_path: Path | None) -> Tokenizer:
    """Load the tokenizer that --tokenizer names; for "", the model's own.

    A model of random weights (model_path is None) gets the embedded tokenizer, where it has as many tokens. Raise
    UsageError when it does not, and DataError when the tokenizer's ids do not fit the model: it has more, or they stand
    for other text than in the model's own tokenizer.
    """
    if name:
        path = find_model(name)
    elif model_path is not None:
        path = model_path
    elif config.vocab_size == MODELS[EMBEDDED_MODEL].vocab_size:
        path = find_embedded_gguf()
    else:
        raise UsageError(f"--random-init with {config.vocab_size} tokens needs --tokenizer, a folder or a .gguf")
    tokenizer = load_tokenizer(path)
    n_tokens = tokenizer.vocab_size
    if n_tokens > config.vocab_size and not tokenizer.forget_unembedded(config.vocab_size):
        raise DataError(
            f"{path}: the tokenizer has {n_tokens} tokens, the model embeds {config.vocab_size}; "
            "they do not belong together"
        )
    if name and model_path is not None:
        require_same_pieces(tokenizer, path, model_path)
    return tokenizer


def require_same_pieces(tokenizer: Tokenizer, path: Path, model_path: Path) -> None:
    """Raise DataError where an id is other text than in the model's own tokenizer, and would get the embedding of that.

    New ids, missing ids and other special tokens are no reason. A model without a tokenizer is not compared; for one
    whose tokenizer cannot be read there is a warning.
    """
    try:
        own = load_tokenizer(model_path)
    except DataError as error:
        if any((model_path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            tokenizer.warnings += (f"{error}; so the ids of --tokenizer {path} could not be compared with the model's",)
        return
    if other := tokenizer.find_other_pieces(own):
        id, got, wanted = other[0]
        raise DataError(
            f"--tokenizer {path}: {len(other):,} of its ids are other text in the model's own tokenizer, the first "
            f"{id}: got {got.decode(errors='replace')!r}, wanted {wanted.decode(errors='replace')!r}. The model would "
            f"read other words; leave --tokenizer out, or take the tokenizer's files out of {model_path} if they are "
            "the wrong ones"
        )


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint's folder or .gguf file. Raise DataError when it is missing or corrupt."""
    path = Path(path)
    warnings: list[str] = []
    with reading(f"{path}: the tokenizer"):
        if path.is_file():
            files, warnings = read_files_from_gguf(path)
        else:
            files = {name: (path / name).read_bytes() for name in READ if (path / name).is_file()}
        for name, content in files.items():
            if what := explain_stand_in(content[:64]):
                raise DataError(f"{path / name}: {what}")
        if "tokenizer.json" in files:
            return load_tokenizer_json(path, files, warnings)
        if "tokenizer.model" in files:
            return load_sentencepiece(path, files)
    raise DataError(f"{path}: got neither tokenizer.model nor tokenizer.json, wanted one; copy it from the checkpoint")


# ---- tokenizer.json -------------------------------------------------------------------------------------------------


def load_tokenizer_json(path: Path, files: Files, warnings: Sequence[str] = ()) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, as the tokenizers library runs it."""
    spec = read_json(path, files, "tokenizer.json")
    config, model_config = (read_json(path, files, name) for name in ("tokenizer_config.json", "config.json"))
    vocab, added = spec["model"]["vocab"], spec.get("added_tokens") or []
    if isinstance(vocab, list):  # Unigram: [piece, score]
        vocab = {piece: id for id, (piece, _) in enumerate(vocab)}
    byte_level = '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    hf_class = config.get("tokenizer_class") or model_config.get("tokenizer_class") or ""
    names: dict[str, str | None] = {}
    if hf_class.removesuffix("Fast") == "LlamaTokenizer" and not byte_level:
        convert_to_llama_tokenizer(spec, config)
        if spec != read_json(path, files, "tokenizer.json"):  # so that it means the same without the class
            files = files | {"tokenizer.json": write_json(spec)}
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= read_named_tokens(path, files)
    decoder = json.dumps(spec.get("decoder"))
    if unknown := set(re.findall(r'"type": "(\w+)"', decoder)) - DECODERS:
        raise DataError(
            f"{path / 'tokenizer.json'}: got a decoder {', '.join(sorted(unknown))}, wanted a LLaMA's: byte-level or ▁"
        )
    has_prefix = '"Strip"' in decoder or ('"Metaspace"' in decoder and '"never"' not in decoder)
    ids = vocab | {token["content"]: token["id"] for token in added}
    special = {token["content"] for token in added if token.get("special") or is_chat_token(token["content"])}
    special |= {token for token in names.values() if token is not None}
    template_bos = find_template_bos(path, spec)
    if template_bos is not None:
        special |= {token for token, id in ids.items() if id == template_bos}
    specials = {token: id for token, id in sorted(ids.items(), key=lambda item: item[1]) if token in special}
    plain = {token["content"] for token in added} - special
    raw = plain if byte_level else ()
    pieces = {id: token.encode() if token in raw else piece_to_bytes(token, byte_level) for token, id in ids.items()}
    vocabulary = Vocabulary(ids, pieces, specials, byte_level, has_prefix)
    bpe = dict(spec["model"])
    hide_specials(spec, specials)
    tokenizer = make_tokenizer(path, files, make_encoder(path, spec), vocabulary, names, False)
    tokenizer.warnings = tuple(warnings)
    if template_bos is not None:  # it counts whatever the other files say, in transformers 5 and in llama.cpp
        tokenizer.bos_id, tokenizer.add_bos = template_bos, True
        agree_on_bos(path, tokenizer, ids, template_bos)
    if not byte_level and "tokenizer.model" not in files and bpe.get("byte_fallback") and "merges" in bpe:
        add_tokenizer_model(tokenizer, bpe, ids)
    if config.get("add_bos_token", tokenizer.add_bos) != tokenizer.add_bos:  # transformers passes over it, others not
        config = read_json(path, tokenizer.files, CONFIG)
        tokenizer.files[CONFIG] = write_json(config | {"add_bos_token": tokenizer.add_bos})
    return tokenizer


def make_encoder(path: Path, spec: dict[str, Any]) -> Encode:
    """Return the function that encodes texts by a tokenizer.json whose special tokens are hidden."""
    backends = [make_backend(path, spec)]
    if drop_space_of_first(spec.get("pre_tokenizer")):
        backends.append(make_backend(path, spec))

    def encode(texts: list[str], follow_special: bool) -> list[list[int]]:
        backend = backends[-1] if follow_special else backends[0]
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def make_backend(path: Path, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizers library's tokenizer of a tokenizer.json. Special tokens are text like any other to it."""
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except BaseException as error:  # the library raises no narrower one, and where it panics a wider one
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{path / 'tokenizer.json'}: the tokenizers library cannot read it: {error}") from error
    backend.encode_special_tokens = True
    return backend


def drop_space_of_first(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Change a pre-tokenizer that puts a space before the first text alone, not after special tokens, to put none.

    Return whether it was one.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    found = [step for step in steps if step.get("prepend_scheme") == "first"]
    for step in found:
        step["prepend_scheme"] = "never"
    return bool(found)


def find_template_bos(path: Path, spec: dict[str, Any]) -> int | None:
    """Return the id that a tokenizer.json puts before a text, None if it puts none. Raise DataError for several."""
    for step in (spec.get("post_processor") or {}).get("processors", [spec.get("post_processor") or {}]):
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            return step["cls"][1]
        if step.get("type") != "TemplateProcessing":
            continue
        before = list(itertools.takewhile(lambda part: "SpecialToken" in part, step["single"]))
        ids = [id for part in before for id in step["special_tokens"][part["SpecialToken"]["id"]]["ids"]]
        if len(ids) > 1:
            raise DataError(f"{path / 'tokenizer.json'}: puts {len(ids)} tokens before a text, wanted BOS or none")
        if ids:
            return ids[0]
    return None


def agree_on_bos(path: Path, tokenizer: Tokenizer, ids: dict[str, int], bos_id: int) -> None:
    """Make all files of a tokenizer name the BOS that its tokenizer.json puts before a text."""
    config, older = (read_json(path, tokenizer.files, name) for name in (CONFIG, TOKENS_MAP))
    token = next((token for token, id in ids.items() if id == bos_id), None)
    if token is None:
        raise DataError(f"{path / 'tokenizer.json'}: puts the id {bos_id} before a text, wanted one of a token it has")
    if read_named_tokens(path, tokenizer.files).get("bos_token") != token:
        tokenizer.files[CONFIG] = write_json(config | {"bos_token": token})
        if "bos_token" in older:
            tokenizer.files[TOKENS_MAP] = write_json(older | {"bos_token": token})


def convert_to_llama_tokenizer(spec: dict[str, Any], config: dict[str, Any]) -> None:
    """Change a tokenizer.json as transformers' class LlamaTokenizer does: only vocabulary and merges are kept."""
    prefix = config.get("add_prefix_space") is not False
    scheme = "never"
    if prefix:
        scheme = "always" if config.get("legacy") else "first"
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    spec["decoder"] = make_decoder(prefix)
    spec["model"] |= {"fuse_unk": True, "byte_fallback": True, "unk_token": None, "ignore_merges": False}


def hide_specials(spec: dict[str, Any], specials: dict[str, int]) -> None:
    """Change a tokenizer.json so that it adds no tokens and makes no special token of plain text. Ids stay the same."""
    spec["post_processor"] = spec["padding"] = spec["truncation"] = None
    model = spec["model"]
    vocab, unknown = model["vocab"], model.get("unk_token")
    tokens = set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}
    hidden = {token: f"\0{id}\0" for token, id in specials.items() if token in tokens and token != unknown}
    for token in spec.get("added_tokens") or []:
        token["special"] = token["content"] in specials
        token["content"] = hidden.get(token["content"], token["content"])
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(piece, piece): id for piece, id in vocab.items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if specials.keys().isdisjoint((*pair, "".join(pair)))]
