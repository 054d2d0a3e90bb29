"""The LoRA linear, y = x W^T + b + scale (drop(x) A^T) B^T, as one differentiable function (Hu et al. 2021, eq. 3).

Read in this order: reference.py (the equations, forward and backward), dropout.py (a mask that is a hash), this file
(the autograd functions), choice.py (which backend, and why), then
tiles.py, triton_blocks.py, triton_kernels.py and launch.py (Triton).

    lora_linear             one projection; checks shapes and dtypes
    lora_linears            several projections of one x (q, k and v; gate and up), which is read once; checked likewise
    make_lora_linear(s)     the same for a layer: the backend is chosen before the first call, and a call checks nothing
    lora_rows               one adapter for each row of a batch, for inference

Within torch.compile all of them are the plain equation (reference.trace): the compiler fuses it and derives backward.

A and B may be float32 over a bfloat16 base: they are cast to the dtype of x for the product, and their gradients are
float32.
"""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .choice import Call, check_name, choose_backend, import_backend, is_always_reference
from .dropout import Dropout, make_dropout
from .reference import Part, cast, compute_scale, matmul_weight_t, shrink, trace
from .rows import RowGroups, get_owner


class LoRALinearFunction(torch.autograd.Function):
    """The equation for one projection, in plain torch. Saved for backward: x and s [M, r]; no mask, no copy of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        drop: Dropout | None,
    ) -> Tensor:
        """Return y [..., N]. ctx is None without gradients: `apply` costs as much as three small products."""
        part = Part(weight, bias, A, B, scale)
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # [M, K]
        low_A, low_B = (A, B) if A.dtype == B.dtype == x.dtype else (A.to(x.dtype), B.to(x.dtype))
        s = shrink(flat, low_A, drop)  # [M, r]
        y = matmul_weight_t(flat, part)  # [M, N]
        y.addmm_(s, low_B.t(), alpha=compute_scale(part, drop))  # [M, N]
        if ctx is not None:
            ctx.save_for_backward(x, s, weight, bias, A, B)
            ctx.scale, ctx.drop = scale, drop
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])  # [..., N]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (_differentiate_once if torch.is_grad_enabled() else _differentiate)(ctx, dy)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """LoRALinearFunction.backward without a graph of its own."""
    x, s, weight, bias, A, B = ctx.saved_tensors
    needs_x, needs_w, needs_b, needs_A, needs_B, *_ = ctx.needs_input_grad
    flat, dy = _flatten(x), _flatten(dy)  # [M, K], [M, N]
    part = Part(weight, bias, A, B, ctx.scale)
    dx, dA, dB = reference.backward(flat, s, [dy], [part], ctx.drop, needs_x)
    return (
        dx if dx is None or x.dim() == 2 else dx.view(x.shape),
        dy.t() @ flat if needs_w else None,  # [N, K]: only if the base is trained too
        dy.sum(0) if needs_b else None,  # [N]
        cast(dA[0], A.dtype) if needs_A else None,
        cast(dB[0], B.dtype) if needs_B else None,
        None,
        None,
    )


_differentiate_once = once_differentiable(_differentiate)  # for create_graph=True alone: its no_grad takes 7 us


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """lora_linear with backend="reference", without its checks: a mismatch raises torch's own error."""
    if torch.compiler.is_compiling():
        return trace(x, [Part(weight, bias, lora_A, lora_B, scale)], dropout, seed)[0]
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return lora_linear(x, weight, bias, lora_A, lora_B, scale, dropout, seed, backend="reference")
    drop = None if dropout == 0.0 else make_dropout(dropout, seed)
    if torch.is_grad_enabled():
        return LoRALinearFunction.apply(x, weight, bias, lora_A, lora_B, scale, drop)  # [..., N]
    return LoRALinearFunction.forward(None, x, weight, bias, lora_A, lora_B, scale, drop)  # [..., N]


