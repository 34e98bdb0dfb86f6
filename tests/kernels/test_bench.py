"""The command kernels.bench at toy size."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from kernels import bench


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "b.json"
    bench.main([
        "--smoke", "--op", "swiglu", "norm_linear", "--no-peers", "--json", str(out), "--plot", str(tmp_path)
    ])  # fmt: skip
    result = json.loads(out.read_text())
    assert {r["op"] for r in result["records"]} == {"swiglu", "norm_linear"}
    assert all(r["ms"] > 0 and r["min"] <= r["q1"] <= r["ms"] <= r["q3"] <= r["max"] for r in result["records"])
    assert {r["who"] for r in result["records"]} == {"ours", "torch eager"}
    said = capsys.readouterr().out
    assert torch.cuda.is_available() or "No GPU" in said
    assert " right\n" in said and " ran\n" in said and "GB/s" not in said and " ms " not in said  # a toy has no speed
    assert {path.name for path in tmp_path.glob("*.png")} == {"swiglu.png", "norm_linear.png", "roofline.png"}


@pytest.mark.parametrize("has_matplotlib", [True, False])
def test_what_cannot_be_drawn_ends_with_one_line(has_matplotlib, tmp_path, monkeypatch):
    if has_matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    wanted = "nothing was timed, so there is nothing to draw" if has_matplotlib else "pip install matplotlib"
    with pytest.raises(SystemExit, match=wanted):
        bench.main(["--smoke", "--op", "swiglu", "--no-peers", "--minutes", "0", "--plot", str(tmp_path / "plots")])
    assert not (tmp_path / "plots").exists()


def test_an_unknown_op_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--op", "softmax"])
    assert ended.value.code == 2 and "rms_norm" in capsys.readouterr().err


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_every_flag_reaches_the_benchmark(gpu, smoke, monkeypatch):
    given, ran = [], []

    class Stand:
        def __init__(self, *args, is_toy):
            self.result = {}
            given.append((*args, is_toy))

        def run_case(self, case, peers=True):
            ran.append((case, peers))

    cases = {size: [SimpleNamespace(op=op, size=size) for op in ("rope", "swiglu")] for size in ("full", "toy")}
    monkeypatch.setattr(bench, "GPU", gpu)
    monkeypatch.setattr(bench, "full_cases", lambda: cases["full"])
    monkeypatch.setattr(bench, "toy_cases", lambda: cases["toy"])
    monkeypatch.setattr(bench, "Benchmark", Stand)
    monkeypatch.setattr(bench, "format_summary", lambda result: "")
    monkeypatch.setattr(bench, "free_memory", lambda: None)
    flags = ["--op", "swiglu", "--json", "x", "--minutes", "2.5", "--repeats", "9", *(["--smoke"] if smoke else [])]
    bench.main([*flags, "--no-peers"])
    bench.main(flags)
    repeats = 1 if smoke else 9 if gpu else 5
    assert given == [("x", 2.5, repeats, smoke or not gpu)] * 2
    size = "full" if gpu and not smoke else "toy"
    assert ran == [(cases[size][1], False), (cases[size][1], True)]


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_run_is_printed_freed_and_drawn(interpreted, monkeypatch, capsys):
    """Memory is given back after each case; the plots are of the run's result."""
    log = []

    class Stand:
        result = "the result"

        def __init__(self, *args, is_toy):
            pass

        def run_case(self, case, peers=True):
            log.append(case.op)

    from kernels.measure import plot

    monkeypatch.setattr(bench, "GPU", False)
    monkeypatch.setattr(bench, "INTERPRETED", interpreted)
    monkeypatch.setattr(bench, "toy_cases", lambda: [SimpleNamespace(op=op) for op in ("rope", "swiglu")])
    monkeypatch.setattr(bench, "Benchmark", Stand)
    monkeypatch.setattr(bench, "free_memory", lambda: log.append("freed"))
    monkeypatch.setattr(bench, "format_summary", lambda result: f"summary of {result}")
    monkeypatch.setattr(plot, "draw", lambda result, folder: log.append((result, folder)) or ["a.png", "b.png"])
    bench.main(["--plot", "there"])
    assert log == ["rope", "freed", "swiglu", "freed", ("the result", "there")]
    kernels = "the kernels in Triton's interpreter" if interpreted else "no kernels (TRITON_INTERPRET=1 adds them)"
    assert capsys.readouterr().out.splitlines() == [
        f"No GPU: the references and {kernels}, at toy sizes, which say nothing of speed.", "summary of the result",
        "drew a.png", "drew b.png",
    ]  # fmt: skip
