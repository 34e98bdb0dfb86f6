"""What the readers of tokenizers share: the files, the tokens that they name, the bytes of a piece."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from engine.base.errors import DataError
from engine.text.tokenizer import SAVED, Encode, Tokenizer, Vocabulary
from engine.text.tokenizer_json import write_json

CONFIG, TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"

# GPT-2's alphabet, in which bytes are visible characters: printable Latin-1 stands for itself, the other bytes are
# numbered from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {
    chr(0x100 + n): b for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}

Files = dict[str, bytes]  # name -> content of a checkpoint's tokenizer and config files


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


def drop_flags(files: Files, tokens: Collection[str], flags: Collection[str]) -> Files:
    """Return the files of a tokenizer in which these added tokens have none of the flags, such as "normalized"."""

    def drop(value: Any) -> bool:
        """Change a JSON value, and return whether that changed anything."""
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        changed = [drop(item) for item in inner]
        found = [
            flag for flag in flags if isinstance(value, dict) and value.get(flag) and value.get("content") in tokens
        ]
        for flag in found:
            value[flag] = False
        return any(changed) or bool(found)

    spec, config, older = (read_json(Path(), files, name) for name in ("tokenizer.json", CONFIG, TOKENS_MAP))
    parts = {"tokenizer.json": (spec, spec.get("added_tokens")), CONFIG: (config, config), TOKENS_MAP: (older, older)}
    return files | {name: write_json(whole) for name, (whole, part) in parts.items() if drop(part)}


def make_tokenizer(
    path: Path,
    files: Files,
    encode: Encode,
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
            found += [id for id in read_ids(path / name, role, value) if id in vocabulary.pieces]
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


def read_ids(path: Path, key: str, value: Any) -> list[int]:
    """Return the token ids that a config has under a key: one, several or none. Raise DataError for anything else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int for id in ids):  # False is 0 to Python
        raise DataError(f"{path}: {key} is {shorten(value)}, wanted a whole number or a list of them; repair it")
    return ids


def shorten(value: Any) -> str:
    """Return a value of a file as a message shows it."""
    return json.dumps(value)[:80]


def piece_to_bytes(piece: str, byte_level: bool = False) -> bytes:
    """Return the bytes of text that a piece stands for, spelt in GPT-2's alphabet (byte_level) or SentencePiece's."""
    if byte_level:
        return bytes(BYTE_OF[c] for c in piece) if all(c in BYTE_OF for c in piece) else piece.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
