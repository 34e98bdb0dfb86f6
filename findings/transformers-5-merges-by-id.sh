#!/usr/bin/env bash
# transformers 5 reads a lone tokenizer.model of LLaMA's kind and gives other ids than SentencePiece for double spaces.
#
# In Meta's file the pieces of two and more spaces have low ids (259, 268, ...) and the score -1e9, so SentencePiece, which
# merges by score, joins spaces last: "a  b" is a | space | space-b. LlamaTokenizer of transformers 5 makes its merges
# without the scores, in the order of the ids, so it joins the spaces first: a | two spaces | b.
#
# The file is trained here with SentencePiece's own trainer; its pieces of spaces then get the score they have at Meta's.
# What follows: engine/text/tokenizer.py takes SentencePiece's ids where a folder has no tokenizer.json.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check \
  transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
env/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2

text = ["a b  ab", "the cat sat on the mat", "aa  bb   cc", "hello world  hello there", "  indented", "x =    1"] * 50
Path("model").mkdir()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text), model_prefix="model/tokenizer", model_type="bpe", vocab_size=330, byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    character_coverage=1.0, minloglevel=2,
)
path = Path("model/tokenizer.model")
model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
for piece in model.pieces:
    if set(piece.piece) == {"\u2581"}:
        piece.score = -1e9
path.write_bytes(model.SerializeToString())
Path("model/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}))

reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
tokenizer = transformers.LlamaTokenizer.from_pretrained("model")
print("transformers", transformers.__version__, "sentencepiece", sentencepiece.__version__, "Python", sys.version.split()[0])
for words in ("a b", "a  b", "hello  world"):
    theirs, expected = tokenizer.tokenize(words), reference.encode(words, out_type=str)
    print(f"{words!r:16} SentencePiece {expected}  transformers {theirs}")
    differ = tokenizer.encode(words, add_special_tokens=False) != reference.encode(words)
    if differ != ("  " in words):
        sys.exit("not as stated")
PYTHON
