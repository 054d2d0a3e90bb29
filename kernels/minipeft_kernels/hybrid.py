"""The hybrid backend: torch's big products, and one pass each over x and dY in Triton for the small ones.

    forward   s = drop(x) A^T              one pass over x, in Triton, for all projections
              y = x W^T + b; y += s B^T    torch (cuBLAS): its product cannot be entered, so y is read and written again
    backward  dS, dB                       one pass over dY, in Triton, where autograd makes two
              dX = dY W; dX += drop(dS A)  torch, or Triton's masked add where there is dropout
              dA = dS^T drop(x)            one pass over x, in Triton; the mask is made in registers

It wins over `fused` where reading y again is cheap: a long K, or a y that fits the L2 cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch
from .dropout import Dropout
from .reference import Gradients, Part, add_times_weight, factor, split, stack_A, times_weight, times_weight_t


def forward(x: Tensor, parts: Sequence[Part], drop: Dropout | None) -> tuple[list[Tensor], Tensor]:
    """Return each projection's y [M, N_i], and s [M, R]. x is [M, K]."""
    x = rows_of(x)
    s = launch.shrink(x, stack_A(parts, x.dtype), drop)  # [M, R]
    ys = []
    for part, s_i in zip(parts, split(s, parts)):
        y = times_weight_t(x, part)  # [M, N]
        ys.append(y.addmm_(s_i, part.lora_B.to(x.dtype).t(), alpha=factor(part, drop)))  # [M, N]
    return ys, s


def backward(
    x: Tensor, s: Tensor, dys: Sequence[Tensor], parts: Sequence[Part], drop: Dropout | None, needs_dx: bool
) -> Gradients:
    """Return dx (None where nobody asked), and each projection's dA and dB in float32."""
    x = rows_of(x)
    dys = [dy.contiguous() for dy in dys]
    dS, dA, dB = small_gradients(x, s, dys, parts, drop)
    if not needs_dx:
        return Gradients(None, dA, dB)
    dx = times_weight(dys[0], parts[0])  # [M, K]
    for part, dy in zip(parts[1:], dys[1:]):
        add_times_weight(dx, dy, part)  # [M, K]
    A = stack_A(parts, x.dtype)  # [R, K]
    dx = dx.addmm_(dS, A) if drop is None else launch.expand_add(dx, dS, A, drop)  # [M, K]
    return Gradients(dx, dA, dB)


def small_gradients(
    x: Tensor, s: Tensor, dys: Sequence[Tensor], parts: Sequence[Part], drop: Dropout | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return dS [M, R] in the dtype of x, and dA and dB: one pass over each dY, one over x."""
    dS = torch.empty_like(s)  # [M, R]
    dB = []
    for part, dy, s_i, dS_i in zip(parts, dys, split(s, parts), split(dS, parts)):
        dB.append(launch.gradient_B(dy, part.lora_B.to(x.dtype), s_i, factor(part, drop), dS_i))  # [N, r]
    dA = launch.gradient_A(x, dS, drop)  # [R, K]
    return dS, list(dA.split([p.lora_A.shape[0] for p in parts])), dB


def rows_of(x: Tensor) -> Tensor:
    """Return x with its columns side by side, as the kernels read it."""
    return x if x.stride(1) == 1 else x.contiguous()  # [M, K]
