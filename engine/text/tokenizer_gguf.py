"""The tokenizer inside a GGUF file, as the files of a Hugging Face folder.

Text is split and merged as llama.cpp does, of which a GGUF is the format. Source: llama.cpp, src/llama-vocab.cpp.
"""

import json
from pathlib import Path
from typing import Any

from engine.base.errors import DataError
from engine.formats.gguf import open_gguf
from engine.text.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    write_model,
)
from engine.text.tokenizer_json import is_chat_token, make_hugging_face_files

# How text is split before BPE, by tokenizer.ggml.pre: one pattern after the other cuts what is left.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASED_LETTERS = (  # of deepseek-llm: its maker's list
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DIGIT = r"\p{N}"
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2_SPLIT,),
    "smollm": (DIGIT, GPT2_SPLIT),
    "llama-bpe": (LLAMA3_SPLIT,),
    "smaug-bpe": (LLAMA3_SPLIT,),
    "deepseek-llm": (
        r"[\r\n]", rf"\s?[{CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}+",
    ),
    "deepseek-coder": (
        r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", DIGIT,
    ),
    "default": (r"[\p{P}$+<=>^~|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"),
}  # fmt: skip
ALIASES = {name: "llama-bpe" for name in ("llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0")}
WHOLE_WORDS = {"llama-bpe"}  # a word of the vocabulary is taken whole, whatever merges would make; BOS begins a text
DEFAULT_SPLIT = (
    "tokenizer.ggml.pre is {pre}: nothing says how the model's text was split. Text is split as llama.cpp splits it, "
    "which may not be how the model was trained; a newer GGUF or the Hugging Face folder says it"
)

TO_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

Values = dict[str, Any]  # metadata of a GGUF below tokenizer.ggml


def read_files_from_gguf(path: Path) -> tuple[dict[str, bytes], list[str]]:
    """Return (the tokenizer of a GGUF file as the files of a Hugging Face folder, warnings).

    Raise DataError for a tokenizer that we do not know, or whose parts do not fit each other.
    """
    fields, _ = open_gguf(path)
    prefix = "tokenizer.ggml."
    values = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    model, tokens = values.get("model"), values.get("tokens")
    if not tokens or model not in ("gpt2", "llama"):
        raise DataError(f"{path}: got a tokenizer of model {model!r}, wanted tokens of model 'gpt2' or 'llama'")
    types = values.setdefault("token_type", [NORMAL] * len(tokens))
    n_scores = len(values.get("scores", [])) if model == "llama" else len(tokens)
    if not len(types) == n_scores == len(tokens):
        raise DataError(
            f"{path}: got {len(tokens)} tokens, {len(types)} types, {n_scores} scores, wanted as many of each"
        )
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot"}
    ids = {ours: values.get(f"{theirs}_token_id") for ours, theirs in roles.items()}
    role_ids = {role: id for role, id in ids.items() if id is not None and id < len(tokens)}
    mark_specials(tokens, types, role_ids)
    config = {} if (template := fields.get("tokenizer.chat_template")) is None else {"chat_template": template}
    if model == "llama":
        return make_sentencepiece_files(values, role_ids, config), []
    return make_byte_level_files(path, values, role_ids, config)


def mark_specials(tokens: list[str], types: list[int], role_ids: dict[str, int]) -> None:
    """Change the types of a GGUF's tokens, so that tokens with a role and those that mark turns are CONTROL."""
    named = set(role_ids.values())
    for id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (NORMAL, USER_DEFINED) and (id in named or is_chat_token(token)):
            types[id] = CONTROL


def make_sentencepiece_files(values: Values, role_ids: dict[str, int], config: Values) -> dict[str, bytes]:
    """Return the tokenizer.model of a GGUF's pieces, scores and types, and the tokenizer_config.json beside it."""
    tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(values["tokens"])]  # SentencePiece knows no empty one
    # SentencePiece wants exactly one unknown piece; with all bytes among the pieces, no text becomes it.
    types = [CONTROL if kind == UNKNOWN else kind for kind in values["token_type"]]
    unknown = next((id for id, kind in enumerate(values["token_type"]) if kind == UNKNOWN), 0)
    unknown = role_ids.get("unk", unknown)
    types[unknown] = UNKNOWN
    model = SentencePieceModel(
        tokens, [float(score) for score in values["scores"]], types, byte_fallback=BYTE in types,
        has_prefix=bool(values.get("add_space_prefix", True)),
    )  # fmt: skip
    content = write_model(model, role_ids | {"unk": unknown})
    names = {f"{role}_token": tokens[id] for role, id in role_ids.items()}
    config = {**config, **names, "add_bos_token": bool(values.get("add_bos_token", True))}
    return {"tokenizer.model": content, "tokenizer_config.json": json.dumps(config).encode()}


def make_pre_tokenizer(pre: str) -> Values:
    """Return the pre_tokenizer of a tokenizer.json that splits as SPLITS says."""
    split = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in SPLITS[pre]
    ]
    return {"type": "Sequence", "pretokenizers": [*split, TO_BYTES]}


def make_byte_level_files(
    path: Path, values: Values, role_ids: dict[str, int], config: Values
) -> tuple[dict[str, bytes], list[str]]:
    """Return (tokenizer.json and tokenizer_config.json of a GGUF's byte-level BPE, warnings)."""
    tokens, types, stated = values["tokens"], values["token_type"], values.get("pre", "")
    pre = ALIASES.get(stated, stated) or "default"
    if pre not in SPLITS:
        known = ", ".join(sorted({*SPLITS, *ALIASES}))
        raise DataError(f"{path}: got the pre-tokenizer {pre!r}, wanted one of {known}; use the Hugging Face folder")
    spec = {
        "pre_tokenizer": make_pre_tokenizer(pre),
        "decoder": TO_BYTES,
        "model": {
            "type": "BPE", "ignore_merges": pre in WHOLE_WORDS,
            "vocab": {token: id for id, token in enumerate(tokens)}, "merges": values.get("merges", []),
        },
    }  # fmt: skip
    specials = {token: id for id, token in enumerate(tokens) if types[id] in (UNKNOWN, CONTROL)}
    plain = {token: id for id, token in enumerate(tokens) if types[id] == USER_DEFINED}
    names = {f"{role}_token": tokens[id] for role, id in role_ids.items()}
    add_bos = bool(values.get("add_bos_token", pre in WHOLE_WORDS))
    files = make_hugging_face_files(spec, specials, names, add_bos=add_bos, plain=plain, config=config)
    warnings = (
        [f"{path}: {DEFAULT_SPLIT.format(pre=repr(stated) if stated else 'missing')}"] if pre == "default" else []
    )
    return files, warnings
