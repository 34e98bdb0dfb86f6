"""Text <-> ids: SentencePiece (tokenizer.model), Hugging Face (tokenizer.json) and the tokenizer inside a GGUF file.

Text is only ever text: none spells a special token (`</s>`, `<|im_end|>`), BOS and EOS are the caller's to add.
Ids are those of transformers with add_special_tokens=False, split_special_tokens=True. A folder with both files is read
by tokenizer.json, as there, and with the pre-tokenizer that its class LlamaTokenizer puts in. The exceptions:

- A folder with tokenizer.model alone gives SentencePiece's ids, the reference of Meta and of Stanford. The class
  LlamaTokenizer of transformers 5 adds no prefix space before a leading space (" a" is ▁a there, ▁ ▁a here), and ranks
  merges by id, not by score ("a  b" is ▁a ▁▁ b there, ▁a ▁ ▁b here). It adds BOS only where tokenizer_config.json says
  so; SentencePiece's LLaMA always does.
- Merges that make a special token out of plain text are dropped.
- Classes with another pre-tokenizer of their own, like GPT2Tokenizer, are not imitated: tokenizer.json says what the
  model learned. So from the GGUF of SmolLM2 transformers 5 has digits swallow a space ("\\n 1" is Ċ Ġ 1, here ĊĠ 1).
"""

import codecs
import json
import os
import re
from pathlib import Path

import sentencepiece
import tokenizers

from engine.base.errors import DataError, UsageError
from engine.formats.find import find_embedded_gguf, find_model
from engine.model.config import EMBEDDED_MODEL, MODELS, ModelConfig
from engine.text.tokenizer_json import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    hugging_face_files,
    read_gguf,
    sentencepiece_decoder,
    sentencepiece_spec,
)  # fmt: skip

SAVED = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
READ = (*SAVED, "generation_config.json", "config.json")
BLOCK = 4096  # texts at a time: an Encoding of the tokenizers library is far larger than its ids

# Bytes as visible characters, GPT-2's alphabet: printable Latin-1 stands for itself, the others follow from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {
    chr(0x100 + n): b for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}
# One U+FFFD for each byte that is no UTF-8, as SentencePiece has it; Python's own gives one for a cut-off sequence.
codecs.register_error("each byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


class Tokenizer:
    """Text <-> ids, and the special tokens as the checkpoint's own files name them. Made by load_tokenizer.

    vocab_size   the largest id + 1
    bos_id       begins a text, None if there is none; add_bos: whether the files say that every text begins with it
    eos_id       ends a training example; stop_ids: it and whatever else ends generation
    special_ids  text of a special token -> id; no text encodes to them
    """

    def __init__(self, encode, pieces, files, *, specials, bos_id, add_bos, eos_id, stop_ids, byte_level, strip):
        self._encode = encode  # list of texts -> lists of ids
        self._files = files  # name -> bytes: what save writes
        hidden = set(specials.values())
        self._pieces = {id: piece for id, piece in pieces.items() if id not in hidden}
        self._strip = strip  # the first space is SentencePiece's, not the text's
        self._errors = "replace" if byte_level else "each byte"
        self.vocab_size = max([*pieces, *specials.values()]) + 1
        self.special_ids = specials
        self.bos_id, self.eos_id = bos_id, eos_id
        self.add_bos = add_bos and bos_id is not None
        self.stop_ids = frozenset({eos_id, *stop_ids})

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS. Raises DataError for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """[encode(text) for text in texts], on all cores."""
        for number, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"tokenizer: text {number} has the lone surrogate {text[error.start]!r} at {error.start}, wanted "
                    "Unicode text; remove or replace it"
                ) from None
        return [ids for at in range(0, len(texts), BLOCK) for ids in self._encode(list(texts[at : at + BLOCK]))]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(self._pieces.get(id, b"") for id in ids).decode("utf-8", self._errors)
        return text.removeprefix(" ") if self._strip else text

    def stream(self) -> "Decoder":
        """A Decoder for ids that come one by one."""
        return Decoder(self._pieces, self._strip, self._errors)

    def save(self, folder: Path) -> None:
        """Writes the files that transformers and load_tokenizer need for the same ids.

        They are the checkpoint's own, byte for byte. Where it has only a tokenizer.model, or is a GGUF file, those of
        Hugging Face are added. Tokenizer files of another model that lay there are removed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in SAVED:
            if name not in self._files:
                (folder / name).unlink(missing_ok=True)
        for name, content in self._files.items():
            tmp = folder / f".tmp-{name}"
            tmp.write_bytes(content)
            os.replace(tmp, folder / name)


class Decoder:
    """decode in instalments: the pushes and the flush together are decode of all ids."""

    def __init__(self, pieces, strip, errors):
        self._pieces, self._strip = pieces, strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, id: int) -> str:
        """The text that this id completes, "" in the middle of a character."""
        return self._stripped(self._utf8.decode(self._pieces.get(id, b"")))

    def flush(self) -> str:
        """What an unfinished character leaves."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text):
        if text and self._strip:
            self._strip, text = False, text.removeprefix(" ")
        return text


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder or .gguf file. Raises DataError when there is none, or a corrupt one."""
    path = Path(path)
    try:
        if path.is_file():
            files = read_gguf(path)
        else:
            files = {name: (path / name).read_bytes() for name in READ if (path / name).is_file()}
        if "tokenizer.json" in files:
            return from_tokenizer_json(path, files)
        if "tokenizer.model" in files:
            return from_sentencepiece(path, files)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: got a tokenizer that cannot be read, {error!r}; copy its files again") from error
    raise DataError(f"{path}: got neither tokenizer.model nor tokenizer.json, wanted one; copy it from the checkpoint")


def find_tokenizer(config: ModelConfig, name: str, model_path: Path | None) -> Tokenizer:
    """The tokenizer named, else the model's own; for a random model the embedded one where the vocabulary fits.

    Raises DataError when its ids do not fit the model's vocabulary.
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


