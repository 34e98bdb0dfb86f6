"""The launches, bytes and instructions of a step, against those counted by hand for a toy."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from scripts.step import launches
from scripts.step.rows import TOY
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
