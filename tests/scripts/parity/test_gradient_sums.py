"""The sums of a weight's gradient, in fp32 and rounded one by one, and the error that is told of them."""

import pytest
import torch

from scripts.parity import gradient_sums
from scripts.parity.gradient_sums import Sums, relative_error


def test_one_sum_is_exact_and_the_other_rounded_at_each_addition():
    sums, weight = Sums(), object()
    parts = [(torch.randn(5, 3).bfloat16(), torch.randn(5, 4).bfloat16()) for _ in range(3)]
    exact, rounded = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bfloat16)
    for dy, x in parts:
        sums.add(weight, dy, x)
        exact += dy.T.float() @ x.float()
        rounded += (dy.T.float() @ x.float()).bfloat16()
    assert torch.equal(sums.fp32[weight], exact) and sums.fp32[weight].dtype == torch.float32
    assert torch.equal(sums.rounded[weight], rounded) and rounded.dtype == sums.rounded[weight].dtype


def test_an_error_is_a_relative_l2_norm_over_all_matrices():
    truth = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    found = [torch.tensor([3.3]), torch.tensor([0.0, 4.4])]
    assert relative_error(found, truth) == pytest.approx(0.1) and relative_error(truth, truth) == 0


@pytest.mark.parametrize("name", ["linear", "norm_linear", "swiglu"])
def test_what_is_watched_is_the_product_that_training_adds(name, monkeypatch):
    module = __import__(f"kernels.ops.{name}", fromlist=[name])
    monkeypatch.setattr(module, "weight_gradient", lambda dy, x, into: "what it returns")
    for other in {"linear", "norm_linear", "swiglu"} - {name}:
        of_other = __import__(f"kernels.ops.{other}", fromlist=[other])
        monkeypatch.setattr(of_other, "weight_gradient", of_other.weight_gradient)
    sums, weight, dy, x = [Sums()], object(), torch.randn(5, 3), torch.randn(5, 4)
    gradient_sums.watch_products(sums)
    assert module.weight_gradient(dy, x, weight) == "what it returns"
    assert torch.equal(sums[0].fp32[weight], dy.T @ x)
