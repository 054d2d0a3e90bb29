"""The reference backend: the LoRA linear and its derivative in plain torch, on any device (Hu et al. 2021, eq. 3).

    y_i = x W_i^T + b_i + scale_i s_i B_i^T,    s_i = drop(x) A_i^T        for each projection i that shares x

    dS_i = scale_i dY_i B_i                     dB_i = scale_i dY_i^T s_i
    dA_i = dS_i^T drop(x)                       dX = sum_i dY_i W_i + drop(sum_i dS_i A_i)

drop(x) = mask * x / keep; in the code 1 / keep is part of the scale, and drop is a mask of zeros and ones. The other
backends are tested against this file: read it before them. Of size [M, K] or [M, N], only x itself is kept for
backward: dB needs s, dA needs x, and the mask is a hash. The s of all projections stand side by side, [M, R].

The frozen weight enters in two places alone, `times_weight_t` (x W^T + b) and `times_weight` (dY W): a weight in
another format differs there, and in `Part.dense`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Dropout, keep_mask
from .rows import RowGroups, add_grouped, owner_of

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
MASK_BLOCK = 1 << 18  # entries of x that a CPU masks at a time: the hashes of one block fit a second-level cache


class Part(NamedTuple):
    """One projection of a shared x: the frozen linear, and the two low-rank matrices that are trained."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    scale: float  # alpha / r

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the frozen weight as a plain tensor of this dtype. [N, K]"""
        return self.weight.to(dtype)


class Gradients(NamedTuple):
    """What a backend's backward returns; dW and db, where the base is trained too, are formed by the caller."""

    dx: Tensor | None  # [M, K]
    dA: list[Tensor]  # [r, K] each
    dB: list[Tensor]  # [N, r] each


def times_weight_t(x: Tensor, part: Part, linear: Linear = F.linear) -> Tensor:
    """x W^T + b. x [M, K]"""
    return linear(x, part.weight, part.bias)  # [M, N]


def times_weight(dy: Tensor, part: Part, linear: Linear = F.linear) -> Tensor:
    """dY W. dy [M, N]"""
    return linear(dy, part.weight.t(), None)  # [M, K]


def add_times_weight(dx: Tensor, dy: Tensor, part: Part) -> Tensor:
    """dX + dY W, in place. dx [M, K], dy [M, N]"""
    return dx.addmm_(dy, part.weight)  # [M, K]


def forward(
    x: Tensor, parts: Sequence[Part], drop: Dropout | None, linear: Linear = F.linear
) -> tuple[list[Tensor], Tensor]:
    """Return each projection's y [M, N_i], and s [M, R], which backward needs. x is [M, K].

    The scale is the product's own factor (`alpha`), applied to its float32 sum: it costs neither a pass nor a rounding.
    """
    s = shrink(x, stack_A(parts, x.dtype), drop)  # [M, R]
    ys = []
    for part, s_i in zip(parts, split(s, parts)):
        y = times_weight_t(x, part, linear)  # [M, N]
        y.addmm_(s_i, part.lora_B.to(x.dtype).t(), alpha=factor(part, drop))  # [M, N]
        ys.append(y)
    return ys, s


