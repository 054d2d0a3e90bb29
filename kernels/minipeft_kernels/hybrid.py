"""The hybrid backend: torch's large products, and one Triton pass each over x and dY for the rank-r products.

    forward   s = drop(x) A^T              one pass over x, in Triton, for all projections
              y = x W^T + b; y += s B^T    torch (cuBLAS): y is read and written once more
    backward  dS, dB                       one pass over dY, in Triton, where autograd makes two
              dX = dY W; dX += drop(dS A)  torch, or Triton's masked add where there is dropout
              dA = dS^T drop(x)            one pass over x, in Triton; the mask is made in registers

It is faster than `fused` where reading y again is cheap: for a large K, or a y that fits the L2 cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch
from .dropout import Dropout
from .reference import Gradients, Part, add_matmul_weight, compute_scale, matmul_weight, matmul_weight_t, split, stack_A


def forward(x: Tensor, parts: Sequence[Part], drop: Dropout | None) -> tuple[list[Tensor], Tensor]:
    """Return each projection's y [M, N_i], and s [M, R]. x is [M, K]."""
    x = make_unit_stride(x)
    s = launch.shrink(x, stack_A(parts, x.dtype), drop)  # [M, R]
    ys = []
    for part, s_i in zip(parts, split(s, parts)):
        y = matmul_weight_t(x, part)  # [M, N]
        ys.append(y.addmm_(s_i, part.lora_B.to(x.dtype).t(), alpha=compute_scale(part, drop)))  # [M, N]
    return ys, s


def backward(
    x: Tensor, s: Tensor, dys: Sequence[Tensor], parts: Sequence[Part], drop: Dropout | None, needs_dx: bool
) -> Gradients:
    """Return dx (None unless needs_dx), and each projection's dA and dB in float32."""
    x = make_unit_stride(x)
    dys = [dy.contiguous() for dy in dys]
    dS, dA, dB = compute_small_gradients(x, s, dys, parts, drop)
    if not needs_dx:
        return Gradients(None, dA, dB)
    dx = matmul_weight(dys[0], parts[0])  # [M, K]
    for part, dy in zip(parts[1:], dys[1:]):
        add_matmul_weight(dx, dy, part)  # [M, K]
    A = stack_A(parts, x.dtype)  # [R, K]
    dx = dx.addmm_(dS, A) if drop is None else launch.expand_add(dx, dS, A, drop)  # [M, K]
    return Gradients(dx, dA, dB)


def compute_small_gradients(
    x: Tensor, s: Tensor, dys: Sequence[Tensor], parts: Sequence[Part], drop: Dropout | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return dS [M, R] in the dtype of x, and dA and dB: one pass over each dY, one over x."""
    dS = torch.empty_like(s)  # [M, R]
    dB = []
    for part, dy, s_i, dS_i in zip(parts, dys, split(s, parts), split(dS, parts)):
        dB.append(launch.gradient_B(dy, part.lora_B.to(x.dtype), s_i, compute_scale(part, drop), dS_i))  # [N, r]
    dA = launch.gradient_A(x, dS, drop)  # [R, K]
    return dS, list(dA.split([p.lora_A.shape[0] for p in parts])), dB


def make_unit_stride(x: Tensor) -> Tensor:
    """Return x with a column stride of 1, which the kernels assume."""
    return x if x.stride(1) == 1 else x.contiguous()  # [M, K]
