"""Secrets that a server echoes, in every form that something may decode."""

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.api.cleaner import MARK, Cleaner
from tests.helpers.linear import assert_linear_time

KEYS = ["sk-test-5f3a9c1e77d04b21", 'sk-proj/a+b=c_1.Q"x\\z9', "12345678", "a/b/c/d/e/f/g?=&%"]


def escape(text, form):
    return "".join(form.format(ord(char)) for char in text)


def list_forms(key):
    """Return {form: the key in it}, each with something around it where that changes the form."""
    forms = {
        "as it is": key, "JSON": json.dumps(key)[1:-1], "JSON in JSON": json.dumps(json.dumps(key))[1:-1],
        "slashes": key.replace("/", "\\/"), "escapes": escape(key, "\\u{:04x}"), "capitals": escape(key, "\\u{:04X}"),
        "escapes in JSON": json.dumps(escape(key, "\\u{:04x}")), "hex escapes": escape(key, "\\x{:02x}"),
        "braces": escape(key, "\\u{{{:x}}}"), "one escape": f"\\u{ord(key[0]):04x}{json.dumps(key[1:])[1:-1]}",
        "URL": quote(key, safe=""), "URL, all of it": escape(key, "%{:02X}"), "URL twice": quote(quote(key, safe="")),
        "HTML": escape(key, "&#{};"), "HTML in hex": escape(key, "&#x{:x};"),
        "hex": key.encode().hex(), "hex in capitals": key.encode().hex().upper(),
    }  # fmt: skip
    for before in ("", "a", "ab", "Bearer ", "user:"):
        for after in ("", "c", "cd"):
            text = base64.b64encode((before + key + after).encode()).decode()
            forms |= {f"base64 {before} {after}": text, f"base64 in JSON {before} {after}": text.replace("/", "\\/")}
            forms[f"base64 in an address {before} {after}"] = quote(text, safe="")
            forms[f"base64 for addresses {before} {after}"] = text.replace("+", "-").replace("/", "_")
    return forms


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_any_form_is_taken_out(key):
    cleaner = Cleaner([key])
    for name, form in list_forms(key).items():
        found = cleaner.clean(f"so <{form}> it is")
        assert found.startswith("so <") and found.endswith("> it is") and MARK in found, name
        assert key not in found and form[2:-4] not in found, name


@given(st.sampled_from(KEYS), st.lists(st.integers(0, 4), min_size=40, max_size=40))
def test_each_character_may_be_escaped_in_its_own_way(key, ways):
    forms = ("{0}", "\\u{1:04x}", "\\\\u{1:04X}", "%{1:02x}", "&#{1};")
    mixed = "".join(forms[way].format(char, ord(char)) for char, way in zip(key, ways, strict=False))
    assert Cleaner([key]).clean(f"<{mixed}>") == f"<{MARK}>"


def test_what_decodes_to_the_key_is_taken_out_of_the_body():
    key = KEYS[0]
    parts = [{"type": "text", "text": "<" + key[:9]}, {"type": "text", "text": key[9:] + ">"}]
    body = json.dumps({"id": key, "choices": [{"message": {"content": parts, key: 1}}]})
    found = json.loads(Cleaner([key]).clean_body(body))
    assert found["id"] == MARK
    assert found["choices"][0]["message"] == {"content": [{"type": "text", "text": f"<{MARK}>"}], MARK: 1}
    assert Cleaner([key]).clean_value([{key: {key: key}}], 9) == [{MARK: {MARK: MARK}}]


@pytest.mark.parametrize(
    "body", ["", "no JSON", '{"a": [1, null, {"b": ["x", "y"]}]}', "[" * 100_000, '"\\ud800"', "NaN"]
)
def test_a_body_without_a_key_stays_as_it_is(body):
    assert Cleaner(KEYS).clean_body(body) == body == Cleaner([]).clean_body(body)


@pytest.mark.parametrize("key", ["none", "EMPTY", "x", "", "sk-1", "anything"])
def test_a_word_that_stands_in_for_a_key_is_left(key):
    assert Cleaner([key]).clean(f"<{key}>") == f"<{key}>"


@pytest.mark.parametrize("part", ["\\", "\\u00", "%25", "&#0", "sk-", "sk-test-", "c2st", "[", '["', "{"])
def test_hostile_text_takes_linear_time(part):
    cleaner = Cleaner([KEYS[0]])
    n = 100_000 // len(part)
    assert_linear_time(cleaner.clean_body, part * n, part * (4 * n))


@pytest.mark.parametrize("keys", [("12345678", "12345678-rest"), ("12345678-rest", "12345678")])
def test_of_a_secret_that_begins_with_another_nothing_is_left(keys):
    assert Cleaner(keys).clean("x 12345678-rest y 12345678 z") == f"x {MARK} y {MARK} z"


@pytest.mark.parametrize(
    "key, is_hidden", [("1234567", False), ("12345678", True), ("abcdefgh", False), ("abcdefg1", True)]
)
def test_a_word_or_a_short_text_is_no_secret(key, is_hidden):
    assert (Cleaner([key]).clean(f"x {key} y") == f"x {MARK} y") == is_hidden


@pytest.mark.parametrize(
    "body", ["no JSON: sk-test-5f3a9c1e", '{"cut": "sk-test-5f3a9c1e', '["sk-test-5f3a9c1e"]', "[" * 9999]
)
def test_a_body_that_is_no_json_is_cleaned_too(body):
    cleaned = Cleaner(["sk-test-5f3a9c1e"]).clean_body(body)
    assert cleaned == body.replace("sk-test-5f3a9c1e", MARK) and Cleaner([]).clean_body(body) == body
