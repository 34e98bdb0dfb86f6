"""Small tokenizers of SentencePiece's kind: a trained tokenizer.model, and a tokenizer.json of a few words."""

import io
import json

import sentencepiece

from tests.helpers.chat_tokenizers import CHATML, FLAGS, LLAMA3, make_bos_template

CORPUS = [
    f"line {i}: the quick  brown fox jumps over {i * i} lazy dogs,\n    and user asks why [<|>/_{chr(33 + i % 94)}"
    for i in range(300)
]
WORDS = ("user", "assistant", "system", "the", "name", "INST", "SYS")
CHAT_TOKENS = [token for token in (*CHATML[2:], *LLAMA3)]


def train_sentencepiece(folder, user_words=(), **options):
    """Write a tokenizer.model of 500 pieces, by default as LLaMA's: BPE, no normalisation, every space kept."""
    content = io.BytesIO()
    settings = {
        "vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=content,
        user_defined_symbols=list(user_words),
        **settings | options,
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


def list_pieces():
    """Return (tokens, scores, types, merges) of a SentencePiece-like BPE: specials, bytes, letters, a few words."""
    tokens, types = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))], [2, 3, 3] + [6] * 256
    merges, words = [], []
    for word in WORDS:
        for whole in (word, "▁" + word):
            for at in range(2, len(whole) + 1):
                if whole[:at] not in words:
                    words.append(whole[:at])
                    merges.append((whole[: at - 1], whole[at - 1]))
    letters = ["▁", *map(chr, range(33, 127))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-1000.0 - i for i in range(len(letters))]
    return tokens + words + letters, scores, types + [1] * (len(words) + len(letters)), merges


def write_metaspace(folder, scheme, tokens=CHAT_TOKENS, special=True, **config):
    """Write a tokenizer.json. scheme: of Metaspace, which puts a space before texts, or "prepend", by a normalizer."""
    vocab, _, _, merges = list_pieces()
    added = [{"id": i, "content": vocab[i], **FLAGS, "special": True} for i in range(3)]
    added += [{"id": len(vocab) + i, "content": text, **FLAGS, "special": special} for i, text in enumerate(tokens)]
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]  # fmt: skip
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    spec = {
        "version": "1.0", "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": prepend} if scheme == "prepend" else None,
        "pre_tokenizer": None if scheme == "prepend" else {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False
        },
        "post_processor": make_bos_template("<s>", 1), "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": {t: i for i, t in enumerate(vocab)}, "merges": [list(merge) for merge in merges],
        },
    }  # fmt: skip
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
