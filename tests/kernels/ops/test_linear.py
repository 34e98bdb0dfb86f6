"""The product alone, shapes that do not fit, and what every op does whose weight's gradient is added where it is."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.ops.linear import linear
from tests.helpers.kernels import DEVICE, needs_kernels


def test_it_is_torchs():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    torch.testing.assert_close(linear(x, weight, impl="ref"), F.linear(x, weight))


@pytest.mark.parametrize(("x", "weight"), [((4,), (5, 4)), ((2, 3, 4), (5, 4)), ((3, 4), (4,)), ((3, 4), (4, 5))])
def test_shapes_that_do_not_fit_are_refused(x, weight):
    with pytest.raises(ValueError, match=r"linear: x \(.*wanted \(T, N\), \(D, N\)"):
        linear(torch.zeros(x), torch.zeros(weight))


def norm_linear_rows(x, weight, **more):
    y_rows, y, _ = kernels.norm_linear_rows(
        x, x.new_ones(16), weight, torch.tensor([1, 4, 6], device=DEVICE), 8, **more
    )
    return y_rows.square().sum() + y.square().sum()


ADDING = {
    "linear": lambda x, weight, **more: kernels.linear(x, weight, **more).square().sum(),
    "norm_linear": lambda x, weight, **more: kernels.norm_linear(x, x.new_ones(16), weight, **more)[0].square().sum(),
    "norm_linear_rows": norm_linear_rows,
    "swiglu_linear": lambda x, weight, **more: (
        kernels.swiglu_linear(torch.cat((x, x), 1), weight, **more).square().sum()
    ),
    "linear_cross_entropy": lambda x, weight, **more: kernels.linear_cross_entropy(
        x, weight, torch.arange(len(x), device=DEVICE), **more
    ),
}


@needs_kernels
@pytest.mark.parametrize("op", ADDING)
def test_a_weights_gradient_is_added_in_its_place_to_that_of_a_parameter_alone(op):
    x, made = torch.randn(7, 16, device=DEVICE), torch.randn(24, 16, device=DEVICE) / 4
    weight, expected = torch.nn.Parameter(made.clone()), torch.nn.Parameter(made.clone())
    for times in (1, 2, 3):
        place = weight.grad
        ADDING[op](x, weight, impl="triton", accumulate=True).backward()
        ADDING[op](x, expected, impl="ref").backward()
        assert place is None or weight.grad is place
        torch.testing.assert_close(weight.grad, expected.grad, msg=f"{times} times")
    with pytest.raises(ValueError, match=f"{op}: accumulate=True wants a parameter, weight is a view or a result"):
        ADDING[op](x, weight.view(24, 16), impl="triton", accumulate=True)
    frozen, x = torch.nn.Parameter(made.clone(), requires_grad=False), x.requires_grad_()
    ADDING[op](x, frozen, impl="triton", accumulate=True).backward()
    assert frozen.grad is None and x.grad.any()
