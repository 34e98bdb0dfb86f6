"""Entries of the launch tables, the tuner's candidates, and tables on disk."""

import json
from types import SimpleNamespace

import pytest
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from kernels.compiled.launch_cases import Case, Make, all_cases
from kernels.compiled.launches import patched
from kernels.measure import candidates
from kernels.measure.candidates import CANDIDATES, FOLLOWS, Entry, drop_source
from kernels.measure.tuner import TOY
from kernels.ops import common


def test_candidates_begin_with_the_incumbent_and_differ():
    for op, kernels in CANDIDATES.items():
        for kernel in kernels:
            for size, incumbent in common.launch_table(op)[kernel]["sm_90"].items():
                configs = candidates.list_candidates(Entry(op, kernel, "sm_90", size, ()), incumbent)
                assert configs[0] == drop_source(incumbent) and len(configs) > 1
                assert all(configs[0].keys() == config.keys() for config in configs), (
                    f"{op}.{kernel}: no such constexpr"
                )
                assert len({json.dumps(config, sort_keys=True) for config in configs}) == len(configs)


def test_every_kernel_of_a_launch_table_has_candidates():
    tabled = {(path.stem, kernel) for path in common.LAUNCH.glob("*.json") for kernel in common.launch_table(path.stem)}
    assert tabled == {(op, kernel) for op, kernels in CANDIDATES.items() for kernel in kernels}


def test_a_kernel_that_follows_takes_the_tile_over():
    for (op, kernel), (follower, names) in FOLLOWS.items():
        table = common.launch_table(op)
        entry = Entry(op, kernel, "sm_90", next(iter(table[kernel]["sm_90"])), ())
        config = drop_source(entry.config(table)) | dict.fromkeys(names, 77)
        new = candidates.replace_config(table, entry, config)
        assert all(new[follower]["sm_90"][entry.size][name] == 77 for name in names)
        assert table[follower]["sm_90"][entry.size] != new[follower]["sm_90"][entry.size]
        for size, values in table[kernel]["sm_90"].items():  # as shipped, too
            assert all(values[name] == table[follower]["sm_90"][size][name] for name in names)


def test_a_launch_table_is_written_one_configuration_a_line(tmp_path):
    for path in common.LAUNCH.glob("*.json"):
        candidates.write_launch_table(path.stem, json.loads(path.read_text()), tmp_path)
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name
    assert not list(tmp_path.glob("*.new"))


def test_entries_are_what_cases_read():
    table = common.launch_table("rope")
    with patched(common, chip_override=None):
        found = candidates.find_entries("rope", "sm_90", Make(), table) if not common.INTERPRETED else None
    found = found or candidates.find_entries("rope", "interpreter", Make("cpu", **TOY), table)
    assert [(e.op, e.kernel) for e in found] == [("rope", "rotate")] * len(found) and found
    assert sum(len(e.cases) for e in found) == len(all_cases(["rope"]))


# ---- parts, by hand -------------------------------------------------------------------------------------------------

ROPE = {"rotate": {"sm_90": {"64": {"TOKENS": 8, "HEADS": 4, "num_warps": 4, "from": "hand"}, "512": {"TOKENS": 4}}}}


def test_candidates_are_every_combination_in_order(monkeypatch):
    monkeypatch.setattr(candidates, "CANDIDATES", {"rope": {"rotate": dict(TOKENS=(4, 8), num_warps=(4, 2))}})
    entry, more = Entry("rope", "rotate", "sm_90", "64", ()), {"HEADS": 4}
    tiles = [(8, 4), (4, 4), (4, 2), (8, 2)]
    want = [{"TOKENS": tokens, "HEADS": 4, "num_warps": warps} for tokens, warps in tiles]
    assert candidates.list_candidates(entry, entry.config(ROPE)) == want
    assert candidates.list_candidates(Entry("rope", "other", "sm_90", "64", ()), more) == [more]
    assert str(entry) == "rope.rotate sm_90 up to 64" and drop_source({"from": "x", "a": 1}) == {"a": 1}


def test_a_configuration_is_replaced_in_a_copy():
    entry = Entry("rope", "rotate", "sm_90", "64", ())
    new = candidates.replace_config(ROPE, entry, {"TOKENS": 1}, "me")
    assert new["rotate"]["sm_90"] == {"64": {"TOKENS": 1, "from": "me"}, "512": {"TOKENS": 4}}
    assert entry.config(ROPE)["TOKENS"] == 8 and entry.config(ROPE)["from"] == "hand"
    assert entry.config(candidates.replace_config(ROPE, entry, {}))["from"] == "candidate"