def make_lora_linear(backend: str, device: torch.device) -> Callable[..., Tensor]:
    """Return the function of a layer: (x, weight, bias, lora_A, lora_B, scale, dropout=0.0, seed=None) -> y [..., N].

    This is `lora_linear_reference` if every call on the device takes the reference backend; else `lora_linear`, which
    chooses at each call, since the choice depends on the number of tokens. After a move to another device, call this
    again: an outdated choice gives the same results, but slower.

    Raises:
        ValueError: no backend has this name.
    """
    check_name(backend)
    if is_always_reference(backend, device.type):
        return lora_linear_reference
    return functools.partial(lora_linear, backend=backend)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """y = x weight^T + bias + scale * (drop(x) lora_A^T) lora_B^T.

    Shapes: x [..., K], weight [N, K], bias [N] or None, lora_A [r, K], lora_B [N, r]; y [..., N]. scale is alpha / r.
    dropout applies whenever it is not 0: pass 0 outside training. The mask is a hash of (seed, row of x, column);
    without a seed, one is drawn from torch's CPU generator.

    Raises:
        ValueError: shapes or dtypes do not fit, or the dropout cannot be honoured.
        UnavailableBackend: a named backend cannot run here.
    """
    return lora_linears(x, [Part(weight, bias, lora_A, lora_B, scale)], dropout=dropout, seed=seed, backend=backend)[0]


def lora_linears(
    x: Tensor,
    projections: Sequence[Part | tuple[Tensor, Tensor | None, Tensor, Tensor, float]],
    dropout: float = 0.0,
    seed: int | None = None,
    *,
    backend: str = "auto",
) -> Sequence[Tensor]:
    """Return lora_linear(x, *projection) for several projections of one x (q, k and v; gate and up), reading x once.

    They share one dropout mask too: the results equal those of separate calls with the same seed.
    """
    parts = [p if isinstance(p, Part) else Part(*p) for p in projections]
    if torch.compiler.is_compiling():
        return trace(x, parts, dropout, seed)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # torch has no answer for "meta"
        return _under_autocast(x, parts, dropout, seed, backend)
    _check(x, parts)
    drop = make_dropout(dropout, seed)
    tensors = [t for part in parts for t in part[:4]]
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    functions = import_backend(_choose(backend, x, parts, drop is not None, needs_grad))
    return _compute(functions, x, parts, drop, needs_grad)


def lora_linears_reference(
    x: Tensor, parts: Sequence[Part], dropout: float = 0.0, seed: int | None = None
) -> Sequence[Tensor]:
    """lora_linears with backend="reference", without its checks: a mismatch raises torch's own error."""
    if torch.compiler.is_compiling():
        return trace(x, parts, dropout, seed)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return lora_linears(x, parts, dropout=dropout, seed=seed, backend="reference")
    drop = None if dropout == 0.0 else make_dropout(dropout, seed)
    return _compute(reference, x, parts, drop, torch.is_grad_enabled())


def make_lora_linears(backend: str, device: torch.device) -> Callable[..., Sequence[Tensor]]:
    """Return the function for layers that share x: (x, parts, dropout=0.0, seed=None) -> y [..., N] of each.

    As make_lora_linear: `lora_linears_reference` if every call takes the reference backend, else `lora_linears`.

    Raises:
        ValueError: no backend has this name.
    """
    check_name(backend)
    if is_always_reference(backend, device.type):
        return lora_linears_reference
    return functools.partial(lora_linears, backend=backend)


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

    Many adapters on one base, one for each row of the batch, for inference: there is no gradient. Shapes:
    x [rows, ..., K]; A [adapters, r, K] and B [adapters, N, r], adapters of a smaller rank padded with zeros; rows
    (int64, [rows]) and scales ([adapters], None: each 1) on x's device. To call many linears with the same rows, make
    their `RowGroups` once (`group_rows`) and pass them.

    Raises:
        ValueError: shapes do not fit.
        UnavailableBackend: a named backend cannot run here.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        cast = _cast(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return lora_rows(*cast, A, B, rows, scales, backend=backend)
    owner = get_owner(rows)  # [B]
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
        y = import_backend(choose_backend(backend, call)).forward_rows(
            x3, weight, bias, A, B, rows, scales
        )  # [B, T, N]
        return y.view(*x.shape[:-1], y.shape[-1])  # [..., N]


class _Plan(NamedTuple):
    """What backward needs besides the tensors."""

    functions: ModuleType  # the backend's forward and backward
    scales: tuple[float, ...]
    drop: Dropout | None


class _LoRALinears(torch.autograd.Function):
    """All projections of one x, on any backend. Saved for backward: x and s [M, R]; no mask, no copy of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        parts = _gather_parts(tensors, plan.scales)
        ys, s = plan.functions.forward(_flatten(x), parts, plan.drop)  # [M, N] each, [M, R]
        ctx.save_for_backward(x, s, *tensors)
        ctx.plan = plan
        return tuple(_unflatten(ys, x))  # [..., N] each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, s, *tensors = ctx.saved_tensors
        plan, (needs_dx, _, *needs) = ctx.plan, ctx.needs_input_grad
        parts = _gather_parts(tensors, plan.scales)
        dx, *others = _compute_gradients(plan.functions, (needs_dx, *needs), x, s, dys, parts, plan.drop)
        return (dx, None, *others)


def _compute(
    functions: ModuleType, x: Tensor, parts: Sequence[Part], drop: Dropout | None, needs_grad: bool
) -> Sequence[Tensor]:
    """Return each projection's y [..., N] by a backend's functions, recorded for backward where `needs_grad`."""
    if needs_grad:
        plan = _Plan(functions, tuple(part.scale for part in parts), drop)
        return _LoRALinears.apply(x, plan, *(t for part in parts for t in part[:4]))
    return _unflatten(functions.forward(_flatten(x), parts, drop)[0], x)


def _flatten(x: Tensor) -> Tensor:
    """Return x [..., K] as a matrix."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # [M, K]


def _unflatten(ys: Sequence[Tensor], x: Tensor) -> Sequence[Tensor]:
    """Give each y [M, N] the leading dimensions of x."""
    return ys if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[1]) for y in ys]  # [..., N] each


