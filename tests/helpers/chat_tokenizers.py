"""Small tokenizers with the special tokens of chat templates, as the files of a Hugging Face folder."""

import json

from tokenizers import pre_tokenizers

LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
SPECIALS = {"alpaca": CHATML[:2], "chatml": CHATML, "llama2": CHATML[:2], "llama3": LLAMA3}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def write_byte_level(folder, specials, adds_bos=True, **config):
    """Write a tokenizer of the 256 bytes and special tokens, of which the first two are BOS and EOS."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    added = [{"id": 256 + i, "content": text, **FLAGS, "special": True} for i, text in enumerate(specials)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": level, "decoder": level,
        "post_processor": make_bos_template(specials[0], 256) if adds_bos else None,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    names = {"bos_token": specials[0], "eos_token": specials[1]}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names | config)
    )
    return folder


def make_bos_template(token, id):
    one, a, b = {"SpecialToken": {"id": token, "type_id": 0}}, *({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    special = {token: {"id": token, "ids": [id], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [one, a], "pair": [one, a, b], "special_tokens": special}
