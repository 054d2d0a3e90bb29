"""The reference backend: the LoRA linear and its derivative in plain torch, on any device (Hu et al. 2021, eq. 3).

    y_i = x W_i^T + b_i + scale_i s_i B_i^T,    s_i = drop(x) A_i^T        for each projection i that shares x

    dS_i = scale_i dY_i B_i                     dB_i = scale_i dY_i^T s_i
    dA_i = dS_i^T drop(x)                       dX = sum_i dY_i W_i + drop(sum_i dS_i A_i)

drop(x) = mask * x / keep; in the code 1 / keep is part of the scale, and drop is a mask of zeros and ones. The other
backends are tested against this file: read it before them. Of size [M, K] or [M, N], only x itself is kept for
backward: dB needs s, dA needs x, and the mask is a hash. The s of all projections stand side by side, [M, R].

The frozen weight is used only in `matmul_weight_t` (x W^T + b), `matmul_weight` and `add_matmul_weight` (dY W), and in
`Part.dense` and `Part.nf4`: a weight in another format changes these.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import SMALL_MASK, Dropout, make_keep_mask, make_small_mask
from .rows import RowGroups, add_grouped, get_owner, group_rows

MASK_BLOCK = 1 << 18  # entries of x masked at a time on a CPU: the hashes of one block fit the L2 cache


class NF4Weight(NamedTuple):
    """A frozen weight [N, K] in 4 bits, as the Triton products read it: w = table[code] * absmax of its block of 64."""

    codes: Tensor  # uint8 [N K / 2], the code of an even column in the high half
    absmax: Tensor  # float32 [ceil(N K / 64)]
    table: Tensor  # float32 [16]


class Part(NamedTuple):
    """One projection of a shared x: the frozen linear and the two trained low-rank matrices."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    scale: float  # alpha / r

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the frozen weight as a plain tensor of this dtype. [N, K]"""
        return (self.weight if is_plain(self.weight) else self.weight.dequantize()).to(dtype)

    def nf4(self) -> NF4Weight | None:
        """Return the codes and scales of a weight in NF4, or None: a weight that has them says so by a method `nf4`."""
        read = getattr(self.weight, "nf4", None)
        found = None if read is None else read()
        return None if found is None else NF4Weight(*found)


def is_plain(weight: object) -> bool:
    """Whether a weight is a tensor of values; one in another format brings its own products, by torch's dispatch."""
    return type(weight) in (Tensor, torch.nn.Parameter)


class Gradients(NamedTuple):
    """The gradients that a backend's backward returns; the caller adds dW and db where the base is trained too."""

    dx: Tensor | None  # [M, K]
    dA: list[Tensor]  # [r, K] each
    dB: list[Tensor]  # [N, r] each


def matmul_weight_t(x: Tensor, part: Part) -> Tensor:
    """x W^T + b. x [M, K]"""
    return F.linear(x, part.weight, part.bias)  # [M, N]


def matmul_weight(dy: Tensor, part: Part) -> Tensor:
    """dY W. dy [M, N]"""
    return F.linear(dy, part.weight.t())  # [M, K]


def add_matmul_weight(dx: Tensor, dy: Tensor, part: Part) -> Tensor:
    """dX + dY W, in place. dx [M, K], dy [M, N]"""
    return dx.addmm_(dy, part.weight)  # [M, K]


def forward(x: Tensor, parts: Sequence[Part], drop: Dropout | None) -> tuple[list[Tensor], Tensor]:
    """Return each projection's y [M, N_i], and s [M, R], which backward needs. x is [M, K].

    The scale is the `alpha` of addmm_, applied to its float32 sum: no extra pass and no rounding.
    """
    s = shrink(x, stack_A(parts, x.dtype), drop)  # [M, R]
    ys = []
    for part, s_i in zip(parts, split(s, parts)):
        y = matmul_weight_t(x, part)  # [M, N]
        y.addmm_(s_i, cast(part.lora_B, x.dtype).t(), alpha=compute_scale(part, drop))  # [M, N]
        ys.append(y)
    return ys, s


