"""Which launches are known from a record: those whose machine code cannot have changed since it was written."""

import dataclasses
import re
import types
from types import SimpleNamespace

import pytest
import triton
from triton.runtime.jit import JITFunction

from kernels.compiled import known, records
from kernels.compiled.launch_cases import Case
from kernels.compiled.launches import Launch
from kernels.compiled.machine_code import CHIPS
from tests.helpers.run import ROOT

SCALE = 2


def plus_one(x):
    return x + 1


def plus_two(x):
    return x + 2


def scaled(x, y):
    return HELPER(x) * SCALE + y  # noqa: F821


def launch(helper=plus_one, scale=SCALE, **changes):
    """Return a launch of `scaled`, which calls the helper and reads a global constant."""
    names = {"HELPER": JITFunction(helper), "SCALE": scale}
    kernel = types.FunctionType(scaled.__code__, {**globals(), **names}, "scaled")
    kernel.__qualname__, kernel.__module__ = "scaled", __name__
    made = Launch(
        Case("op", "label", None), "sm_90", JITFunction(kernel), {"x": "*bf16", "y": "i32"}, {}, {(0,): 16},
        SimpleNamespace(num_warps=4, num_stages=3, extern_libs=("a path",)), {},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_what_the_machine_code_depends_on_changes_the_digest():
    changes = [
        {}, {"helper": plus_two}, {"scale": 3}, {"chip": "sm_80"}, {"signature": {"x": "*fp32", "y": "i32"}},
        {"constants": {(1,): 1}}, {"attributes": {}}, {"options": SimpleNamespace(num_warps=8, num_stages=3)},
    ]  # fmt: skip
    digests = [known.digest_launch(launch(**change)) for change in changes]
    assert len(set(digests)) == len(changes) and all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)
    moved = SimpleNamespace(num_warps=4, num_stages=3, extern_libs=("another path",))
    assert known.digest_launch(launch(options=moved)) == digests[0] == known.digest_launch(launch())


def test_comments_docstrings_and_lines_do_not_count():
    source = "def f(x):\n    return x + 1\n"
    same = 'def f(x):\n    """Doc."""\n    # why\n    return x + 1  # what\n'
    assert known.bare_syntax(source) == known.bare_syntax(same) == known.bare_syntax("\n\n" + source)
    assert known.bare_syntax(source) != known.bare_syntax(source.replace("1", "2"))


def test_the_code_that_judges_counts(monkeypatch):
    before = known.digest_launch(launch())
    known._digest_of_reader.cache_clear()
    monkeypatch.setattr(known, "__file__", str(ROOT / "kernels" / "measure" / "x.py"))
    with pytest.raises(FileNotFoundError):
        known.digest_launch(launch())
    monkeypatch.undo()
    real = known.bare_syntax
    monkeypatch.setattr(known, "bare_syntax", lambda text: real(text).replace("8", "9"))  # the gate's limits, say
    known._digest_of_reader.cache_clear()
    assert known.digest_launch(launch()) != before
    known._digest_of_reader.cache_clear()


FIELDS = dict.fromkeys(known.LAUNCH_FIELDS, "same") | {"triton": triton.__version__}


def with_records(*launches):
    """Return find_known's arguments for launches that all have a record."""
    old = [FIELDS | {"inputs": known.digest_launch(x), "registers": i} for i, x in enumerate(launches)]
    return launches, [FIELDS] * len(launches), old


def test_only_a_launch_with_an_equal_record_is_known():
    launches, described, old = with_records(*(launch(constants={(1,): i}) for i in range(3)))
    assert known.find_known(launches, described, old) == dict(enumerate(old))
    alike = [FIELDS | {"case": case} for case in "ab"]  # two cases that launch it with the same arguments
    recorded = [fields | {"inputs": old[0]["inputs"]} for fields in alike]
    assert known.find_known([launches[0]] * 2, alike, recorded) == dict(enumerate(recorded))
    old[0] |= {"num_warps": 8}
    old[1] |= {"triton": "0.1"}
    old[2] |= {"inputs": "another"}
    assert known.find_known(launches, described, old) == {}


def test_one_launch_of_each_kernel_and_type_is_never_known_each_on_another_chip():
    """Four types, in two launches each, on three chips: the first launch of one type a chip, then round again."""
    pairs = [(chip, kind) for chip in CHIPS for kind in ("*bf16", "*fp32", "*fp16", "*fp64")]
    launches = [launch(chip=chip, signature={"x": kind}, constants={(1,): i}) for chip, kind in pairs for i in range(2)]
    compiled = set(range(len(launches))) - known.find_known(*with_records(*launches)).keys()
    assert [pairs[i // 2] for i in sorted(compiled)] == [
        ("sm_80", "*bf16"), ("sm_80", "*fp64"), ("sm_90", "*fp32"), ("sm_100", "*fp16"),
    ]  # fmt: skip
    assert all(i % 2 == 0 for i in compiled)


def test_records_of_what_ships_hold_digests():
    """Else every launch is compiled in every run: run python -m kernels.static --json benchmarks/static.json."""
    found = records.load_records(ROOT / "benchmarks" / "static.json")["records"]
    assert sum("inputs" in record for record in found) > 0.9 * len(found)
