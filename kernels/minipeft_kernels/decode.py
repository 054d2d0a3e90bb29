"""The decode backend: few tokens, no gradient, one adapter for all or one for each row of the batch.

With M of 1 to 64 the products are bound by memory (W, A and B are read once), and the number of launches determines the
time. This backend makes two beyond the base product, for any number of adapters:

    s = x A[owner]^T           a program for each token and each quarter of K
    y += scale s B[owner]^T    a program for each token and 32 or 64 columns

The grids depend on shapes alone and the owners are read on the device, so the calls can be captured in a CUDA graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch, reference, tiles, triton_decode
from .dropout import Dropout
from .reference import Part
from .rows import RowGroups, get_owner

MOST_TOKENS = 64  # above this, a tensor-core product is faster than one program a token


def forward(x: Tensor, parts: Sequence[Part], drop: Dropout | None) -> tuple[list[Tensor], Tensor]:
    """Return each projection's y [M, N_i]; s is not needed. x is [M, K]."""
    assert drop is None, "decode has no dropout"
    x = x.contiguous()
    ys = []
    for part in parts:
        y = reference.matmul_weight_t(x, part)  # [M, N]
        ys.append(add_row_updates(y, x, part.lora_A[None], part.lora_B[None], None, None, part.scale))  # [M, N]
    return ys, x.new_empty(0)


def forward_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    owner: Tensor | RowGroups,
    scales: Tensor | None,
) -> Tensor:
    """Return x W^T + b plus the update of each row's own adapter. x is [B, T, K], y [B, T, N]."""
    if x.shape[0] * x.shape[1] > MOST_TOKENS:
        return reference.forward_rows(x, weight, bias, A, B, owner, scales)
    x = x.contiguous()
    y = reference.matmul_weight_t(x, Part(weight, bias, A, B, 1.0))  # [B, T, N]
    scales = torch.ones(len(A), device=x.device) if scales is None else scales
    add_row_updates(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), A, B, get_owner(owner), scales, 1.0)
    return y


def add_row_updates(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, owner: Tensor | None, scales: Tensor | None, factor: float
) -> Tensor:
    """y += scale x A[owner]^T B[owner]^T in place, for few tokens. y [M, N], x [M, K], A [adapters, R, K]."""
    (m, k), (_, n, r) = x.shape, B.shape
    split, block = tiles.ROWS_SPLIT, tiles.pad_rank(r)
    shrink, expand = tiles.ROWS_SHRINK[block], tiles.ROWS_EXPAND[block]
    tokens = m if owner is None else m // len(owner)
    s = x.new_empty(split, m, r, dtype=torch.float32)  # [4, M, R]
    first, scale = x if owner is None else owner, x if scales is None else scales  # x: unread
    shared = {"OWNED": owner is not None, "SPLIT": split, "BLOCK_R": block}
    shrinking = {"BLOCK_K": shrink.k, "num_warps": shrink.warps, "num_stages": shrink.stages}
    expanding = {"BLOCK_N": expand.n, **launch.get_settings(expand)}
    launch.launch_kernel(
        triton_decode.rows_shrink, (m, split),
        x, A, first, s, tokens, k, r, **shared, **shrinking,
    )  # fmt: skip
    launch.launch_kernel(
        triton_decode.rows_expand, (m, -(-n // expand.n)),
        y, s, B, first, scale, tokens, n, r, factor, **shared, **expanding,
    )  # fmt: skip
    return y
