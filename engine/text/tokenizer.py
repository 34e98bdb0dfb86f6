"""The Tokenizer: text to ids and back. engine.text.tokenizer_files.load_tokenizer makes one.

No text encodes to a special token, not even its own spelling (`</s>`, `<|im_end|>`). Callers add BOS and EOS.
"""

import codecs
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import DataError
from engine.base.files import write_atomically

SAVED = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
# A text that the known pre-tokenizers encode differently. Its ids are part of a tokenizer's description, because the
# files above do not decide everything: config.json may name a class with a pre-tokenizer of its own.
PROBE = " The quick  brown\nﬁx: 1234\n 56 \n\n\té ①𝔘 e\u0301don't</s>  "
Encode = Callable[[list[str], bool], list[list[int]]]  # (texts, whether they follow a special token) -> their ids
BLOCK = 4096  # texts encoded at a time, since an Encoding of the tokenizers library is far larger than its ids


def replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Decode each byte that is no UTF-8 as one U+FFFD, as SentencePiece does.

    Python's own handler "replace" gives one U+FFFD for a whole incomplete sequence.
    """
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("each byte", replace_each_byte)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer and the bytes that they stand for."""

    ids: dict[str, int]  # every token as its file spells it -> id
    pieces: dict[int, bytes]  # id -> the bytes of text that it stands for
    special_ids: dict[str, int]  # text of a special token -> id
    byte_level: bool  # bytes are spelt in GPT-2's alphabet, not as <0xNN>
    has_space_prefix: bool  # SentencePiece put a space before the text; decoding removes it


class Tokenizer:
    """Text <-> ids, and the special tokens that the checkpoint's own files name.

    vocab_size   the largest id + 1
    bos_id       begins a text, None if there is none; add_bos: the files say that every text begins with it
    eos_id       ends a training example; stop_ids: all ids that end generation, eos_id among them
    special_ids  text of a special token -> id; no text encodes to them
    unembedded   the special tokens that forget_unembedded took out of special_ids
    files        name -> bytes of the files that save writes
    warnings     what a user should know of these files
    """

    def __init__(
        self,
        encode: Encode,
        vocabulary: Vocabulary,
        files: dict[str, bytes],
        *,
        bos_id: int | None,
        add_bos: bool,
        eos_id: int,
        stop_ids: Collection[int],
        warnings: Sequence[str] = (),
    ):
        self._encode = encode
        self.files = files
        self.special_ids = vocabulary.special_ids
        special = set(self.special_ids.values())
        self._pieces = {id: piece for id, piece in vocabulary.pieces.items() if id not in special}
        self._strip = vocabulary.has_space_prefix
        self._errors = "replace" if vocabulary.byte_level else "each byte"
        self.vocab_size = max([*vocabulary.pieces, *special]) + 1
        self.bos_id, self.eos_id = bos_id, eos_id
        self.add_bos = add_bos and bos_id is not None
        self.stop_ids = frozenset({eos_id, *stop_ids})
        self.unembedded: dict[str, int] = {}
        self.warnings = tuple(warnings)

    def forget_unembedded(self, n_embedded: int) -> bool:
        """Leave out the special tokens of ids from n_embedded on, of which the model has no embedding.

        Return whether all other ids are below n_embedded: those that texts become, BOS and EOS.
        """
        self.unembedded = {token: id for token, id in self.special_ids.items() if id >= n_embedded}
        self.special_ids = {token: id for token, id in self.special_ids.items() if id < n_embedded}
        self.stop_ids = frozenset(id for id in self.stop_ids if id < n_embedded)
        self.vocab_size = max([*self._pieces, *self.special_ids.values(), self.bos_id or 0, self.eos_id]) + 1
        return self.vocab_size <= n_embedded

    def find_other_pieces(self, other: "Tokenizer") -> list[tuple[int, bytes, bytes]]:
        """Return (id, piece here, piece there) of every id that is plain text in both tokenizers, but not the same."""
        pairs = ((id, piece, other._pieces.get(id, piece)) for id, piece in sorted(self._pieces.items()))
        return [(id, ours, theirs) for id, ours, theirs in pairs if ours != theirs]

    def describe(self) -> dict[str, Any]:
        """Return everything that decides which ids a text gets, as JSON values."""
        return {
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()},
            "special": self.special_ids,
            "bos, eos": [self.bos_id, self.add_bos, self.eos_id],
            "probe": [self._encode([PROBE], follows) for follows in (False, True)],
        }

    def encode(self, text: str, follows_special: bool = False) -> list[int]:
        """Return the ids of a text, without BOS and EOS. Raise DataError for a lone surrogate.

        follows_special: the text comes after a special token that a template wrote, as in <|im_start|>user. Some
        tokenizers of SentencePiece's kind then put no space before it. A BOS that the tokenizer adds is no such token.
        """
        return self.encode_batch([text], [follows_special])[0]

    def encode_batch(self, texts: Sequence[str], follow_special: Sequence[bool] | None = None) -> list[list[int]]:
        """Return [encode(text, follows) for text, follows in zip(texts, follow_special)], computed on all cores."""
        for number, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"tokenizer: text {number} has the lone surrogate {text[error.start]!r} at {error.start}, wanted "
                    "Unicode text; remove or replace it"
                ) from None
        found: list[list[int]] = [[]] * len(texts)
        for follows in (False, True):
            numbers = [n for n in range(len(texts)) if (follow_special is not None and follow_special[n]) == follows]
            for at in range(0, len(numbers), BLOCK):
                block = numbers[at : at + BLOCK]
                for number, ids in zip(block, self._encode([texts[n] for n in block], follows), strict=True):
                    found[number] = ids
        return found

    def piece(self, id: int) -> bytes:
        """Return the bytes of text that an id stands for: none for a special token and for an id that is unused."""
        return self._pieces.get(id, b"")

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids without special tokens. Bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(self._pieces.get(id, b"") for id in ids).decode("utf-8", self._errors)
        return text.removeprefix(" ") if self._strip else text

    def stream(self) -> "Decoder":
        """Return a Decoder for ids that arrive one by one."""
        return Decoder(self._pieces, self._strip, self._errors)

    def save(self, folder: Path) -> None:
        """Write the files from which transformers and load_tokenizer make a tokenizer that gives the same ids.

        They are copies of the checkpoint's files. Where the checkpoint has only a tokenizer.model, or is a GGUF file,
        files in Hugging Face's form are added. Tokenizer files of another model in the folder are removed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in SAVED:
            if name not in self.files:
                (folder / name).unlink(missing_ok=True)
        for name, content in self.files.items():
            write_atomically(folder / name, content)


class Decoder:
    """Tokenizer.decode() as a stream: the joined texts of all push() calls and of flush() are what it returns."""

    def __init__(self, pieces: dict[int, bytes], strip: bool, errors: str):
        self._pieces, self._strip = pieces, strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, id: int) -> str:
        """Return the text that this id completes, "" in the middle of a character."""
        return self._stripped(self._utf8.decode(self._pieces.get(id, b"")))

    def flush(self) -> str:
        """Return the text of an unfinished character."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if text and self._strip:
            self._strip, text = False, text.removeprefix(" ")
        return text