def _compute_gradients(
    functions: ModuleType,
    needs: Sequence[bool],
    x: Tensor,
    s: Tensor,
    dys: Sequence[Tensor],
    parts: Sequence[Part],
    drop: Dropout | None,
) -> list[Tensor | None]:
    """Return dx, then dW, db, dA and dB of each projection: None where `needs`, in the same order, is false."""
    x2, dys = _flatten(x), [_flatten(dy) for dy in dys]  # [M, K], [M, N] each
    dx, dA, dB = functions.backward(x2, s, dys, parts, drop, needs[0])
    grads: list[Tensor | None] = [dx if dx is None or x.dim() == 2 else dx.view(x.shape)]
    for i, (part, dy) in enumerate(zip(parts, dys)):
        needs_w, needs_b, needs_A, needs_B = needs[1 + 4 * i : 5 + 4 * i]
        grads.append(dy.t() @ x2 if needs_w else None)  # [N, K]: only if the base is trained too
        grads.append(dy.sum(0) if needs_b else None)  # [N]
        grads.append(cast(dA[i], part.lora_A.dtype) if needs_A else None)  # [r, K]
        grads.append(cast(dB[i], part.lora_B.dtype) if needs_B else None)  # [N, r]
    return grads


def _gather_parts(tensors: Sequence[Tensor | None], scales: Sequence[float]) -> list[Part]:
    """Rebuild the projections from the flat list of tensors that autograd passes."""
    fours = [tensors[4 * i : 4 * i + 4] for i in range(len(scales))]
    return [Part(W, b, A, B, scale) for (W, b, A, B), scale in zip(fours, scales)]  # type: ignore[arg-type]


def _choose(backend: str, x: Tensor, parts: Sequence[Part], dropout: bool, needs_grad: bool) -> str:
    """Return the backend of a call; sizes are summed only where the choice depends on them."""
    if is_always_reference(backend, x.device.type):
        return "reference"
    m, k = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    n, r = sum(p.weight.shape[0] for p in parts), sum(p.lora_A.shape[0] for p in parts)
    return choose_backend(backend, Call(x.device, x.dtype, m, k, n, r, dropout, needs_grad))


def _under_autocast(x: Tensor, parts: list[Part], dropout: float, seed: int | None, backend: str) -> list[Tensor]:
    """Cast x, weights and biases to autocast's dtype, as F.linear would, and compute with autocast off."""
    cast = [p._replace(weight=weight, bias=bias) for p in parts for _, weight, bias in [_cast(x, p.weight, p.bias)]]
    with torch.autocast(x.device.type, enabled=False):
        return lora_linears(_cast(x, x, None)[0], cast, dropout=dropout, seed=seed, backend=backend)


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x, weight and bias in autocast's dtype; float64 is not cast, as in torch's own linear."""
    if x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check(x: Tensor, parts: list[Part]) -> None:
    """Raise ValueError for shapes or dtypes that do not fit together."""
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