def backward(
    x: Tensor, s: Tensor, dys: Sequence[Tensor], parts: Sequence[Part], drop: Dropout | None, needs_dx: bool
) -> Gradients:
    """Return dx (None unless needs_dx), and each projection's dA and dB in float32 (float64 for float64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dS = torch.empty_like(s)  # [M, R]
    dB = []
    for p, dy, s_i, dS_i in zip(parts, dys, split(s, parts), split(dS, parts)):
        dS_i.addmm_(dy, cast(p.lora_B, x.dtype), beta=0, alpha=compute_scale(p, drop))  # [M, r]
        dB.append(cast(dy.t() @ s_i, wide).mul_(compute_scale(p, drop)))  # [N, r]
    dx = None
    if needs_dx:
        dx = matmul_weight(dys[0], parts[0])  # [M, K]
        for part, dy in zip(parts[1:], dys[1:]):
            add_matmul_weight(dx, dy, part)  # [M, K]
    A = stack_A(parts, x.dtype)  # [R, K]
    if drop is not None:
        dA = _backward_dropped(x, dS, A, drop, dx, wide)  # [R, K]
    else:
        dA = cast(dS.t() @ x, wide)  # [R, K]
        if dx is not None:
            dx.addmm_(dS, A)  # [M, K]
    return Gradients(dx, list(split(dA, parts, dim=0)), dB)


def _backward_dropped(x: Tensor, dS: Tensor, A: Tensor, drop: Dropout, dx: Tensor | None, wide: torch.dtype) -> Tensor:
    """Return dA = dS^T drop(x) [R, K], and add drop(dS A) to dx [M, K] in place; x [M, K], dS [M, R]."""
    if _is_small(x):
        mask = make_small_mask(drop, *x.shape, x.dtype)  # [M, K]
        if dx is not None:
            dx.addcmul_(dS @ A, mask)  # [M, K]
        return cast(dS.t() @ (x * mask), wide)  # [R, K]
    dA = torch.zeros(A.shape, dtype=wide, device=x.device)  # [R, K]
    for block in _split_rows(x):
        mask = _make_mask(drop, x, block)  # [m, K]: for both products
        dA += dS[block].t() @ (x[block] * mask)  # [R, K]
        if dx is not None:
            dx[block].addcmul_(dS[block] @ A, mask)  # [m, K]
    return dA


def trace(x: Tensor, parts: Sequence[Part], dropout: float, seed: int | None) -> list[Tensor]:
    """The equation in operators that torch.compile traces and differentiates: y [..., N] of each projection.

    The mask is drawn by torch, so that dropout differs from the same call without the compiler.

    Raises:
        ValueError: a seed, which belongs to the hash.
    """
    if dropout and seed is not None:
        raise ValueError(f"seed={seed!r} cannot be honoured within torch.compile: seed torch's generator")
    dropped = F.dropout(x, dropout) if dropout else x  # [..., K]
    updates = [F.linear(F.linear(dropped, p.lora_A.to(x.dtype)), p.lora_B.to(x.dtype)) for p in parts]  # [..., N] each
    return [F.linear(x, p.weight, p.bias) + p.scale * update for p, update in zip(parts, updates)]  # [..., N] each


def forward_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    owner: Tensor | RowGroups,
    scales: Tensor | None,
) -> Tensor:
    """Return x W^T + b plus the update of each row's own adapter. x is [B, T, K], y [B, T, N].

    Owner -1 means no adapter. On a CPU the rows are grouped (rows.py). On other devices A and B are gathered for each
    row, which needs no synchronization; a row without an adapter takes adapter 0 with scale 0.
    """
    y = matmul_weight_t(x, Part(weight, bias, A, B, 1.0))  # [B, T, N]
    if x.device.type == "cpu":
        groups = owner if isinstance(owner, RowGroups) else group_rows(owner.tolist())
        return add_grouped(y, x, A, B, groups, scales)
    owner = get_owner(owner)  # [B]
    mine = owner.clamp(min=0)  # [B]
    scale = torch.where(owner < 0, 0.0, 1.0 if scales is None else scales.float()[mine]).to(x.dtype)  # [B]
    s = torch.bmm(x, A[mine].to(x.dtype).mT) * scale[:, None, None]  # [B, T, r]
    return y.baddbmm_(s, B[mine].to(x.dtype).mT)  # [B, T, N]


def split(t: Tensor, parts: Sequence[Part], dim: int = 1) -> tuple[Tensor, ...]:
    """Split what is concatenated along the ranks into views of each projection: s into [M, r_i], dim 0: A into
    [r_i, K]."""
    return (t,) if len(parts) == 1 else t.split([p.lora_A.shape[0] for p in parts], dim=dim)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype); the comparison costs less than a call of torch that returns t."""
    return t if t.dtype == dtype else t.to(dtype)


def compute_scale(part: Part, drop: Dropout | None) -> float:
    """Return the factor of the rank-r product: alpha / r, divided by the exact keep probability."""
    return part.scale if drop is None else part.scale / drop.keep


def stack_A(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """Concatenate all A in the dtype of the product, so that x is read once for all projections."""
    stack = [cast(p.lora_A, dtype) for p in parts]  # [r, K] each
    return stack[0] if len(stack) == 1 else torch.cat(stack)  # [R, K]


def shrink(x: Tensor, A: Tensor, drop: Dropout | None) -> Tensor:
    """s = drop(x) A^T; with dropout, in blocks of rows."""
    if drop is None:
        return F.linear(x, A)  # [M, R]
    if _is_small(x):
        return F.linear(x * make_small_mask(drop, *x.shape, x.dtype), A)  # [M, R]
    parts = [F.linear(_make_mask(drop, x, block).mul_(x[block]), A) for block in _split_rows(x)]  # [m, R] each
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # [M, R]


def _is_small(x: Tensor) -> bool:
    """Whether the mask is one of those that are computed once for forward and backward."""
    return 0 < x.numel() <= SMALL_MASK and x.is_cpu


def _make_mask(drop: Dropout, x: Tensor, block: slice) -> Tensor:
    """Return the mask of a block of rows, zeros and ones in the dtype of x."""
    return make_keep_mask(drop, block.stop - block.start, x.shape[1], x.device, block.start, x.dtype)  # [m, K]


def _split_rows(x: Tensor) -> Iterator[slice]:
    """Yield blocks of rows: the mask of 4096 x 4096 takes 21 ms in blocks that fit the cache, 129 ms in one (Zen 4)."""
    rows = max(1, MASK_BLOCK // max(1, x.shape[1])) if x.device.type == "cpu" else max(1, len(x))
    for first in range(0, max(1, len(x)), rows):
        yield slice(first, min(first + rows, len(x)))
