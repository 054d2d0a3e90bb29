"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, "DoRA", eq. 5).

    W' = m * V / ||V||,    V = W + s B A        one trained length m and one direction for each row of W

m starts as ||W||, so at first nothing changes. The norm is a constant to the gradient, as in the paper's section 4.3.
In a forward pass V itself is never formed: with g = m / ||V||, one number a row,

    y = g * (x W^T + s (dropout(x) A^T) B^T) + b

and the norm comes from products with r columns only; the sum W + s B A, as large as W, is not needed:

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>        row by row; <.,.> sums over r
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # rows of W that are widened to float32 at a time


@torch.no_grad()
def row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + s B A|| of each row, in float32. W [out, in], A [r, in], B [out, r] -> [out]"""
    A, B = A.float(), B.float()
    gram = A @ A.t()  # [r, r]
    squares = []
    for rows, b in zip(weight.split(BLOCK), B.split(BLOCK)):
        rows = rows.float()  # [n, in]; no copy where W is float32
        own = torch.linalg.vector_norm(rows, dim=1).square()  # [n]
        cross = ((rows @ A.t()) * b).sum(dim=1)  # [n]
        added = ((b @ gram) * b).sum(dim=1)  # [n]
        squares.append(own + 2 * scale * cross + scale**2 * added)
    return torch.cat(squares).clamp(min=0).sqrt()  # [out]