# ---- the three kinds ------------------------------------------------------------------------------------------------


def from_sentencepiece(path, files):
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(files["tokenizer.model"])
        tokens = [model.id_to_piece(id) for id in range(model.get_piece_size())]
    except RuntimeError:
        tokens = []
    if not tokens:
        raise DataError(
            f"{path / 'tokenizer.model'}: got no SentencePiece model, wanted one (Meta's Llama 3 has a tiktoken file "
            "there); put a tokenizer.json beside it"
        )
    tests = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, UNUSED: model.is_unused, BYTE: model.is_byte}
    types = [next((kind for kind, test in tests.items() if test(id)), NORMAL) for id in range(len(tokens))]
    config = read_json(path, files, "tokenizer_config.json")
    added = read_json(path, files, "added_tokens.json") | {
        content(token): int(id) for id, token in config.get("added_tokens_decoder", {}).items()
    }
    specials = {tokens[id]: id for id, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)} | added
    names = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    names = {role: tokens[id] for role, id in names.items() if id >= 0}
    prefix = model.encode("a", out_type=str)[0].startswith("▁")
    if "tokenizer_config.json" not in files:
        scores = [model.get_score(id) for id in range(len(tokens))]
        spec = sentencepiece_spec(tokens, scores, types, prefix)
        probe = "The quick  brown\nﬁx: 1234 ①𝔘 e\u0301"  # not for Unigram, nor for models that normalise
        converted = tokenizers.Tokenizer.from_str(json.dumps(spec)).encode(probe, add_special_tokens=False)
        if converted.ids == model.encode(probe):
            files = hugging_face_files(spec, specials, names, add_bos=True) | files

    def encode(texts):
        return model.encode(texts, num_threads=min(len(texts), os.cpu_count()))

    ids = {piece: id for id, piece in enumerate(tokens)} | added
    pieces = {id: piece_bytes(piece) for piece, id in ids.items()}
    add_bos = config.get("add_bos_token") is not False
    return finish(path, files, encode, pieces, ids, specials, names, add_bos=add_bos, byte_level=False, strip=prefix)


