"""Recording launches: which entries are read, and which launches are kept."""

import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from kernels.compiled import launches
from kernels.compiled.launch_cases import Case, all_cases
from kernels.compiled.launches import Launch, NotingTable, patched
from kernels.ops import common
from tests.helpers.run import ROOT, environment

RECORDS = ROOT / "benchmarks" / "static.json"


def test_the_entries_read_are_noted():
    read = []
    table = NotingTable(common.launch_table("rms_norm"), lambda path, values: read.append(path), ("rms_norm",))
    with patched(common, launch_table=lambda op: table, chip_override="sm_90"):
        config = common.launch_config("rms_norm", "forward", None, 2048)
    size = next(key for key in common.launch_table("rms_norm")["forward"]["sm_90"] if int(key) >= 2048)
    assert read == [("rms_norm", "forward", "sm_90", size)] and "from" not in config


def test_of_launches_compiled_alike_the_largest_is_recorded():
    records = json.loads(RECORDS.read_text())["records"]  # the gate's, as test_what_ships_passes sees to
    read = {r["case"]: r["bytes_per_element"] for r in records if r["kernel"] == "_partial_kernel"}
    assert read == {
        "bf16": 2.0,
        "fp32": 4.0,
        "bf16, one gradient's sums": 2.0,
    }  # of the last gradient, a small one, the partial sums would be the most


def test_case_labels_are_unique():
    labels = [(case.op, case.label) for case in all_cases()]
    assert len(set(labels)) == len(labels)
    assert all(isinstance(case, Case) for case in all_cases())


def test_nothing_is_forked_after_cuda_has_begun():
    """CUDA's locks and threads do not survive a fork. Compiles in a process without Triton's interpreter."""
    code = """
import os, torch
from kernels.compiled import launch_cases, launches
def refuse():
    raise AssertionError("forked")
os.fork, torch.cuda.is_initialized = refuse, lambda: True
cases = launch_cases.all_cases(["grad_norm"])[:1]
facts = launches.compile_all(launches.record_launches(cases[0], "sm_90")[:1], workers=1)
print([found.registers > 0 for found in facts])
"""
    env = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.stdout == "[True]\n", done.stderr[-2000:]


# ---- a launch, by hand ----------------------------------------------------------------------------------------------


def kernel(name="k", module="kernels.ops.rope"):
    def fn():
        pass

    fn.__name__, fn.__qualname__, fn.__module__ = name, f"outer.{name}", module
    return SimpleNamespace(fn=fn)


def launch_of(constants=None, options=None, chip="sm_90", **more):
    signature = {"x": "*bf16", "BLOCK": "constexpr", "n": "i32", "WARM": "constexpr"}
    constants = {(1,): 64, (3,): True} if constants is None else constants
    options = SimpleNamespace(num_warps=4, num_stages=3) if options is None else options
    about = {"function": kernel(), "attributes": {(0,): 16}, "arguments": {}} | more
    return Launch(Case("rope", "a", None), chip, about.pop("function"), signature, constants, options=options, **about)


def test_a_launch_is_named_and_compiled_by_what_it_is_of():
    one = launch_of()
    assert one.name == "k" and one.constexprs() == {"BLOCK": 64, "WARM": True} and one.entry is None
    assert one.key() == launch_of(arguments={"x": 3}).key() and len(one.key()) == 7
    others = [
        launch_of({(1,): 32, (3,): True}), launch_of(options=SimpleNamespace(num_warps=8, num_stages=3)),
        launch_of(chip="sm_80"), launch_of(attributes={}), launch_of(function=kernel("l")),
        launch_of(function=kernel(module="kernels.ops.swiglu")),
    ]  # fmt: skip
    assert len({launch.key() for launch in (one, *others)}) == 7


PATHS = [("rope", "k", "sm_90", size) for size in ("64", "128", "256", "512")]


@pytest.mark.parametrize(
    ("read", "entry"),
    [
        ([{"BLOCK": 64, "from": "x"}], 0), ([{"BLOCK": 32}], None), ([{"other": 1}], None), ([], None),
        ([{"BLOCK": 64}, {"BLOCK": 64, "num_warps": 4}, {"BLOCK": 64}], 1), ([{"BLOCK": 64}, {"BLOCK": 64}], 1),
        ([{"BLOCK": 64, "num_warps": 4, "programs_per_sm": 9}, {"BLOCK": 64, "num_warps": 8}], 0),
        ([{"BLOCK": 64, "a": 1, "b": 2, "c": 3}, {"BLOCK": 64, "num_warps": 4}], 1),  # what it does not use is nothing
        ([{"num_stages": 3, "from": 7}, {"WARM": False, "BLOCK": 64, "num_warps": 4}], 0),
    ],
)  # fmt: skip
def test_the_entry_of_a_launch_is_the_last_that_agrees_in_most_values(read, entry):
    found = launches._entry_of(launch_of(), list(zip(PATHS, read, strict=False)))
    assert found == (None if entry is None else PATHS[entry])


