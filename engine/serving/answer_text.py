"""The text of an answer as its tokens come: whole characters, up to a stop string and without it."""

from collections.abc import Sequence

from engine.text.tokenizer import Tokenizer


class AnswerText:
    """Text of the ids pushed so far. What may be the beginning of a stop string is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.stream = tokenizer.stream()
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.is_stopped = False

    def push(self, id: int) -> str:
        """Return the text that may be shown now that this id has come, "" if there is none."""
        return self._take(self.stream.push(id), ends=False)

    def flush(self) -> str:
        """Return what is left at the end of the answer."""
        return self._take(self.stream.flush(), ends=True)

    def _take(self, text: str, ends: bool) -> str:
        if self.is_stopped:
            return ""
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            shown, self.held = self.held[: min(found)], ""
            return shown
        keep = 0 if ends else max((count_overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


def count_overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of text are the beginning of stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
