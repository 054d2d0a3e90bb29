"""PiSSA: LoRA that starts from the largest singular values of the weight (Meng et al. 2024, eq. 2-4).

    W = U S V^T;    A0 = sqrt(S_r / s) V_r^T,   B0 = U_r sqrt(S_r / s)      r largest of S, s = alpha / r
    y = x (W - s B0 A0)^T + s (x A^T) B^T                                 A, B start as A0, B0: a no-op at first

The paper puts the residual W - s B0 A0 in the place of W. Here W keeps its bytes, and the residual is a second, frozen
pair in the same product; it is what makes a file that any reader of plain LoRA understands, of rank 2r:

    s B A - s B0 A0 = s [B, -B0] [A ; A0]
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r] with s B0 A0 the best approximation of W of this rank, in float32."""
    U, S, Vt = torch.linalg.svd(weight.float(), full_matrices=False)  # [out, k], [k], [k, in]
    root = (S[:rank] / scale).sqrt()  # [r]
    return root[:, None] * Vt[:rank], U[:, :rank] * root  # [r, in], [out, r]
