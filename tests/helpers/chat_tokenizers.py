"""Small tokenizers with the special tokens of chat templates, as the files of a Hugging Face folder."""

import io
import json

import sentencepiece
from tokenizers import pre_tokenizers

LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
SPECIALS = {"alpaca": CHATML[:2], "chatml": CHATML, "llama2": CHATML[:2], "llama3": LLAMA3}
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]  # one merge, since llama.cpp wants some
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def write_byte_level(folder, specials, adds_bos=True, **config):
    """Write a tokenizer of TOKENS and special tokens, of which the first two are BOS and EOS."""
    vocab = {token: id for id, token in enumerate(TOKENS)}
    added = [{"id": len(TOKENS) + i, "content": text, **FLAGS, "special": True} for i, text in enumerate(specials)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": level, "decoder": level,
        "post_processor": make_bos_template(specials[0], len(TOKENS)) if adds_bos else None,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
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


def write_sentencepiece(folder, specials, template=None):
    """Write a tokenizer.model, as Meta has it, with the special tokens after BOS and EOS as control pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Name a colour of the sky. Blue, as the sea."] * 20), model_writer=model,
        model_type="bpe", vocab_size=320, character_coverage=1, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, control_symbols=list(specials[2:]), minloglevel=2, hard_vocab_limit=False,
        bos_piece=specials[0], eos_piece=specials[1],
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def add_byte_level_to_gguf(writer, specials, template=None, pre="gpt-2"):
    """Give a GGUF the tokenizer of write_byte_level."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*TOKENS, *specials])
    writer.add_token_types([1] * len(TOKENS) + [3] * len(specials))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(TOKENS))
    writer.add_eos_token_id(len(TOKENS) + 1)
    writer.add_add_bos_token(True)
    if template:
        writer.add_chat_template(template)
