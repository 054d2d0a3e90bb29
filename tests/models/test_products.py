"""The product with a base weight, against float64."""

import torch

from minipeft.models.products import linear


def test_linear_is_x_times_w_transposed_plus_the_bias():
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((2, 5, 8), (3, 8), (3,)))
    exact = x.double() @ weight.double().T
    assert torch.allclose(linear(x, weight).double(), exact, atol=1e-5)
    assert torch.allclose(linear(x, weight, bias).double(), exact + bias.double(), atol=1e-5)
