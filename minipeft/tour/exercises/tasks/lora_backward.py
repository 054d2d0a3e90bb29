"""LoRA's derivative.

    y_i = x W_i^T + b_i + c_i s_i B_i^T,   s_i = drop(x) A_i^T          c = scale / keep, drop(x) = mask * x

    dS_i = c_i dY_i B_i                    dB_i = c_i dY_i^T s_i
    dA_i = dS_i^T drop(x)                  dX = sum_i dY_i W_i + mask * (sum_i dS_i A_i)

Source: Hu et al. 2021, eq. 3, and the chain rule. The factor 1 / keep of dropout is part of c
(`compute_scale(part, drop)`), so that the mask holds zeros and ones only.

Given: x [M, K]; s [M, R], the s_i of all parts side by side (`split(s, parts)` cuts it); `dys`, one dY_i [M, N_i] a
part; `drop`, None or the seed of a mask: `_make_mask(drop, x, slice(a, b))` gives rows a ... b of it, the same each
time. Return `Gradients(dx, [dA_i], [dB_i])`; dx is None unless `needs_dx`, and dA, dB are float32 (float64 for a
float64 x). A and B may be wider than x: cast them to x.dtype. `linear` is F.linear; nothing is lost if you ignore it.
"""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.adapters.lora import Part
from minipeft.tour.exercises.judging import require, require_close, require_dtype
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft_kernels.reference.backward",
    hints=(
        "One part without dropout first: four products, in the order dS, dB, dX, dA. Check each shape.",
        "With dropout: masked = x * _make_mask(drop, x, slice(0, len(x))), and the same mask on dS A.",
        "dX: start with dY_0 W_0, add the dY_i W_i of the others, then mask * (dS_i A_i) for each.",
        "wide = torch.promote_types(x.dtype, torch.float32) is the dtype of dA and dB.",
    ),
)


def make_problem(M: int, K: int, sizes: list[tuple[int, int]], dtype: torch.dtype) -> tuple[Tensor, list[Part]]:
    """x and a part for each (N, r)."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    return draw(M, K), [Part(draw(n, K), draw(n), draw(r, K), draw(n, r), 0.5 + n) for n, r in sizes]


def compare(backward: Answer, M: int, K: int, sizes: list[tuple[int, int]], dropout: float, needs_dx: bool) -> None:
    """Compare with float64 autograd of the equation."""
    x, parts = make_problem(M, K, sizes, torch.float64)
    drop, mask, keep = draw_mask(dropout, M, K)
    leaves = [x.requires_grad_(), *(t.requires_grad_() for p in parts for t in (p.lora_A, p.lora_B))]
    ss = [(x * mask) @ p.lora_A.t() for p in parts]
    ys = [x @ p.weight.t() + p.bias + p.scale / keep * s @ p.lora_B.t() for p, s in zip(parts, ss)]
    dys = [torch.randn_like(y) for y in ys]
    dx, *rest = torch.autograd.grad(ys, leaves, dys)
    with torch.no_grad():
        mine = backward(x, torch.cat(ss, dim=1), dys, parts, drop, needs_dx)
    require(len(mine.dA) == len(mine.dB) == len(parts), "one dA and one dB for each part")
    for i in range(len(parts)):
        require_close(mine.dA[i], rest[2 * i], f"dA of part {i}", 1e-9)
        require_close(mine.dB[i], rest[2 * i + 1], f"dB of part {i}", 1e-9)
    if needs_dx:
        require_close(mine.dx, dx, "dx", 1e-9)
    else:
        require(mine.dx is None, "dx is not asked for: it must be None")


def draw_mask(dropout: float, M: int, K: int) -> tuple[object, Tensor, float]:
    """The seed of a mask, the mask [M, K], and the probability of an entry to be kept."""
    hashed = import_module("minipeft_kernels.dropout")
    drop = hashed.make_dropout(dropout, 3)
    mask = torch.ones(M, K) if drop is None else hashed.make_keep_mask(drop, M, K).double()
    return drop, mask, 1.0 if drop is None else drop.keep


def check_one_part(backward: Answer) -> None:
    """One part without dropout: dA, dB and dx are those of float64 autograd."""
    compare(backward, 7, 5, [(4, 2)], 0.0, True)


def check_parts(backward: Answer) -> None:
    """Three parts that share x: dx is the sum over the parts."""
    compare(backward, 7, 5, [(4, 2), (6, 3), (3, 1)], 0.0, True)


def check_dropout(backward: Answer) -> None:
    """With dropout, the mask is on x for dA, on the update's part of dx, and 1 / keep is in the scale."""
    compare(backward, 9, 6, [(4, 2), (5, 2)], 0.3, True)


def check_many_rows(backward: Answer) -> None:
    """600 rows of 512: the mask of each row is that row's own."""
    compare(backward, 600, 512, [(8, 2)], 0.5, True)


def check_without_dx(backward: Answer) -> None:
    """Where dx is not needed it is None, with and without dropout."""
    compare(backward, 7, 5, [(4, 2), (3, 2)], 0.0, False)
    compare(backward, 7, 5, [(4, 2)], 0.3, False)


def check_dtypes(backward: Answer) -> None:
    """With a bfloat16 x and float32 A, B: dA and dB are float32, dx is bfloat16, and all are near the exact ones."""
    x, parts = make_problem(16, 8, [(4, 2)], torch.bfloat16)
    wide = [Part(p.weight, p.bias, p.lora_A.float(), p.lora_B.float(), p.scale) for p in parts]
    s, dy = F.linear(x, parts[0].lora_A), torch.randn(16, 4).bfloat16()
    mine = backward(x, s, [dy], wide, None, True)
    exact = parts[0].scale * dy.double().t() @ s.double()
    require_dtype(mine.dA[0], torch.float32, "dA")
    require_dtype(mine.dB[0], torch.float32, "dB")
    require_dtype(mine.dx, torch.bfloat16, "dx")
    require_close(mine.dB[0], exact, "dB in bfloat16", 0.02)