def backward(
    x: Tensor,
    s: Tensor,
    dys: Sequence[Tensor],
    parts: Sequence[Part],
    drop: Dropout | None,
    needs_dx: bool,
    linear: Linear = F.linear,
) -> Gradients:
    """Return dx (None where nobody asked), and each projection's dA and dB in float32 (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dS = torch.empty_like(s)  # [M, R]
    for p, dy, dS_i in zip(parts, dys, split(dS, parts)):
        dS_i.addmm_(dy, p.lora_B.to(x.dtype), beta=0, alpha=factor(p, drop))  # [M, r]
    dB = [(dy.t() @ s_i).to(wide).mul_(factor(p, drop)) for p, dy, s_i in zip(parts, dys, split(s, parts))]  # [N, r]
    dx = None
    if needs_dx:
        dx = times_weight(dys[0], parts[0], linear)  # [M, K]
        for part, dy in zip(parts[1:], dys[1:]):
            add_times_weight(dx, dy, part)  # [M, K]
    A = stack_A(parts, x.dtype)  # [R, K]
    if drop is None:
        dA = (dS.t() @ x).to(wide)  # [R, K]
        if dx is not None:
            dx.addmm_(dS, A)  # [M, K]
    else:
        dA = torch.zeros(A.shape, dtype=wide, device=x.device)  # [R, K]
        for block in _blocks(x):
            mask = _mask(drop, x, block)  # [m, K]: made once for the two products that need it
            dA += dS[block].t() @ (x[block] * mask)  # [R, K]
            if dx is not None:
                dx[block].addcmul_(dS[block] @ A, mask)  # [m, K]
    return Gradients(dx, list(dA.split([p.lora_A.shape[0] for p in parts])), dB)


def rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    owner: Tensor | RowGroups,
    scales: Tensor | None,
) -> Tensor:
    """Return x W^T + b, plus for each row of the batch the product with its own adapter. x is [B, T, K], y [B, T, N].

    An owner of -1 means no adapter. A CPU groups the rows (rows.py). Elsewhere each row takes a copy of its adapter,
    which asks the device for nothing; a row without one borrows adapter 0 with scale 0.
    """
    y = times_weight_t(x, Part(weight, bias, A, B, 1.0))  # [B, T, N]
    if x.device.type == "cpu":
        groups = owner if isinstance(owner, RowGroups) else RowGroups.of(owner.tolist())
        return add_grouped(y, x, A, B, groups, scales)
    owner = owner_of(owner)  # [B]
    mine = owner.clamp(min=0)  # [B]
    scale = torch.where(owner < 0, 0.0, 1.0 if scales is None else scales.float()[mine]).to(x.dtype)  # [B]
    s = torch.bmm(x, A[mine].to(x.dtype).mT) * scale[:, None, None]  # [B, T, r]
    return y.baddbmm_(s, B[mine].to(x.dtype).mT)  # [B, T, N]


def split(s: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Cut columns that stand side by side back into the projections' own, [M, r_i] each, without a copy."""
    return (s,) if len(parts) == 1 else s.split([p.lora_A.shape[0] for p in parts], dim=1)  # [M, r] each


def factor(part: Part, drop: Dropout | None) -> float:
    """Return alpha / r over the exact keep probability: what multiplies the rank-r product."""
    return part.scale if drop is None else part.scale / drop.keep


def stack_A(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """Return all A above one another, in the dtype of the product: one read of x serves every projection."""
    stack = [p.lora_A.to(dtype) for p in parts]  # [r, K] each
    return stack[0] if len(stack) == 1 else torch.cat(stack)  # [R, K]


def shrink(x: Tensor, A: Tensor, drop: Dropout | None) -> Tensor:
    """s = drop(x) A^T, block by block where there is a mask to make."""
    if drop is None:
        return F.linear(x, A)  # [M, R]
    parts = [F.linear(_mask(drop, x, block).mul_(x[block]), A) for block in _blocks(x)]  # [m, R] each
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # [M, R]


def _mask(drop: Dropout, x: Tensor, block: slice) -> Tensor:
    """Return the mask of a block of rows as zeros and ones in the dtype of x."""
    return keep_mask(drop, block.stop - block.start, x.shape[1], x.device, block.start, x.dtype)  # [m, K]


def _blocks(x: Tensor) -> Iterator[slice]:
    """Yield blocks of rows: the mask of 4096 x 4096 takes 21 ms in blocks that fit a cache, 129 ms in one (Zen 4)."""
    rows = max(1, MASK_BLOCK // max(1, x.shape[1])) if x.device.type == "cpu" else max(1, len(x))
    for first in range(0, max(1, len(x)), rows):
        yield slice(first, min(first + rows, len(x)))
