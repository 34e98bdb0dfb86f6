"""A tokenizer.json for tokenizers that have none: the one inside a GGUF file, and SentencePiece's BPE.

It is in the form of Hugging Face's tokenizers library. The tokenizer_config.json made with it names a class that makes
transformers use the tokenizer.json unchanged.
"""

import json
from pathlib import Path
from typing import Any

from engine.base.errors import DataError
from engine.formats.gguf import open_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of SentencePiece and GGUF
# How text is split before BPE, by tokenizer.ggml.pre. Source: llama.cpp, src/llama-vocab.cpp
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, GPT2],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
        GPT2 | {"use_regex": False},
    ],
}
PRE_ALIASES = {"default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def read_files_from_gguf(path: Path) -> dict[str, bytes]:
    """Return the tokenizer of a GGUF file, its metadata tokenizer.ggml.*, as the files of a Hugging Face folder."""
    fields, _ = open_gguf(path)
    prefix = "tokenizer.ggml."
    get = {key.removeprefix(prefix): fields[key] for key in fields if key.startswith(prefix)}.get
    model, tokens, pre = get("model"), get("tokens"), get("pre", "default")
    if not tokens or model not in ("gpt2", "llama"):
        raise DataError(f"{path}: got a tokenizer of model {model!r}, wanted tokens of model 'gpt2' or 'llama'")
    pre = PRE_ALIASES.get(pre, pre)
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted({*PRE_TOKENIZERS, *PRE_ALIASES}))
        raise DataError(f"{path}: got the pre-tokenizer {pre!r}, wanted one of {known}; use the Hugging Face folder")
    types = get("token_type", [NORMAL] * len(tokens))
    n_scores = len(get("scores", [])) if model == "llama" else len(tokens)
    if not len(types) == n_scores == len(tokens):
        raise DataError(
            f"{path}: got {len(tokens)} tokens, {len(types)} types, {n_scores} scores, wanted as many of each"
        )
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot"}
    role_ids = {f"{ours}_token": get(f"{theirs}_token_id") for ours, theirs in roles.items()}
    names = {role: tokens[id] for role, id in role_ids.items() if id is not None and id < len(tokens)}
    specials = {
        token: id
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL) or token in names.values()
    }
    if model == "llama":
        spec = make_sentencepiece_spec(tokens, get("scores", []), types, get("add_space_prefix", True))
    else:
        spec = {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
            "decoder": GPT2,
            "model": {
                "type": "BPE", "ignore_merges": pre == "llama-bpe",  # a word of the vocabulary is taken whole
                "vocab": {token: id for id, token in enumerate(tokens)}, "merges": get("merges", []),
            },
        }  # fmt: skip
    plain = {tokens[id]: id for id, kind in enumerate(types) if kind == USER_DEFINED and tokens[id] not in specials}
    add_bos = get("add_bos_token", model == "llama" or pre == "llama-bpe")
    template = fields.get("tokenizer.chat_template")
    config = {} if template is None else {"chat_template": template}
    return make_hugging_face_files(spec, specials, names, add_bos=add_bos, plain=plain, config=config)


def make_decoder(has_prefix: bool) -> dict[str, Any]:
    """Return the decoder of SentencePiece's pieces. has_prefix: the space that was put before the text is removed."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def make_sentencepiece_spec(
    tokens: list[str], scores: list[float], types: list[int], has_prefix: bool
) -> dict[str, Any]:
    """Return a tokenizer.json for SentencePiece's BPE.

    BPE merges the two neighbours whose joined piece has the best score, and the leftmost of equal ones. has_prefix: a
    space is put before the text.
    """
    ids = {token: id for id, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    merges = []
    for piece in sorted(ids, key=lambda piece: (-scores[ids[piece]], ids[piece])):
        pairs = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        merges += [f"{left} {right}" for left, right in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    prepend = [{"type": "Prepend", "prepend": "▁"}] if has_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "decoder": make_decoder(has_prefix),
        "model": {
            "type": "BPE", "fuse_unk": True, "byte_fallback": True,
            "unk_token": next((tokens[id] for id, kind in enumerate(types) if kind == UNKNOWN), None),
            "vocab": {token: id for id, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip


def make_hugging_face_files(
    spec: dict[str, Any],
    specials: dict[str, int],
    names: dict[str, str],
    *,
    add_bos: bool,
    plain: dict[str, int] | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return {file name: content} of a tokenizer.json and its tokenizer_config.json.

    names: bos_token, eos_token, ... -> text. plain: added tokens that are not special.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added: list[dict[str, Any]] = [
        {"id": id, "content": token, **flags, "special": True} for token, id in specials.items()
    ]
    added += [{"id": id, "content": token, **flags, "special": False} for token, id in (plain or {}).items()]
    spec = {"version": "1.0", "added_tokens": sorted(added, key=lambda token: token["id"])} | spec
    token = names.get("bos_token")
    if token is None:
        add_bos = False
    elif add_bos:
        bos = {"SpecialToken": {"id": token, "type_id": 0}}
        first, second = ({"Sequence": {"id": id, "type_id": 0}} for id in "AB")
        special = {token: {"id": token, "ids": [specials[token]], "tokens": [token]}}
        template = {"single": [bos, first], "pair": [bos, first, second], "special_tokens": special}
        spec["post_processor"] = {"type": "TemplateProcessing"} | template
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(add_bos),
        **names, **(config or {}), "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    contents = {"tokenizer.json": spec, "tokenizer_config.json": config}
    return {name: json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n" for name, value in contents.items()}