def test_no_kernel_runs_while_entries_are_looked_for(monkeypatch):
    """A case reads entries of its own op; one that is read twice counts once, in the order of the cases."""

    def run(*args, **named):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    made, chips = [], []

    def reads(*sizes):
        def build(make):
            made.append(make)

            def launch():
                chips.append(common.chip_override)
                for size in sizes:
                    common.launch_table("rope")["rotate"]["sm_90"][size]
                assert JITFunction.run(1, x=2) is None and InterpretedFunction.run() is None

            return (launch,)

        return Case("rope", f"of {sizes}", build)

    cases = [reads("512", "512"), reads("64", "512"), reads()]
    asked = []
    monkeypatch.setattr(candidates, "all_cases", lambda ops: asked.append(ops) or cases)
    found = candidates.find_entries("rope", "sm_90", "a maker", ROPE)
    assert found == [Entry("rope", "rotate", "sm_90", "512", tuple(cases[:2])),
                     Entry("rope", "rotate", "sm_90", "64", (cases[1],))]  # fmt: skip
    assert asked == [["rope"]] and made == ["a maker"] * 3 and chips == ["sm_90"] * 3
    with pytest.raises(AssertionError, match="a kernel ran"):
        JITFunction.run()


@pytest.mark.parametrize("follows", [False, True])
def test_launches_that_use_the_entry_are_judged_table_by_table(follows, monkeypatch):
    """And those of the kernel that follows it. All are compiled at once."""
    op, kernel = ("attention", "forward") if follows else ("rope", "rotate")
    cases = (Case(op, "first", None), Case(op, "second", None))
    entry, compiled = Entry(op, kernel, "sm_90", "64", cases), []

    def record(case, chip, table):
        assert chip == "sm_90"
        names = [kernel, "dq", "other"]
        return [SimpleNamespace(entry=(op, name, chip, size), about=(table(op), case.label, name, size))
                for name in names for size in ("64", "512")]  # fmt: skip

    monkeypatch.setattr(candidates, "record_launches", record)
    monkeypatch.setattr(candidates, "compile_all", lambda launches, workers: compiled.append((launches, workers)) or [
        ("facts", x.about) for x in launches
    ])  # fmt: skip
    monkeypatch.setattr(candidates, "judge", lambda launch, facts: (launch.about, facts))
    trials = candidates.try_tables(entry, ["table 1", "table 2"], 5)
    names = [kernel, "dq"] if follows else [kernel]
    want = [[(table, case, name, "64") for case in ("first", "second") for name in names]
            for table in ("table 1", "table 2")]  # fmt: skip
    assert [[launch.about for launch, *_ in trial] for trial in trials] == want
    assert all(
        facts == ("facts", launch.about) and judged == (launch.about, facts)
        for t in trials
        for launch, facts, judged in t
    )
    ((launches, workers),) = compiled
    assert workers == 5 and [launch.about for launch in launches] == [*want[0], *want[1]]


def test_candidates_are_ranked_by_rules_and_bytes_in_flight(monkeypatch):
    """Of the launch that has fewest bytes and programs; registers are the most of any. What fails counts 0."""

    def facts(programs, registers, *streams):
        return SimpleNamespace(programs=programs, registers=registers, streams=[
            SimpleNamespace(elements=n, element_bytes=size, store=store) for n, size, store in streams
        ])  # fmt: skip

    def broken(*rules):
        return [SimpleNamespace(rule=rule) for rule in rules]

    trials = [
        [(1, facts(2, 40, (10, 2, False), (5, 4, False), (100, 4, True)), []), (2, facts(3, 90, (8, 4, False)), [])],
        [(1, facts(8, 20, (10, 2, False)), broken("wide", "spill")), (2, facts(8, 20, (99, 2, False)), broken("wide"))],
        [(1, facts(4, 60, (64, 2, False)), [])],
        [(1, "PTXASError: no", broken("compiles"))],
    ]
    tried = []
    monkeypatch.setattr(candidates, "programs_per_sm", lambda facts, chip: facts.programs * (chip == "sm_90"))
    monkeypatch.setattr(candidates, "list_candidates", lambda entry, config: [{"n": i} for i in range(4)])
    monkeypatch.setattr(candidates, "try_tables", lambda *args: tried.append(args) or trials)
    entry = Entry("rope", "rotate", "sm_90", "64", ())
    assert candidates.rank_candidates(entry, ROPE, 3) == [
        (0, -512, {"n": 2}, 60, 4, ""), (0, -80, {"n": 0}, 90, 2, ""), (1, 0, {"n": 3}, 0, 0, "compiles"),
        (2, -160, {"n": 1}, 20, 8, "spill, wide"),
    ]  # fmt: skip
    ((of, tables, workers),) = tried
    assert of is entry and workers == 3 and [entry.config(table)["n"] for table in tables] == [0, 1, 2, 3]


def test_a_written_table_is_read_again(tmp_path, monkeypatch):
    """A reader finds the old one or the whole new one."""
    cleared = []
    monkeypatch.setattr(common, "launch_table", SimpleNamespace(cache_clear=lambda: cleared.append(1)))
    candidates.write_launch_table("rope", ROPE, tmp_path / "deep")
    text = (tmp_path / "deep" / "rope.json").read_text()
    assert cleared == [1] and text == (
        '{\n  "rotate": {\n    "sm_90": {\n      "64": {"TOKENS": 8, "HEADS": 4, "num_warps": 4, "from": "hand"},\n'
        '      "512": {"TOKENS": 4}\n    }\n  }\n}\n'
    )
