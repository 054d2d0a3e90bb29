"""The LoRA linear, y = x W^T + b + scale (drop(x) A^T) B^T, as one differentiable function (Hu et al. 2021, eq. 3).

Read in this order: reference.py (the equations, forward and backward), dropout.py (a mask that is a hash), this file
(what autograd sees), choice.py (which path, and why), then tiles.py, device.py and launch.py (Triton). A and B may be
float32 over a bfloat16 base: they are cast to the dtype of x for the product, and their gradients are float32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import Call, backend_functions, choose_backend
from .dropout import Dropout, make_dropout
from .reference import Part
from .rows import RowGroups, owner_of


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = x weight^T + bias + scale * (drop(x) lora_A^T) lora_B^T.

    Shapes: x [..., K], weight [N, K], bias [N] or None, lora_A [r, K], lora_B [N, r]; y [..., N]. scale is alpha / r.
    dropout acts whenever it is not 0: leave it at 0 outside training. The mask is a hash of (seed, row of x, column);
    without a seed, one is drawn from torch's CPU generator.

    Raises: ValueError for shapes or dtypes that do not fit, UnavailablePath where a named path cannot run.
    """
    return lora_linears(x, [Part(weight, bias, lora_A, lora_B, scale)], dropout=dropout, seed=seed, backend=backend)[0]


def lora_linears(
    x: Tensor,
    projections: Sequence[Part | tuple[Tensor, Tensor | None, Tensor, Tensor, float]],
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Return lora_linear(x, *projection) for several that share x (q, k and v; gate and up), reading x once.

    The projections share one dropout mask too: equal to one call each with the same seed.
    """
    parts = [p if isinstance(p, Part) else Part(*p) for p in projections]
    if _autocast_is_on(x):
        return _under_autocast(x, parts, dropout, seed, backend)
    _check(x, parts)
    drop = make_dropout(dropout, seed)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *(t for part in parts for t in part[:4]))
    )
    chosen = _chosen(backend, x, parts, drop is not None, needs_grad)
    if needs_grad:
        flat = [t for part in parts for t in part[:4]]
        return list(_LoRALinears.apply(x, _Plan(chosen, tuple(p.scale for p in parts), drop), *flat))
    ys, _ = backend_functions(chosen).forward(x.reshape(-1, x.shape[-1]), parts, drop)  # [M, N] each
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]  # [..., N] each


def lora_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    rows: Tensor | RowGroups,
    scales: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """y[b] = x[b] weight^T + bias + scales[j] (x[b] A[j]^T) B[j]^T with j = rows[b]; j = -1 means no adapter.

    Many adapters on one base, one per row of the batch, for inference: nothing is recorded for backward. Shapes:
    x [rows, ..., K]; A [adapters, r, K] and B [adapters, N, r], adapters of a smaller rank padded with zeros; rows
    (int64, [rows]) and scales ([adapters], None: each 1) on x's device. Who calls many linears with the same rows makes
    their `RowGroups` once.

    Raises: ValueError for shapes that do not fit, UnavailablePath where a named path cannot run.
    """
    if _autocast_is_on(x):
        cast = _cast(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return lora_rows(*cast, A, B, rows, scales, backend=backend)
    owner = owner_of(rows)  # [B]
    if x.dim() < 2 or owner.shape != x.shape[:1]:
        raise ValueError(f"rows must name one adapter for each row of x: rows {tuple(owner.shape)}, x {tuple(x.shape)}")
    if A.dim() != 3 or B.shape != (A.shape[0], weight.shape[0], A.shape[1]) or A.shape[2] != weight.shape[1]:
        raise ValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} must be [adapters, r, {weight.shape[1]}] and "
            f"[adapters, {weight.shape[0]}, r]"
        )
    if scales is not None and scales.shape != A.shape[:1]:
        raise ValueError(f"scales {tuple(scales.shape)} must hold one number for each of the {A.shape[0]} adapters")
    with torch.no_grad():
        x3 = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, T, K]
        m, (_, r, k) = x3.shape[0] * x3.shape[1], A.shape
        call = Call(x.device, x.dtype, m, k, len(weight), r, dropout=False, needs_grad=False, grouped=True)
        y = backend_functions(choose_backend(backend, call)).rows(x3, weight, bias, A, B, rows, scales)  # [B, T, N]
        return y.view(*x.shape[:-1], y.shape[-1])  # [..., N]


class _Plan(NamedTuple):
    """What backward must know besides tensors."""

    backend: str
    scales: tuple[float, ...]
    drop: Dropout | None


class _LoRALinears(torch.autograd.Function):
    """All projections of one x. Kept for backward: x, which others may hold too, and s [M, R]; no mask, no copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *flat: Tensor | None) -> tuple[Tensor, ...]:
        parts = _parts(flat, plan.scales)
        ys, s = backend_functions(plan.backend).forward(
            x.reshape(-1, x.shape[-1]), parts, plan.drop
        )  # [M, N] each, [M, R]
        ctx.save_for_backward(x, s, *flat)
        ctx.plan = plan
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)  # [..., N] each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, s, *flat = ctx.saved_tensors
        parts = _parts(flat, ctx.plan.scales)
        x2 = x.reshape(-1, x.shape[-1])  # [M, K]
        dys2 = [dy.reshape(-1, dy.shape[-1]) for dy in dys]  # [M, N] each
        functions = backend_functions(ctx.plan.backend)
        dx, dA, dB = functions.backward(x2, s, dys2, parts, ctx.plan.drop, ctx.needs_input_grad[0])
        grads: list[Tensor | None] = [None if dx is None else dx.view(x.shape), None]
        for i, (part, dy) in enumerate(zip(parts, dys2)):
            needs_w, needs_b, needs_A, needs_B = ctx.needs_input_grad[2 + 4 * i : 6 + 4 * i]
            grads.append(dy.t() @ x2 if needs_w else None)  # [N, K]: only where the base is trained as well
            grads.append(dy.sum(0) if needs_b else None)  # [N]
            grads.append(dA[i].to(part.lora_A.dtype) if needs_A else None)  # [r, K]
            grads.append(dB[i].to(part.lora_B.dtype) if needs_B else None)  # [N, r]
        return tuple(grads)


