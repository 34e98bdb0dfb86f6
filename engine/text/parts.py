"""What a template makes of a row: texts and special tokens, in order, and which of them carry loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Text:
    """Text that is tokenised as one string. The tokens of the prompt carry no loss, those of the response do.

    more: what follows the response without a special token between, by turns without loss and with it.
    follows_special: a special token that the template wrote stands before it (see Tokenizer.encode).
    """

    prompt: str
    response: str = ""
    more: tuple[str, ...] = ()
    follows_special: bool = True

    def ends(self) -> Iterator[str]:
        """Return the text up to the end of the prompt, of the response, of each of more. The last is all of it."""
        return accumulate((self.prompt, self.response, *self.more))

    def whole(self) -> str:
        """Return all of the text."""
        return "".join((self.prompt, self.response, *self.more))


@dataclass(frozen=True)
class Special:
    """A special token: "bos", "eos" or the token's text. The tokenizer never makes it from plain text."""

    name: str
    loss: bool = False


Part = Text | Special