def from_tokenizer_json(path, files):
    spec = read_json(path, files, "tokenizer.json")
    config, model_config = (read_json(path, files, name) for name in ("tokenizer_config.json", "config.json"))
    vocab, added = spec["model"]["vocab"], spec.get("added_tokens") or []
    if isinstance(vocab, list):  # Unigram: [piece, score]
        vocab = {piece: id for id, (piece, _) in enumerate(vocab)}
    byte_level = '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    hf_class = config.get("tokenizer_class") or model_config.get("tokenizer_class") or ""
    names = {}
    if hf_class.removesuffix("Fast") == "LlamaTokenizer" and not byte_level:
        as_llama_tokenizer(spec, config)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= named_tokens(path, files)
    decoder = json.dumps(spec.get("decoder"))
    if unknown := set(re.findall(r'"type": "(\w+)"', decoder)) - {
        "ByteLevel", "Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"
    }:  # fmt: skip
        raise DataError(
            f"{path / 'tokenizer.json'}: got a decoder {', '.join(sorted(unknown))}, wanted a LLaMA's: byte-level or ▁"
        )
    strip = '"Strip"' in decoder or ('"Metaspace"' in decoder and '"never"' not in decoder)
    ids = vocab | {token["content"]: token["id"] for token in added}
    special = {token["content"] for token in added if token.get("special")} | set(names.values())
    specials = {token: id for token, id in sorted(ids.items(), key=lambda item: item[1]) if token in special}
    bos_token = template_bos(spec.get("post_processor"))
    if bos_token is not None:
        names.setdefault("bos_token", bos_token)
    plain = {token["content"] for token in added} - special
    raw = plain if byte_level else ()
    pieces = {id: token.encode() if token in raw else piece_bytes(token, byte_level) for token, id in ids.items()}

    hide_specials(spec, specials)
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises no narrower one
        raise DataError(f"{path / 'tokenizer.json'}: the tokenizers library cannot read it: {error}") from error
    backend.encode_special_tokens = True  # as text, that is

    def encode(texts):
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    add_bos = bos_token is not None and bos_token == names.get("bos_token")
    return finish(
        path, files, encode, pieces, ids, specials, names, add_bos=add_bos, byte_level=byte_level, strip=strip
    )


# ---- their parts ----------------------------------------------------------------------------------------------------


def read_json(path, files, name):
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path / name}: got broken JSON ({error}), wanted an object; copy the file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path / name}: got a {type(value).__name__}, wanted a JSON object; copy the file again")
    return value


def content(token):
    return token["content"] if isinstance(token, dict) else token


def named_tokens(path, files):
    """bos_token, eos_token, ... -> text, None where a file says that there is none."""
    config, older = (read_json(path, files, name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    merged = older | config if "added_tokens_decoder" in config else config | older  # transformers' order
    texts = {role: content(token) for role, token in merged.items() if role.endswith("_token")}
    return {role: text for role, text in texts.items() if text is None or (isinstance(text, str) and text)}


def finish(path, files, encode, pieces, ids, specials, names, **rest):
    """The Tokenizer, once it is known which tokens begin and end a text."""
    stated = named_tokens(path, files)
    listed = {"bos_token_id": [], "eos_token_id": []}
    for name in ("generation_config.json", "config.json"):
        config = read_json(path, files, name)
        for role, found in listed.items():
            value = config.get(role)
            found += [id for id in (value if isinstance(value, list) else [value]) if id in pieces]
    named = {role: ids[token] for role, token in (*names.items(), *stated.items()) if token in ids}
    bos_ids = [named["bos_token"]] if "bos_token" in named else listed["bos_token_id"]
    bos_id = None if stated.get("bos_token", "") is None else next(iter(bos_ids), None)
    stop_ids = [named[role] for role in ("eos_token", "eot_token") if role in named] + listed["eos_token_id"]
    if not stop_ids:
        raise DataError(f"{path}: got no end-of-text token, wanted eos_token in tokenizer_config.json; name it there")
    eos_id = named["eos_token"] if "eos_token" in named else (listed["eos_token_id"] or stop_ids)[0]
    files = {name: files[name] for name in SAVED if name in files}
    return Tokenizer(encode, pieces, files, specials=specials, bos_id=bos_id, eos_id=eos_id, stop_ids=stop_ids, **rest)


def piece_bytes(piece, byte_level=False):
    if byte_level:
        return bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else piece.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def template_bos(post_processor):
    """The special token that a tokenizer.json puts before a text, None if none."""
    for step in (post_processor or {}).get("processors", [post_processor or {}]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


def as_llama_tokenizer(spec, config):
    """What transformers' class LlamaTokenizer makes of any tokenizer.json: vocabulary and merges are kept."""
    prefix = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    spec["decoder"] = sentencepiece_decoder(prefix)
    spec["model"] |= {"fuse_unk": True, "byte_fallback": True, "unk_token": None, "ignore_merges": False}


def hide_specials(spec, specials):
    """Takes from a tokenizer.json what could add tokens or make a special one of plain text; ids stay as they are."""
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
