"""The command kernels.bench at toy size."""

import json

import pytest
import torch

from tests.helpers.run import command


def test_command(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "b.json"
    done = command(
        "kernels.bench", "--smoke", "--op", "swiglu", "norm_linear", "--no-peers", "--json", out, "--plot", tmp_path
    )
    result = json.loads(out.read_text())
    assert {r["op"] for r in result["records"]} == {"swiglu", "norm_linear"}
    assert all(r["ms"] > 0 and r["min"] <= r["q1"] <= r["ms"] <= r["q3"] <= r["max"] for r in result["records"])
    assert {r["who"] for r in result["records"]} == {"ours", "torch eager"}
    if not torch.cuda.is_available():
        assert "No GPU" in done.stdout
    assert {path.name for path in tmp_path.glob("*.png")} == {"swiglu.png", "norm_linear.png", "roofline.png"}
    assert command("kernels.bench", "--op", "softmax", check=False).returncode == 2
