"""The product alone: what it is, and shapes that do not fit."""

import pytest
import torch
import torch.nn.functional as F

from kernels.ops.linear import linear


def test_it_is_torchs():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    torch.testing.assert_close(linear(x, weight, impl="ref"), F.linear(x, weight))


@pytest.mark.parametrize(("x", "weight"), [((4,), (5, 4)), ((2, 3, 4), (5, 4)), ((3, 4), (4,)), ((3, 4), (4, 5))])
def test_shapes_that_do_not_fit_are_refused(x, weight):
    with pytest.raises(ValueError, match=r"linear: x \(.*wanted \(T, N\), \(D, N\)"):
        linear(torch.zeros(x), torch.zeros(weight))
