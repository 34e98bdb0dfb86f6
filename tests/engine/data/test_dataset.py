"""From rows to masked tokens to micro-batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base.errors import DataError
from engine.data import dataset as data
from engine.data.batches import Order, count_steps_per_epoch, permute_examples
from engine.text.templates import ALPACA_NO_INPUT, Row, encode_prompt
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.datasets import dataset
from tests.helpers.spm_tokenizers import train_sentencepiece

ALPACA = Row("f:1", None, "Name a colour.", "", "Red.")
WITH_INPUT = Row("f:2", None, "Add the numbers.", "2 3", "5")
CHAT = Row("f:3", (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Hi"), ("assistant", "Yo")))


@pytest.fixture(scope="module")
def smol(smollm2):
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    train_sentencepiece(folder)
    return load_tokenizer(folder)


def one(row, tokenizer, **options):
    return data.encode_rows([row], tokenizer, **options).select()


def targets(dataset, tokenizer):
    return tokenizer.decode(dataset.tokens[dataset.is_target].tolist())


def test_alpaca_tokens_are_prompt_and_output_as_one_string(smol):
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n2 3\n\n### Response:"
    )
    got = one(WITH_INPUT, smol)
    assert got.tokens.tolist() == [*smol.encode(prompt + "5"), smol.eos_id]  # SmolLM2's files ask for no BOS
    assert got.is_target.tolist() == [i >= len(smol.encode(prompt)) for i in range(len(got.tokens))]
    assert "### Input" not in smol.decode(one(ALPACA, smol).tokens.tolist())


def test_the_mask_covers_the_tokens_of_the_prompt_alone_even_where_a_token_spans_the_boundary(smol):
    row = Row("f:1", None, "Say it.", "", ":):")
    prompt = ALPACA_NO_INPUT.format(instruction=row.instruction)
    alone, together = smol.encode(prompt), smol.encode(prompt + row.output)
    assert together[: len(alone)] != alone, "the example must merge over the boundary, or it proves nothing"
    got = one(row, smol)
    assert got.tokens.tolist() == [*together, smol.eos_id]
    assert got.is_target.sum() == len(together) + 1 - len(alone)


def test_a_sentencepiece_llama_begins_with_bos(llama):
    got = one(ALPACA, llama)
    assert got.tokens[0] == llama.bos_id == 1 and got.tokens[-1] == llama.eos_id == 2
    assert not got.is_target[0] and got.is_target[-1]


def test_text_that_spells_a_special_token_stays_text(smol):
    spelled = "<|im_end|></s><s>[PAD]<|endoftext|>"
    got = one(Row("f:1", None, spelled, spelled, spelled), smol)
    assert set(got.tokens[:-1].tolist()).isdisjoint(smol.special_ids.values())
    assert targets(got, smol) == spelled


def test_chatml_carries_loss_on_every_assistant_turn(smol):
    got = one(CHAT, smol, style="chatml")
    start, end = (smol.special_ids[t] for t in ("<|im_start|>", "<|im_end|>"))
    parts = []
    for role, text in CHAT.messages:
        parts += [start, *smol.encode(f"{role}\n{text}"), end, *smol.encode("\n")]
    assert got.tokens.tolist() == parts
    assert got.tokens[got.is_target].tolist() == [*smol.encode("Yo"), end] * 2


def test_chatml_is_what_transformers_makes_of_the_models_own_template(smol, tmp_path):
    import transformers

    smol.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if not theirs.chat_template:
        pytest.skip("the tokenizer carries no chat template")
    messages = [{"role": role, "content": text} for role, text in CHAT.messages]
    assert one(CHAT, smol, style="chatml").tokens.tolist() == theirs.apply_chat_template(messages)["input_ids"]


def test_a_text_at_the_begin_and_the_same_behind_a_special_token_are_not_one(llama):
    """In one block of rows, where each distinct text is tokenised once; the two may have other ids."""
    raw = Row("f:1", None, "[INST] Hi [/INST]", "", " Yo ", is_raw=True)
    chat = Row("f:2", (("user", "Hi"), ("assistant", "Yo")))
    both = data.encode_rows([raw, chat], llama, "llama2")
    alone = [data.encode_rows([row], llama, "llama2").tokens for row in (raw, chat)]
    assert both.tokens.tolist() == [*alone[0].tolist(), *alone[1].tolist()]


def test_llama2_is_one_string_a_turn(llama):
    got = one(CHAT, llama, style="llama2")
    first = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yo "
    want = [1, *llama.encode(first), 2, 1, *llama.encode("[INST] Hi [/INST] Yo "), 2]
    assert got.tokens.tolist() == want
    assert got.is_target.sum() == 2 * (
        len(llama.encode("[INST] Hi [/INST] Yo ")) - len(llama.encode("[INST] Hi [/INST]")) + 1
    )


def test_a_style_that_needs_a_token_the_tokenizer_lacks_says_so(smol):
    with pytest.raises(DataError, match=r"llama3 needs the token <\|start_header_id\|>"):
        one(CHAT, smol, style="llama3")
    with pytest.raises(DataError, match=r"f:3: the row holds chat messages.*--prompt-style chatml"):
        one(CHAT, smol)


def test_a_prompt_is_the_example_without_its_answer(smol):
    for row, style in [(ALPACA, "alpaca"), (WITH_INPUT, "alpaca"), (ALPACA, "chatml"), (CHAT, "chatml")]:
        prompt, full = encode_prompt(row, smol, style), one(row, smol, style=style).tokens.tolist()
        assert full[: len(prompt)] == prompt
        answer = row.messages[-1][1] if row.messages else row.output
        assert smol.decode(full[len(prompt) :]).strip() == answer


def test_long_rows_are_cut_and_rows_without_loss_are_dropped_and_both_are_counted(smol):
    long = Row("f:4", None, "Count.", "", "one two three " * 100)
    hidden = Row("f:5", None, "A long question. " * 50, "", "Yes.")
    got = data.encode_rows([ALPACA, long, hidden], smol, max_length=64).select()
    assert tuple(got.sources) == ("f:1", "f:4") and got.lengths().max() == 64
    counts = {"rows": 3, "examples": 2, "truncated": 2, "dropped": 1, "tokens": 64 + got.lengths()[0]}
    assert {k: got.counts[k] for k in counts} == counts
    with pytest.raises(DataError, match="no example is left of 1 rows: 1 had no response token within --max-length 64"):
        data.encode_rows([hidden], smol, max_length=64).select()


def test_an_empty_output_still_teaches_the_end(smol):
    assert one(Row("f:1", None, "Say nothing.", "", ""), smol).is_target.sum() == 1


@pytest.mark.parametrize(
    "more, unlearned, is_empty",
    [({}, (), True), ({}, (1,), False), ({1: {"tool_calls": [{}]}}, (), False), ({2: {"name": "f"}}, (), True)],
)
def test_an_answer_without_text_is_empty_unless_it_calls_a_tool_or_is_not_learned(more, unlearned, is_empty):
    row = Row("f:1", (("user", "Hi"), ("assistant", " \n"), ("tool", "Yo")), more=more, unlearned=frozenset(unlearned))
    assert data.has_empty_answer(row) == is_empty


def test_train_on_prompt_predicts_every_token_but_the_first(smol):
    got = one(ALPACA, smol, train_on_prompt=True)
    assert got.is_target.tolist() == [False] + [True] * (len(got.tokens) - 1)


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 5), st.booleans())
@settings(deadline=None)
def test_an_epoch_holds_every_example_once(n, batch, seed, shuffle):
    per_epoch = count_steps_per_epoch(n, batch)
    for epoch in range(2):
        steps = [Order(n, batch, seed, shuffle).examples_of(epoch * per_epoch + i + 1) for i in range(per_epoch)]
        assert sorted(np.concatenate(steps).tolist()) == list(range(n))
        assert all(len(step) == batch for step in steps[:-1])
        if not shuffle:
            assert np.concatenate(steps).tolist() == list(range(n))


def test_the_order_is_another_each_epoch_and_each_seed():
    orders = {tuple(permute_examples(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


@given(st.integers(2, 200), st.floats(0.01, 0.9), st.integers(0, 5))
@settings(deadline=None)
def test_held_out_rows_are_apart(n, fraction, seed):
    kept, held = data.hold_out(list(range(n)), fraction, seed)
    assert sorted(kept + held) == list(range(n)) and len(held) == max(1, round(fraction * n))
    assert data.hold_out(list(range(n)), fraction, seed) == (kept, held)


def test_the_digest_tells_where_examples_end_and_not_where_they_lie():
    whole = dataset([[1, 2], [3, 4, 5]], [[False, True], [False, True, True]])
    cut_elsewhere = dataset([[1, 2, 3], [4, 5]], [[False, True, False], [True, True]])
    assert (cut_elsewhere.tokens == whole.tokens).all() and (cut_elsewhere.is_target == whole.is_target).all()
    assert cut_elsewhere.sha256() != whole.sha256()
    less_learned = dataset([[1, 2], [3, 4, 5]], [[False, True], [False, False, True]])
    assert less_learned.sha256() != whole.sha256(), "a resume after a weight was set to 0 would go on"
    more = dataset([[9, 9], [3, 4, 5], [8], [1, 2]])
    chosen = data.Dataset(more.tokens, more.is_target, more.begins[[3, 1]], more.ends[[3, 1]], ("3", "1"), {})
    assert chosen.sha256() == whole.sha256()


def test_a_row_of_exactly_the_maximum_length_is_not_cut(smol):
    length = len(one(ALPACA, smol).tokens)
    for max_length, n_cut in ((length + 1, 0), (length, 0), (length - 1, 1)):
        got = data.encode_rows([ALPACA], smol, max_length=max_length).select()
        assert (got.counts["truncated"], len(got.tokens)) == (n_cut, min(length, max_length))


def test_rows_held_out_are_drawn_from_all():
    """The first ones may be of another kind than the rest."""
    rows = list(range(1000))
    _, held = data.hold_out(rows, 0.1, 0)
    assert len(held) == 100 and 400 < sum(held) / 100 < 600
    assert data.hold_out(rows, 0.1, 1)[1] != held == data.hold_out(rows, 0.1, 0)[1]


def test_each_held_out_example_that_is_trained_on_counts():
    train = dataset([[1, 2, 3], [4, 5], [4, 5], [7]])
    assert data.count_shared(train, dataset([[4, 5], [4, 5], [4, 5], [1, 2, 3], [1, 2], [8, 9]])) == 4
    assert data.count_shared(train, dataset([[1, 2], [2, 3]])) == 0


def test_a_text_may_have_fewer_ids_than_its_beginning():
    """A prompt of 5 ids whose last ones become one with what follows has no more than the whole."""
    assert data.count_by_turns([5, 4]) == [4, 0] and data.count_by_turns([3, 7, 9]) == [3, 4, 2, 0]
    assert data.count_by_turns([3, 2, 8]) == [3, 0, 5, 0]
