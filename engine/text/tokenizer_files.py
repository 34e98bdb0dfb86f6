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

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from engine.base.errors import DataError, UsageError
from engine.formats.find import find_embedded_gguf, find_model
from engine.formats.folders import explain_stand_in
from engine.model.config import EMBEDDED_MODEL, MODELS, ModelConfig
from engine.text.tokenizer import SAVED, Tokenizer, Vocabulary
from engine.text.tokenizer_json import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    make_decoder,
    make_hugging_face_files,
    make_sentencepiece_spec,
    read_files_from_gguf,
)

READ = (*SAVED, "generation_config.json", "config.json")
DECODERS = {"ByteLevel", "Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}  # of a LLaMA

# GPT-2's alphabet, in which bytes are visible characters: printable Latin-1 stands for itself, the other bytes are
# numbered from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {
    chr(0x100 + n): b for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}

Files = dict[str, bytes]  # name -> content of a checkpoint's tokenizer and config files


def find_tokenizer(config: ModelConfig, name: str, model_path: Path | None) -> Tokenizer:
    """Load the tokenizer that --tokenizer names; for "", the model's own.

    A model of random weights (model_path is None) gets the embedded tokenizer, where it has as many tokens. Raise
    UsageError when it does not, and DataError when the tokenizer's ids do not fit the model.
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
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model embeds {config.vocab_size}; "
            "they do not belong together"
        )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint's folder or .gguf file. Raise DataError when it is missing or corrupt."""
    path = Path(path)
    try:
        if path.is_file():
            files = read_files_from_gguf(path)
        else:
            files = {name: (path / name).read_bytes() for name in READ if (path / name).is_file()}
        for name, content in files.items():
            if what := explain_stand_in(content[:64]):
                raise DataError(f"{path / name}: {what}")
        if "tokenizer.json" in files:
            return load_tokenizer_json(path, files)
        if "tokenizer.model" in files:
            return load_sentencepiece(path, files)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: got a tokenizer that cannot be read, {error!r}; copy its files again") from error
    raise DataError(f"{path}: got neither tokenizer.model nor tokenizer.json, wanted one; copy it from the checkpoint")


# ---- SentencePiece --------------------------------------------------------------------------------------------------


def load_sentencepiece(path: Path, files: Files) -> Tokenizer:
    """Return the tokenizer of a tokenizer.model. It also saves files in Hugging Face's form, made here."""
    model, tokens = open_sentencepiece(path, files["tokenizer.model"])
    tests = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, UNUSED: model.is_unused, BYTE: model.is_byte}
    types = [next((kind for kind, test in tests.items() if test(id)), NORMAL) for id in range(len(tokens))]
    config = read_json(path, files, "tokenizer_config.json")
    added = read_json(path, files, "added_tokens.json") | {
        get_token_text(token): int(id) for id, token in config.get("added_tokens_decoder", {}).items()
    }
    specials = {tokens[id]: id for id, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)} | added
    role_ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    names = {role: tokens[id] for role, id in role_ids.items() if id >= 0}
    has_prefix = model.encode("a", out_type=str)[0].startswith("▁")
    if "tokenizer_config.json" not in files:
        scores = [model.get_score(id) for id in range(len(tokens))]
        spec = make_sentencepiece_spec(tokens, scores, types, has_prefix)
        # A model that normalises text, or is a Unigram model, cannot be converted: this text shows it.
        probe = "The quick  brown\nﬁx: 1234 ①𝔘 e\u0301"
        converted = tokenizers.Tokenizer.from_str(json.dumps(spec)).encode(probe, add_special_tokens=False)
        if converted.ids == model.encode(probe):
            files = make_hugging_face_files(spec, specials, names, add_bos=True) | files

    def encode(texts: list[str]) -> list[list[int]]:
        return model.encode(texts, num_threads=min(len(texts), os.cpu_count() or 1))

    ids = {piece: id for id, piece in enumerate(tokens)} | added
    pieces = {id: piece_to_bytes(piece) for piece, id in ids.items()}
    vocabulary = Vocabulary(ids, pieces, specials, byte_level=False, has_space_prefix=has_prefix)
    add_bos = config.get("add_bos_token") is not False
    return make_tokenizer(path, files, encode, vocabulary, names, add_bos)


