"""Merge VeRA into the weight.

    y = x W^T + bias + b * ((d * (x A^T)) B^T)          A [r, in] and B [out, r] frozen; b [out], d [r] trained
    W' = W + diag(b) B diag(d) A

Source: Kopiczko et al. 2024, "VeRA", eq. 2. `merged(self)` is a method of VeRALinear: `self.weight` [out, in],
`self.bias` [out] or None, `self.vera_lambda_b` is b, `self.vera_lambda_d` is d, and `self.matrices()` returns this
linear's A and B. Return W' and the bias (or None), both in float32, whatever the dtype of the base. Nothing of the
layer may change.
"""

from __future__ import annotations

import torch
from torch import nn

from minipeft.adapters.vera import Projection, VeRAConfig, VeRALinear
from minipeft.tour.exercises.judging import require, require_close, require_dtype
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.adapters.vera.VeRALinear.merged",
    hints=(
        "diag(b) M multiplies the rows of M: b[:, None] * M. diag(d) A multiplies the rows of A by d.",
        "B diag(d) multiplies the columns of B: B * d.",
        "weight.float() + b[:, None] * ((B * d) @ A)",
    ),
)


def make_layer(dtype: torch.dtype, bias: bool = True) -> VeRALinear:
    """A layer of 6 inputs and 5 outputs beside a wider one, with trained scales."""
    torch.manual_seed(0)
    config = VeRAConfig(rank=3)
    projection = Projection(8, 9, config, torch.device("cpu"))
    layer = VeRALinear(nn.Linear(6, 5, bias=bias).to(dtype), projection, config)
    with torch.no_grad():
        layer.vera_lambda_b.copy_(torch.randn(5))
        layer.vera_lambda_d.copy_(torch.randn(3))
    return layer.eval()


def check_entries(merged: Answer) -> None:
    """W' equals the sum over r in loops, in float64."""
    layer = make_layer(torch.float32)
    A, B = (t.tolist() for t in layer.matrices())
    b, d = layer.vera_lambda_b.tolist(), layer.vera_lambda_d.tolist()
    expected = layer.weight.detach().double().clone()
    for o in range(5):
        for i in range(6):
            expected[o, i] += sum(b[o] * B[o][r] * d[r] * A[r][i] for r in range(3))
    require_close(merged(layer)[0], expected, "W'", 1e-6)


def check_same_output(merged: Answer) -> None:
    """A plain linear with W' and the bias computes what the layer computes."""
    for bias in (True, False):
        layer, x = make_layer(torch.float32, bias), torch.randn(3, 6)
        with torch.no_grad():
            weight, own = merged(layer)
            require((own is None) == (not bias), "the bias is None exactly where the layer has none")
            require_close(nn.functional.linear(x, weight, own), layer(x), "the output of the merged linear", 1e-5)


def check_float32(merged: Answer) -> None:
    """With a bfloat16 base W' and the bias are float32, and W' is not rounded to bfloat16."""
    layer = make_layer(torch.bfloat16)
    before = layer.weight.detach().clone()
    weight, bias = merged(layer)
    require_dtype(weight, torch.float32, "W'")
    require_dtype(bias, torch.float32, "the bias")
    A, B = layer.matrices()
    b, d = layer.vera_lambda_b.double(), layer.vera_lambda_d.double()
    require_close(weight, before.double() + b[:, None] * (B.double() * d) @ A.double(), "W'", 1e-6)
    require_close(layer.weight, before, "the layer's weight afterwards", 0)
