"""The onednn backend: the reference with oneDNN's product for the frozen weight, on a CPU.

torch's float32 product is MKL's, which on some AMD processors has half the speed of oneDNN's. oneDNN comes with torch,
behind a private operator that torch.compile uses. Therefore this backend runs only where it is named: "auto" keeps
torch's own product, with which a new adapter (B = 0) gives the frozen linear's result bit for bit.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .dropout import Dropout
from .reference import Gradients, Part, is_plain

forward_rows = reference.forward_rows


def forward(x: Tensor, parts: Sequence[Part], drop: Dropout | None) -> tuple[list[Tensor], Tensor]:
    """reference.forward, with oneDNN's product."""
    return reference.forward(x, parts, drop, linear)


def backward(
    x: Tensor, s: Tensor, dys: Sequence[Tensor], parts: Sequence[Part], drop: Dropout | None, needs_dx: bool
) -> Gradients:
    """reference.backward, with oneDNN's product."""
    return reference.backward(x, s, dys, parts, drop, needs_dx, linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, by oneDNN; the weight may be a transposed view. A quantized weight has its own product."""
    if not is_plain(weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def is_usable(dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN multiplies this dtype correctly on this processor; tested once a process.

    bfloat16 needs AVX-512: on a processor without it the operator raises when it is called.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x, weight, bias = (torch.linspace(-1, 1, count).to(dtype) for count in (15, 20, 4))
    x, weight = x.view(3, 5), weight.view(4, 5)
    error = 8 * torch.finfo(dtype).eps
    for w, b in ((weight, bias), (weight.view(5, 4).t(), None)):
        try:
            y = linear(x, w, b)  # [3, 4]
        except RuntimeError:  # "could not create a primitive descriptor"
            return False
        if not torch.allclose(y.float(), F.linear(x, w, b).float(), rtol=error, atol=error):
            return False
    return True
