"""The launches, bytes and instructions of a step, against those counted by hand for a toy."""

import json
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from scripts.step import launches
from scripts.step.rows import TOY
from tests.helpers.calls import Calls
from tests.helpers.compiler import run_compiler


def test_a_toys_step_counted_by_hand(tmp_path, snapshot):
    path = tmp_path / "launches.json"
    path.write_text(json.dumps({"records": {"before": {}}}))
    command = ("--smoke", "--tokens", "384", "--instructions", "--json", path, "--label", "now")
    done = run_compiler("scripts.step.launches", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(path.read_text())["records"]
    assert set(records) == {"before", "now"}
    kinds = records["now"]["kinds"]
    assert kinds["norms"]["launches"] == 3 * (2 * TOY.n_layers + 1)  # forward, backward, the sum of dw
    # Forward: four matrices a layer, the last one's first in two parts. Backward: dx and dw of each. The head: three.
    assert kinds["GEMM"]["launches"] == 3 * (4 * TOY.n_layers + 1) + 3
    assert kinds["optimizer"]["launches"] >= 1 and kinds["swiglu"]["launches"] == 2 * TOY.n_layers
    assert kinds["cross entropy"]["instructions"] > 0 and kinds["GEMM"]["instructions"] == 0
    # What is printed and kept of our own kernels, without the instructions, which are the compiler's. What torch
    # launches besides differs between its versions.
    ours = {kind for kind in kinds if kind not in ("copies and fills", "embedding", "other")}
    lines = [re.sub(r"^(.{38}) +\d+\.\d{3}$", r"\1", line) for line in done.stdout.splitlines()]
    table = [line for line in lines if line.startswith(("kind ", "  cria::", *ours)) and "new_zeros" not in line]
    variant = records["now"]["variant"]
    assert (variant["tokens"], variant["model"], records["now"]["chip"]) == (384, "llama-7b", "sm_90")
    told = [f"{name}: {kinds[name]['launches']} launches, {kinds[name]['bytes']} bytes" for name in sorted(ours)]
    assert "\n".join(table + told) == snapshot
    total = records["now"]["all"]
    assert total == {name: sum(kind[name] for kind in kinds.values()) for name in total}


@pytest.mark.parametrize("is_written", [False, True])
def test_what_a_table_reaches_counts_once_and_other_tensors_beside_it(is_written):
    """Without storage all tensors have one address, so it does not tell them apart."""
    first, second, table, partial = (torch.empty(n, device="meta") for n in (10, 20, 4, 3))
    table.reached = [first, second]
    source = "g = tl.load(g_ptr + at); row = tl.load(row_ptr); tl.store(partial_ptr, tl.load( partial_ptr) + g)"
    function = SimpleNamespace(
        arg_names=["g_ptr", "row_ptr", "partial_ptr", "n"], src=source, fn=SimpleNamespace(__module__="m", __name__="k")
    )
    counts = launches.StepCounts()
    watch = launches.Watch(counts)
    watch.within, watch.written = ["cria::op"], {launches.storage_of(second)} if is_written else set()
    for _ in range(2):
        watch.count_triton(function, first, table, partial, 5, grid=(2,), warmup=False)
    n_bytes = 4 * (10 + 20 * (1 + is_written) + 4 + 3 * 2)  # partial is loaded and stored
    assert (counts.total().launches, counts.total().bytes) == (2, 2 * n_bytes)
    assert counts.names == {"cria::op: k": 2} and [call.times for call in counts.calls.values()] == [2]
    watch.count_triton(function, first, table, partial, 5, grid=(3,), warmup=False)
    assert [call.times for call in counts.calls.values()] == [2, 1]


def test_torchs_operators_count_what_they_read_and_write():
    """A view launches nothing; a filled tensor is not read, and of a gathered one as much as is written."""
    counts = launches.StepCounts()
    x, index = torch.empty(100, 4, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    with launches.Watch(counts) as watch:
        watch.within = ["cria::op"]
        x.view(4, 100).t()
        assert counts.total().launches == 0
        x + x
        assert (counts.total().launches, counts.total().bytes) == (1, 3 * 1600)
        x[:, :1].zero_()
        assert counts.total().bytes == 3 * 1600 + 400
        x.index_select(0, index)
        assert counts.total().bytes == 3 * 1600 + 400 + 2 * 48


def test_a_product_onto_another_matrix_copies_it_first():
    """One that is added to a row, to a matrix of its output, or in place copies nothing."""
    a, b, c, row = (torch.empty(*shape, device="meta") for shape in ((2, 3), (3, 4), (2, 4), (4,)))
    counts = launches.StepCounts()
    with launches.Watch(counts):
        torch.addmm(c, a, b)
    assert counts.names == {"aten::addmm: Memcpy DtoD": 1, "aten::addmm: addmm": 1}
    assert counts.kinds["copies and fills"].bytes == 2 * 32 and counts.kinds["GEMM"].bytes == 4 * (6 + 12 + 8 + 8)
    with launches.Watch(counts):
        torch.addmm(row, a, b)
        c.addmm_(a, b)
    assert counts.names["aten::addmm: Memcpy DtoD"] == 1 and counts.total().launches == 4


def test_what_is_filled_is_not_read():
    counts = launches.StepCounts()
    x = torch.empty(10, device="meta")
    with launches.Watch(counts):
        torch.zeros_like(x)
        x.fill_(1.0)
    assert counts.total().bytes == 2 * 40 and counts.total().launches == 2


@pytest.mark.parametrize("has_lists", [False, True])
def test_instructions_are_of_all_programs_of_each_launch(has_lists, monkeypatch):
    """Of a sample, unless a list of the host gives each program its work. Memory of the device is made anew."""
    ran, ended = [], SimpleNamespace(findings=[], counters={"instructions": 300}, kernel="k")

    def run_launch(launch, grid, chip, simulated, options):
        ran.append((launch, grid, chip, simulated, options))
        return ended

    monkeypatch.setattr(launches, "run_launch", run_launch)
    counts = launches.StepCounts()
    table = torch.empty(3)
    if not has_lists:
        table.reached = []
    arguments = (torch.empty(4, 2, device="meta").t(), 5, table)
    counts.calls = {
        i: launches.Call("f", arguments, {"o": 1}, grid, "rope", times)
        for i, (grid, times) in enumerate([((20, 3), 2), ((4, 1), 1)])
    }
    launches.count_instructions(counts, "sm_80")
    grids = [(20, 3), (4, 1)] if has_lists else [(8, 3), (4, 1)]
    assert [grid for _, grid, *_ in ran] == grids
    assert counts.kinds["rope"].instructions == (600 if has_lists else 1500) + 300
    (function, given, options), _, chip, simulated, how = ran[0]
    assert (function, options, chip, simulated, how) == ("f", {"o": 1}, "sm_80", None, launches.Options(check=False))
    assert given[1:] == (5, table) and (given[0].shape, given[0].stride()) == ((2, 4), (1, 2))
    assert given[0].device.type == "cpu"
    ended.findings = ["it reads outside"]
    with pytest.raises(RuntimeError, match="k: it reads outside"):
        launches.count_instructions(counts, "sm_80")


@pytest.mark.parametrize("one_row", [True, False])
def test_a_batch_without_storage_keeps_the_plans_of_the_real_one(one_row, monkeypatch):
    rows = torch.tensor([3, 5, 6]) if one_row else torch.tensor([3, 3, 6])
    batch = SimpleNamespace(
        tokens=torch.arange(9), positions=torch.arange(9), targets=torch.arange(3), weights=torch.ones(3),
        loss_rows=rows, documents="documents",
    )  # fmt: skip
    planned = []
    model = SimpleNamespace(plan_attention=lambda *given: planned.append(given) or "plans")
    found = launches.put_on_meta(model, batch)
    ((documents, n, device, unique),) = planned
    assert (documents, n, device.type, unique.tolist()) == ("documents", 9, "cpu", rows.unique().tolist())
    fields = list(vars(found).values())
    assert fields[-1] == "plans" and all(t.is_meta for t in fields[:4])
    assert [len(t) for t in fields[:5]] == [9, 9, 3, 3, len(rows.unique())]
    assert (fields[5] is None) == one_row


def test_each_flag_reaches_the_count_and_the_record(monkeypatch, tmp_path, capsys):
    calls, counts = Calls(), launches.StepCounts()
    counts.add("mm", ["aten::mm"], 5 * 10**9)
    counts.add("nvjet", ["cria::x", "aten::mm"], 10**9)
    counts.add("a", ["cria::rope_rotate"], 7 * 10**9)
    monkeypatch.setattr(launches, "count_step", calls.stand_in("count_step", counts))
    monkeypatch.setattr(launches, "count_instructions", calls.stand_in("count_instructions"))
    monkeypatch.setattr(launches.Variant, "label", property(lambda v: f"{v.model} {v.tokens}"), raising=False)
    monkeypatch.setattr(launches.StepCounts, "label", "counts", raising=False)
    launches.main([])
    launches.main(["--variant", "tinyllama-1.1b", "--tokens", "99", "--chip", "sm_80", "--instructions", "--smoke",
                   "--json", str(tmp_path / "x.json"), "--label", "a label"])  # fmt: skip
    assert calls.lines == [
        "count_step(llama-7b 8320, 'sm_90', False)", "count_step(tinyllama-1.1b 99, 'sm_80', True)",
        "count_instructions(counts, 'sm_80')",
    ]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    n = len(counts.kinds) + 5
    assert lines[:3] == [
        "kind                 launches       GB  G instructions",
        "rope                        1     7.00           0.000",
        "GEMM                        2     6.00           0.000",
    ]  # fmt: skip
    assert lines[n - 4 : n] == ["all                         3    13.00           0.000", "  aten::mm: mm 1",
                                "  cria::x: nvjet 1", "  cria::rope_rotate: a 1"]  # fmt: skip
    launches.save_record(tmp_path / "x.json", "another label", {})
    found = json.loads((tmp_path / "x.json").read_text())
    assert list(found["records"]) == ["a label", "another label"]
    one = lambda n, n_bytes: {"launches": n, "bytes": n_bytes, "instructions": 0}  # noqa: E731
    record = found["records"]["a label"]
    assert found["what"] == "scripts.step.launches" and record["chip"] == "sm_80"
    assert record["variant"] == asdict(replace(launches.VARIANTS["tinyllama-1.1b"], tokens=99))
    assert record["all"] == one(3, 13 * 10**9)
    assert record["kinds"] == {"GEMM": one(2, 6 * 10**9), "rope": one(1, 7 * 10**9)}
