"""The command kernels.bench at toy size."""

import json

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


def test_what_was_not_timed_is_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing was timed, so there is nothing to draw"):
        bench.main(["--smoke", "--op", "swiglu", "--no-peers", "--minutes", "0", "--plot", str(tmp_path / "plots")])
    assert not (tmp_path / "plots").exists()


def test_an_unknown_op_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--op", "softmax"])
    assert ended.value.code == 2 and "rms_norm" in capsys.readouterr().err
