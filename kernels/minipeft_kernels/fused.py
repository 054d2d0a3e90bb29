"""The fused backend: the large product accumulates onto the rank-r product, so y and dX are written once, never read.

forward   s = drop(x) A^T                          one pass over x for all projections
          y = x W^T + b + s B^T                    one product, in Triton
backward  dS, dB                                   one pass over each dY
          dA = dS^T drop(x)                        one pass over x
          dX = drop(dS A) + dY_q W_q + dY_k W_k    one product for up to three projections, in Triton
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch
from .dropout import Dropout
from .hybrid import compute_small_gradients, make_unit_stride
from .reference import Gradients, NF4Weight, Part, add_matmul_weight, compute_scale, split, stack_A

AT_ONCE = 3  # projections that one product for dX sums over (q, k and v)


def forward(x: Tensor, parts: Sequence[Part], drop: Dropout | None) -> tuple[list[Tensor], Tensor]:
    """Return each projection's y [M, N_i], and s [M, R]. x is [M, K]."""
    x = make_unit_stride(x)
    s = launch.shrink(x, stack_A(parts, x.dtype), drop)  # [M, R]
    ys = [
        launch.seeded_forward(x, weight, p.bias, s_i, p.lora_B.to(x.dtype), compute_scale(p, drop))  # [M, N]
        for p, weight, s_i in zip(parts, get_weights(parts, x.dtype), split(s, parts))
    ]
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
    weights = get_weights(parts[:AT_ONCE], x.dtype)
    dx = launch.seeded_backward(dys[:AT_ONCE], weights, dS, stack_A(parts, x.dtype), drop)  # [M, K]
    for dy, part in zip(dys[AT_ONCE:], parts[AT_ONCE:]):
        add_matmul_weight(dx, dy, part)  # [M, K]: torch adds a fourth projection
    return Gradients(dx, dA, dB)


def get_weights(parts: Sequence[Part], dtype: torch.dtype) -> list[Tensor] | list[NF4Weight]:
    """Return the frozen weights, plain or all in NF4, whose tiles the kernels dequantize in registers."""
    packed = [found for p in parts if (found := p.nf4()) is not None]
    return packed if len(packed) == len(parts) else [p.dense(dtype) for p in parts]