def test_patches_are_taken_back_even_after_an_error():
    owner = SimpleNamespace(a=1, b=2)
    with pytest.raises(ValueError, match="no"), patched(owner, a=3, b=4):
        assert (owner.a, owner.b) == (3, 4)
        raise ValueError("no")
    assert (owner.a, owner.b) == (1, 2)


def test_a_case_calls_an_operators_launch_function():
    def op(*args):
        return ("op", *args)

    assert launches.call_case((op, 1, 2)) == ("op", 1, 2)
    op.launch = lambda *args: ("launch", *args)
    assert launches.call_case((op, 1, 2)) == ("launch", 1, 2)


def test_alike_launches_are_recorded_once_with_most_elements(monkeypatch):
    """For the chip that is asked for; the table is read by the op's name."""
    function, seen = kernel(), []

    def bind(function, args, kwargs, chip):
        seen.append((kwargs, chip, common.chip_override))
        return SimpleNamespace(num_warps=kwargs["num_warps"]), {"x": "*bf16"}, {}, {}, {"x": args[0], "n": 5}

    def op(*sizes):
        common.launch_table("rope")["rotate"]["sm_80"]["64"]
        for size, warps in sizes:
            launches.JITFunction.run(function, torch.empty(size, device="meta"), grid=1, warmup=False, num_warps=warps)

    monkeypatch.setattr(launches, "bind_arguments", bind)
    case = Case("rope", "a", lambda make: (op, (10, 4), (30, 4), (20, 8), (5, 4)))
    tables = {"rope": {"rotate": {"sm_80": {"64": {"num_warps": 8}}}}}
    small, large = launches.record_launches(case, "sm_80", tables.__getitem__)
    assert [(len(found.arguments["x"]), found.options.num_warps) for found in (small, large)] in (
        [(20, 8), (30, 4)], [(30, 4), (20, 8)],
    )  # fmt: skip
    entries = {found.options.num_warps: found.entry for found in (small, large)}
    assert entries == {4: None, 8: ("rope", "rotate", "sm_80", "64")} and small.case is case and small.chip == "sm_80"
    assert {chip for _, chip, _ in seen} == {override for *_, override in seen} == {"sm_80"}


def test_launches_that_compile_alike_are_compiled_once(monkeypatch):
    asked, compiled = [], []
    one, same, other = launch_of(), launch_of(arguments={"x": 1}), launch_of(chip="sm_80")
    pool = SimpleNamespace(imap=lambda function, sources: map(function, list(sources)))
    workers = SimpleNamespace(Pool=lambda n: asked.append(n) or nullcontext(pool))
    monkeypatch.setattr(launches.multiprocessing, "get_context", lambda how: asked.append(how) or workers)

    def compile_source(*source):
        compiled.append(source)
        if source[2] == "sm_80":
            raise RuntimeError("no such chip\n")
        return "facts"

    monkeypatch.setattr(launches, "compile_source", compile_source)
    assert launches.compile_all([one, same, other], workers=3) == ["facts", "facts", "RuntimeError: no such chip"]
    options = {"num_warps": 4, "num_stages": 3}
    source = ("kernels.ops.rope", "outer.k", "sm_90", one.signature, one.constants, one.attributes, options)
    assert asked == ["fork", 3] and compiled == [source, (*source[:2], "sm_80", *source[3:])]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    launches.compile_all([one])
    assert asked[2:] == ["forkserver", 2]


def test_a_source_is_compiled_for_its_chip(monkeypatch):
    given = []
    monkeypatch.setattr(launches, "import_module", lambda name: SimpleNamespace(k=f"k of {name}"))
    monkeypatch.setattr(launches, "ASTSource", lambda *args: ("source", *args))
    monkeypatch.setattr(launches.triton, "compile", lambda *args, **named: given.append((args, named)) or "compiled")
    monkeypatch.setattr(launches, "read_facts", lambda made: f"facts of {made}")
    found = launches.compile_source("m", "k", "sm_100", {"x": "i32"}, {(0,): 1}, {(0,): 16}, {"num_warps": 4})
    (((source,), named),) = given
    assert found == "facts of compiled" and source == ("source", "k of m", {"x": "i32"}, {(0,): 1}, {(0,): 16})
    target = named["target"]
    assert (target.backend, target.arch, target.warp_size) == ("cuda", 100, 32) and named["options"] == {"num_warps": 4}