def open_sentencepiece(path: Path, content: bytes) -> tuple[sentencepiece.SentencePieceProcessor, list[str]]:
    """Return (model, its tokens) from the bytes of a tokenizer.model. Raise DataError when they are no such model."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
        tokens = [model.id_to_piece(id) for id in range(model.get_piece_size())]
    except RuntimeError:
        tokens = []
    if not tokens:
        raise DataError(
            f"{path / 'tokenizer.model'}: got no SentencePiece model, wanted one (Meta's Llama 3 has a tiktoken file "
            "there); put a tokenizer.json beside it"
        )
    return model, tokens


# ---- tokenizer.json -------------------------------------------------------------------------------------------------


def load_tokenizer_json(path: Path, files: Files) -> Tokenizer:
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
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= read_named_tokens(path, files)
    decoder = json.dumps(spec.get("decoder"))
    if unknown := set(re.findall(r'"type": "(\w+)"', decoder)) - DECODERS:
        raise DataError(
            f"{path / 'tokenizer.json'}: got a decoder {', '.join(sorted(unknown))}, wanted a LLaMA's: byte-level or ▁"
        )
    has_prefix = '"Strip"' in decoder or ('"Metaspace"' in decoder and '"never"' not in decoder)
    ids = vocab | {token["content"]: token["id"] for token in added}
    special = {token["content"] for token in added if token.get("special")} | set(names.values())
    specials = {token: id for token, id in sorted(ids.items(), key=lambda item: item[1]) if token in special}
    bos_token = find_template_bos(spec.get("post_processor"))
    if bos_token is not None:
        names.setdefault("bos_token", bos_token)
    plain = {token["content"] for token in added} - special
    raw = plain if byte_level else ()
    pieces = {id: token.encode() if token in raw else piece_to_bytes(token, byte_level) for token, id in ids.items()}

    hide_specials(spec, specials)
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises no narrower one
        raise DataError(f"{path / 'tokenizer.json'}: the tokenizers library cannot read it: {error}") from error
    backend.encode_special_tokens = True  # encode their spelling as any other text

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    vocabulary = Vocabulary(ids, pieces, specials, byte_level, has_prefix)
    add_bos = bos_token is not None and bos_token == names.get("bos_token")
    return make_tokenizer(path, files, encode, vocabulary, names, add_bos)


def find_template_bos(post_processor: dict[str, Any] | None) -> str | None:
    """Return the special token that a tokenizer.json puts before a text, None if it puts none."""
    for step in (post_processor or {}).get("processors", [post_processor or {}]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


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


# ---- parts of both --------------------------------------------------------------------------------------------------


def read_json(path: Path, files: Files, name: str) -> dict[str, Any]:
    """Return the object in one of the files, {} if it is not among them. Raise DataError when it is no JSON object."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path / name}: got broken JSON ({error}), wanted an object; copy the file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path / name}: got a {type(value).__name__}, wanted a JSON object; copy the file again")
    return value


def get_token_text(token: Any) -> Any:
    """Return the text of a token that a config holds either as text or as an object with content."""
    return token["content"] if isinstance(token, dict) else token


def read_named_tokens(path: Path, files: Files) -> dict[str, str | None]:
    """Return bos_token, eos_token, ... -> text, which is None where a file says that the token does not exist."""
    config, older = (read_json(path, files, name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    merged = (
        older | config if "added_tokens_decoder" in config else config | older
    )  # the later one wins, as in transformers
    texts = {role: get_token_text(token) for role, token in merged.items() if role.endswith("_token")}
    return {role: text for role, text in texts.items() if text is None or (isinstance(text, str) and text)}


def make_tokenizer(
    path: Path,
    files: Files,
    encode: Callable[[list[str]], list[list[int]]],
    vocabulary: Vocabulary,
    names: Mapping[str, str | None],
    add_bos: bool,
) -> Tokenizer:
    """Return the Tokenizer, after finding which tokens begin and end a text.

    names: {bos_token, eos_token, ...: text} by the tokenizer's main file; the config files beside it take precedence.
    """
    stated = read_named_tokens(path, files)
    from_config: dict[str, list[int]] = {"bos_token_id": [], "eos_token_id": []}
    for name in ("generation_config.json", "config.json"):
        config = read_json(path, files, name)
        for role, found in from_config.items():
            value = config.get(role)
            found += [id for id in (value if isinstance(value, list) else [value]) if id in vocabulary.pieces]
    ids = vocabulary.ids
    by_name = {role: ids[token] for role, token in (*names.items(), *stated.items()) if token in ids}
    bos_ids = [by_name["bos_token"]] if "bos_token" in by_name else from_config["bos_token_id"]
    bos_id = None if stated.get("bos_token", "") is None else next(iter(bos_ids), None)
    stop_ids = [by_name[role] for role in ("eos_token", "eot_token") if role in by_name] + from_config["eos_token_id"]
    if not stop_ids:
        raise DataError(f"{path}: got no end-of-text token, wanted eos_token in tokenizer_config.json; name it there")
    eos_id = by_name["eos_token"] if "eos_token" in by_name else (from_config["eos_token_id"] or stop_ids)[0]
    saved = {name: files[name] for name in SAVED if name in files}
    return Tokenizer(encode, vocabulary, saved, bos_id=bos_id, add_bos=add_bos, eos_id=eos_id, stop_ids=stop_ids)


def piece_to_bytes(piece: str, byte_level: bool = False) -> bytes:
    """Return the bytes of text that a piece stands for, spelt in GPT-2's alphabet (byte_level) or SentencePiece's."""
    if byte_level:
        return bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else piece.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
