"""The product x W^T with a base weight; a quantized weight brings its own (quantized.py)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. x [..., in], weight [out, in], bias [out] -> [..., out]"""
    return F.linear(x, weight, bias)
