"""The command kernels.tune: the flow at toy size in the interpreter, the ranking by machine code, and refusals."""

import sys
from pathlib import Path

import pytest
import torch

from kernels import tune
from kernels.compiled.launch_cases import all_cases
from kernels.ops import common
from tests.helpers.compiler import run_compiler
from tests.helpers.forks import Started


def tables():
    return {path.name: path.read_text() for path in common.LAUNCH.glob("*.json")}


@pytest.mark.timeout(3600)  # 20 s of work, which a busy machine may stretch
def test_smoke_goes_through_every_kernel_and_writes_nothing():
    before = tables()
    process = Started("from kernels import tune; tune.main()", "--smoke")
    _, said = process.communicate()
    assert process.returncode == 0, said[-3000:]
    for op in {case.op for case in all_cases()}:
        for kernel in common.launch_table(op):
            assert f"{op}.{kernel} interpreter" in said
    assert "failed" not in said and "not reached" not in said
    assert tables() == before


def ended(monkeypatch, interpreted):
    """Return the exit code or message of the command without arguments."""
    monkeypatch.setattr(common, "INTERPRETED", interpreted)
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit) as end:
        tune.main()
    return end.value.code


@pytest.mark.parametrize("out", ["launch", None])
def test_tables_go_into_the_folder_that_is_named(out, tmp_path, monkeypatch):
    class Tuner:
        def __init__(self, *_):
            pass

        def tune(self, op, write, advance):
            write(op, common.launch_table(op))
            return []

    monkeypatch.setattr(tune, "Tuner", Tuner)
    before = tables()
    tune.tune(["rope"], 1.0, True, out and tmp_path / out, 1)
    written = [path.name for path in tmp_path.glob("launch/*")]
    assert written == (["rope.json"] if out else []) and tables() == before


@pytest.mark.parametrize(
    ("flags", "interpreted", "out"),
    [([], False, common.LAUNCH), (["--out", "there"], False, Path("there")), (["--dry-run"], False, None),
     (["--dry-run", "--out", "there"], False, None), (["--smoke"], True, None),
     (["--smoke", "--out", "there"], True, None)],
)  # fmt: skip
def test_what_is_measured_is_written_unless_it_is_a_try(flags, interpreted, out, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common, "INTERPRETED", interpreted)
    monkeypatch.setattr(tune, "tune", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(sys, "argv", ["tune", "--op", "rope", "--minutes", "2.5", *flags])
    tune.main()
    assert [call[:4] for call in calls] == [(["rope"], 2.5, interpreted, out)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    assert ended(monkeypatch, interpreted=False) == 2
    assert "--static" in capsys.readouterr().err


def test_the_interpreter_is_for_smoke_alone(monkeypatch):
    assert "TRITON_INTERPRET" in ended(monkeypatch, interpreted=True)


@pytest.mark.timeout(3600)
def test_static_ranks_candidates_and_shows_refusals(tmp_path):
    code = (  # few candidates, as each is compiled for every case
        "from kernels import tune\nfrom kernels.measure import candidates\n"
        "candidates.CANDIDATES['rope'] = {'rotate': {'TOKENS': (8, 32), 'num_warps': (8,)}}\ntune.main()"
    )
    done = run_compiler("-c", code, "--static", "--op", "rope", "--chip", "sm_90")
    assert done.returncode == 0, done.stderr[-3000:]
    blocks = done.stdout.split("rope.rotate sm_90 up to ")[1:]
    assert len(blocks) == len(common.launch_table("rope")["rotate"]["sm_90"])
    for block in blocks:
        rows = [line for line in block.splitlines()[1:] if "KB in flight" in line]
        assert sum(line.lstrip().startswith("*") for line in rows) == 1  # the incumbent
        good = [float(line.replace("*", "").split()[0]) for line in rows if "refused" not in line]
        assert good == sorted(good, reverse=True) and good
        refused = ["refused" in line for line in rows]
        assert refused == sorted(refused)
    assert "refused: wide" in done.stdout  # a tile too small for 128 bits a thread
