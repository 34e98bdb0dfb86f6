"""Grammars over a model's logits, which may be more than the tokenizer's tokens."""

import pytest
import torch

pytest.importorskip("llguidance")

from engine.serving.structured import Constraint, SchemaError
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.small_model import VOCAB_SIZE, small_model


@pytest.mark.parametrize("n_logits", [VOCAB_SIZE, VOCAB_SIZE + 70])
def test_only_tokens_that_fit_may_come(n_logits):
    tokenizer = load_tokenizer(small_model())
    grammar, said = Constraint(tokenizer).follow_regex("(yes|no), [a-c]{3}"), ""
    while not grammar.is_complete():
        logits = torch.zeros(n_logits)
        grammar.mask(logits)
        ids = logits.isfinite().nonzero().flatten().tolist()
        assert ids and max(ids) < VOCAB_SIZE
        if not said:
            assert {tokenizer.decode([id])[:1] for id in ids} == {"y", "n"}
            with pytest.raises(SchemaError):
                Constraint(tokenizer).follow_regex("no").accept(tokenizer.encode("yes")[0])
        grammar.accept(ids[0])
        said += tokenizer.decode([ids[0]])
    assert len(said) in (7, 8) and said[:3] in ("yes", "no,") and set(said[-3:]) <= set("abc")


@pytest.mark.parametrize(("kind", "given"), [("regex", "("), ("schema", {"type": "nothing"})])
def test_what_is_no_grammar_is_refused(kind, given):
    with pytest.raises(SchemaError):
        getattr(Constraint(load_tokenizer(small_model())), f"follow_{kind}")(given)
