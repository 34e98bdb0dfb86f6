"""Settings of other programs' files: what each kind takes, and how faults are told."""

import pytest

from engine.formats.settings import MAX_PROBLEMS, Settings, join_problems

WANTED = {int: "a positive whole number", float: "a positive number", bool: "true or false", dict: "an object"}


@pytest.mark.parametrize(
    "kind, value, taken",
    [
        (int, 1, 1), (int, 2.0, 2), (int, 2**63 - 1024, 2**63 - 1024), (int, 0, None), (int, -1, None),
        (int, 1.5, None), (int, 2**63, None), (int, True, None), (int, "1", None), (float, 1, 1.0),
        (float, 5e-324, 5e-324),
        (float, 0, None), (float, float("nan"), None), (float, float("inf"), None), (float, True, None),
        (bool, False, False), (bool, True, True), (bool, 0, None), (dict, {}, {}), (dict, [], None),
    ],
)  # fmt: skip
def test_values(kind, value, taken):
    problems = []
    found = Settings({"key": value}, "x.json", problems).get("key", kind, "default")
    assert found == taken and type(found) is (kind if problems == [] else type(None))
    assert problems == ([] if taken is not None else [f"x.json: key is {str(value)[:80]!r}, wanted {WANTED[kind]}"])


@pytest.mark.parametrize("value", [0, False, "", 0.0, [], "silu", 3])
def test_only_what_changes_nothing_is_let_pass(value):
    problems = []
    settings = Settings({"key": value, "null": None}, "x.json", problems)
    for key, harmless in (("key", (value,)), ("key", ("other", value)), ("null", ()), ("absent", ())):
        settings.refuse(key, *harmless)
    assert problems == []
    settings.refuse("key", "other", why=" here")
    assert problems == [f"x.json: key is {value}, which is not supported here"]


@pytest.mark.parametrize("raw", [{}, {"key": None}])
def test_a_key_that_is_missing(raw):
    problems = []
    assert Settings(raw, "x.json", problems).get("key", int, 5) == 5 and problems == []
    assert Settings(raw, "x.json", problems).get("key", int) is None and problems == ["x.json: key is missing"]


@pytest.mark.parametrize(
    "n, text",
    [
        (1, "fault 0"), (2, "2 problems\n  fault 0\n  fault 1"),
        (MAX_PROBLEMS, "\n  ".join([f"{MAX_PROBLEMS} problems", *(f"fault {i}" for i in range(MAX_PROBLEMS))])),
        (MAX_PROBLEMS + 2, "\n  ".join(
            [f"{MAX_PROBLEMS + 2} problems", *(f"fault {i}" for i in range(MAX_PROBLEMS)), "and 2 more"]
        )),
    ],
)  # fmt: skip
def test_one_error_lists_every_problem(n, text):
    assert join_problems([f"fault {i}" for i in range(n)]) == text
