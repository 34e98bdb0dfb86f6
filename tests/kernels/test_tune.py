"""The command kernels.tune: the flow at toy size in the interpreter, the ranking by machine code, and refusals."""

import sys
from pathlib import Path
from types import SimpleNamespace

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


# ---- what is printed, and what reaches the tuner --------------------------------------------------------------------


def test_ops_are_those_named_in_the_order_of_all():
    every = tune.select_ops([])
    assert every == sorted({case.op for case in all_cases()}) and len(every) > 5
    assert tune.select_ops(["swiglu", "adamw"]) == ["adamw", "swiglu"]
    with pytest.raises(SystemExit) as end:
        tune.select_ops(["swiglu", "zoo", "bar"])
    assert end.value.code == f"kernels.tune: no cases for bar, zoo; there are {', '.join(every)}"


@pytest.mark.parametrize("smoke", [False, True])
def test_a_tuner_is_given_what_was_asked_for(smoke, monkeypatch, capsys, tmp_path):
    """Bars count the entries of this chip; what was not reached is told."""
    made, tuned, bars = [], [], []

    class Tuner:
        def __init__(self, *args):
            made.append(args)
            self.show = args[3]

        def tune(self, op, write, advance):
            self.show(f"[of] {op}")
            write(op, {"of": op})
            advance()
            tuned.append(op)
            return [f"{op}.kernel"] * (op == "rope")

    class Progress(tune.Progress):
        def add_task(self, description, total):
            bars.append((description, total))
            return super().add_task(description, total=total)

        def update(self, task, description):
            bars.append(description)

        def advance(self, task):
            bars.append("one more")

    written = []
    monkeypatch.setattr(tune, "Tuner", Tuner)
    monkeypatch.setattr(tune, "Progress", Progress)
    monkeypatch.setattr(tune.common, "chip", lambda device: f"chip of {device.type}")
    table = {"a": {"chip of cuda": {"64": 1, "512": 2}, "other": {"64": 1}}, "b": {"chip of cpu": {"64": 1}}}
    monkeypatch.setattr(tune.common, "launch_table", lambda op: table)
    monkeypatch.setattr(tune, "write_launch_table", lambda op, table, folder: written.append((op, table, folder)))
    tune.tune(["rope", "swiglu"], 2.5, smoke, None if smoke else tmp_path, 7)
    device = "cpu" if smoke else "cuda"
    ((*given, show, toy, workers),) = made
    assert given == [device, f"chip of {device}", 2.5] and (toy, workers) == (smoke, 7) and callable(show)
    assert tuned == ["rope", "swiglu"] and written == ([] if smoke else [(op, {"of": op}, tmp_path) for op in tuned])
    of = f"chip of {device}"
    assert bars == [
        (f"tuning {of}", 2 if smoke else 4),
        f"tuning rope {of}",
        "one more",
        f"tuning swiglu {of}",
        "one more",
    ]
    said = capsys.readouterr().err
    assert "[of] rope\n" in said and "rope.kernel: not reached in 2.5 minutes, left as it was\n" in said


def test_ranks_are_printed_with_the_incumbent_marked(monkeypatch, capsys):
    def ranked(in_flight, config, registers, programs, rules=""):
        return SimpleNamespace(
            minus_bytes_in_flight=-in_flight, config=config, registers=registers, programs=programs, rules=rules
        )

    class Entry:
        cases = (SimpleNamespace(label="D=64"), SimpleNamespace(label="D=128"))

        def __init__(self, *about):
            self.about = about

        def config(self, table):
            return {"ROWS": 2, "from": "hand"}

        def __str__(self):
            return f"{self.about[0]}.k {self.about[1]} up to 64"

    asked = []
    monkeypatch.setattr(tune.common, "launch_table", lambda op: f"table of {op}")
    monkeypatch.setattr(
        tune, "find_entries", lambda op, chip, make, table: asked.append((table, make.device.type)) or [Entry(op, chip)]
    )
    rows = [
        ranked(98304, {"ROWS": 4}, 64, 12),
        ranked(512, {"ROWS": 2}, 8, 2),
        ranked(0, {"ROWS": 1}, 255, 1, "spill, wide"),
    ]
    monkeypatch.setattr(
        tune, "rank_candidates", lambda entry, table, workers: asked.append((entry.about, table, workers)) or rows
    )
    tune.print_ranks(["rope"], ["sm_80", "sm_90"], 5)
    first, second = ((("table of rope", "meta"), (("rope", chip), "table of rope", 5)) for chip in ("sm_80", "sm_90"))
    assert asked == [*first, *second]
    block = [
        "rope.k {} up to 64, by D=64, D=128", "       96.0 KB in flight, 12 programs an SM,  64 registers  {'ROWS': 4}",
        "  *     0.5 KB in flight,  2 programs an SM,   8 registers  {'ROWS': 2}",
        "        0.0 KB in flight,  1 programs an SM, 255 registers  {'ROWS': 1}  refused: spill, wide",
    ]  # fmt: skip
    said = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert said == [line.replace("{}", chip) for chip in ("sm_80", "sm_90") for line in block]


@pytest.mark.parametrize(("cores", "workers"), [(None, 2), (2, 2), (16, 14)])
def test_all_cores_but_two_compile(cores, workers, monkeypatch):
    given = []
    monkeypatch.setattr(tune.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(tune, "print_ranks", lambda *args: given.append(args))
    monkeypatch.setattr(sys, "argv", ["tune", "--static", "--op", "rope", "--chip", "sm_90"])
    tune.main()
    assert given == [(["rope"], ["sm_90"], workers)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "tune", lambda *args: given.append(args))
    monkeypatch.setattr(sys, "argv", ["tune"])
    tune.main()
    assert given[1] == (tune.select_ops([]), 10, False, common.LAUNCH, workers)
