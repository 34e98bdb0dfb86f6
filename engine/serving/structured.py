"""Answers that follow a JSON schema or a regular expression: llguidance says which tokens may come next."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from engine.text.tokenizer import Tokenizer


class SchemaError(ValueError):
    """A grammar that cannot be enforced. The text says why."""


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer):
        special = {id: text.encode() for text, id in tokenizer.special_ids.items()}
        self.tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [special.get(i) or tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(special)

    def __call__(self, text: str | bytes) -> list[int]:
        return self.tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text, True)


class Constraint:
    """Grammars over one tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer):
        import llguidance

        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        self.matcher = llguidance.LLMatcher
        self.tokenizer = llguidance.LLTokenizer(wrapper)

    def follow_schema(self, schema: Mapping[str, Any]) -> "TokenGrammar":
        """Return the grammar of JSON texts of a schema. Raises SchemaError."""
        return self._new(lambda: self.matcher.grammar_from_json_schema(json.dumps(schema)))

    def follow_regex(self, pattern: str) -> "TokenGrammar":
        """Return the grammar of the texts that a regular expression matches from end to end. Raises SchemaError."""
        return self._new(lambda: self.matcher.grammar_from_regex(pattern))

    def _new(self, make_grammar) -> "TokenGrammar":
        try:
            grammar = make_grammar()
        except (ValueError, TypeError) as error:
            raise SchemaError(str(error)) from None
        problem = self.matcher.validate_grammar(grammar, self.tokenizer)
        if problem:
            raise SchemaError(problem.strip().splitlines()[0])
        return TokenGrammar(self.matcher(self.tokenizer, grammar))


class TokenGrammar:
    """One answer's place in a grammar, as engine.inference.sampling.Grammar."""

    def __init__(self, matcher: Any):
        self.matcher = matcher

    def mask(self, logits: torch.Tensor) -> None:
        """Set the logits (V,) of tokens that may not come next to -inf, those beyond the tokenizer's tokens too."""
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")[: len(logits)]
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[: len(bits)] = torch.from_numpy(bits.astype(bool))
        logits.masked_fill_(~allowed.to(logits.device), float("-inf"))

    def accept(self, id: int) -> None:
        """Take the drawn token. Raises SchemaError if the grammar does not allow it."""
        if not self.matcher.consume_token(id):
            raise SchemaError(self.matcher.get_error() or f"token {id} does not fit the grammar")

    def is_complete(self) -> bool:
        """Return whether nothing may follow any more."""
        return self.matcher.is_stopped()
