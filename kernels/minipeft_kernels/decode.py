"""The decode backend: few tokens, no gradient, one adapter for all or one for each row of the batch.

With M of 1 to 64 the base product is a stream of W through the memory, and the adapters are a stream of A and B: what
costs is the number of launches. This backend has two beyond the base product, whatever the number of adapters:

    s = x A[owner]^T           a program for each token and each quarter of K
    y += scale s B[owner]^T    a program for each token and 32 or 64 columns

The grids depend on shapes alone and the owners are read on the device, so a CUDA graph may hold the calls.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch, reference
from .dropout import Dropout
from .reference import Part
from .rows import RowGroups, owner_of

MOST_TOKENS = 64  # beyond, a product on tensor cores is better than a stream for each token


def forward(x: Tensor, parts: Sequence[Part], drop: Dropout | None) -> tuple[list[Tensor], Tensor]:
    """Return each projection's y [M, N_i]; there is no s to keep. x is [M, K]."""
    assert drop is None, "decode has no dropout"
    x = x.contiguous()
    ys = []
    for part in parts:
        y = reference.times_weight_t(x, part)  # [M, N]
        ys.append(launch.rows_add(y, x, part.lora_A[None], part.lora_B[None], None, None, part.scale))  # [M, N]
    return ys, x.new_empty(0)


def rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    owner: Tensor | RowGroups,
    scales: Tensor | None,
) -> Tensor:
    """Return x W^T + b, plus for each row the product with its own adapter. x is [B, T, K], y [B, T, N]."""
    if x.shape[0] * x.shape[1] > MOST_TOKENS:
        return reference.rows(x, weight, bias, A, B, owner, scales)
    x = x.contiguous()
    y = reference.times_weight_t(x, Part(weight, bias, A, B, 1.0))  # [B, T, N]
    scales = torch.ones(len(A), device=x.device) if scales is None else scales
    launch.rows_add(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), A, B, owner_of(owner), scales, 1.0)
    return y