def _parts(flat: Sequence[Tensor | None], scales: Sequence[float]) -> list[Part]:
    """Gather the flat list of tensors that autograd hands over into projections again."""
    fours = [flat[4 * i : 4 * i + 4] for i in range(len(scales))]
    return [Part(W, b, A, B, scale) for (W, b, A, B), scale in zip(fours, scales)]  # type: ignore[arg-type]


def _chosen(backend: str, x: Tensor, parts: Sequence[Part], dropout: bool, needs_grad: bool) -> str:
    """Return the path of a call; what "auto" is on a CPU is known without asking, which a lone token notices."""
    if backend == "reference" or (backend == "auto" and x.device.type != "cuda"):
        return "reference"
    m, k = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    n, r = sum(p.weight.shape[0] for p in parts), sum(p.lora_A.shape[0] for p in parts)
    return choose_backend(backend, Call(x.device, x.dtype, m, k, n, r, dropout, needs_grad))


def _autocast_is_on(x: Tensor) -> bool:
    """Return whether autocast is on where x is; torch refuses to say so of "meta" (shapes without data)."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _under_autocast(x: Tensor, parts: list[Part], dropout: float, seed: int | None, backend: str) -> list[Tensor]:
    """Cast x, weights and biases to autocast's dtype, as F.linear would, and compute with autocast off."""
    cast = [p._replace(weight=weight, bias=bias) for p in parts for _, weight, bias in [_cast(x, p.weight, p.bias)]]
    with torch.autocast(x.device.type, enabled=False):
        return lora_linears(_cast(x, x, None)[0], cast, dropout=dropout, seed=seed, backend=backend)


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x, weight and bias in autocast's dtype; float64 stays, as it does in torch's own linear."""
    if x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check(x: Tensor, parts: list[Part]) -> None:
    """Refuse, by name and shape, what does not fit together."""
    for weight, bias, A, B, _ in parts:
        (n, k), a, b = weight.shape, A.shape, B.shape
        if x.shape[-1] != k or a[1] != k or b[0] != n or a[0] != b[1]:
            raise ValueError(
                f"shapes do not fit: x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_A {tuple(A.shape)}, "
                f"lora_B {tuple(B.shape)}; they must be [..., K], [N, K], [r, K], [N, r]"
            )
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"bias {tuple(bias.shape)} must be [{n}], one number for each row of the weight")
        if x.dtype != weight.dtype:
            raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}: cast x, or use torch.autocast")
