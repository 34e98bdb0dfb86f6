"""Entries of the launch tables, the tuner's candidates, and tables on disk."""

import json

from kernels.compiled.launch_cases import Make, all_cases
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
