"""Which product computes x W^T: the one door to a base weight, where other formats and kernels will differ."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. x [..., in], weight [out, in], bias [out] -> [..., out]"""
    return F.linear(x, weight, bias)
