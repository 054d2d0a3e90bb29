"""Attention for all decoder families, over the whole row or document by document.

    y = softmax(q k^T / sqrt(D) where visible) v        (Vaswani et al. 2017, eq. 1; who sees whom: documents.py)

The letters of all shape comments in minipeft:

    B rows of a batch     T tokens of a row (queries)    S key columns (cache + virtual tokens + tokens)
    C model width         H query heads                  K key/value heads (K < H: grouped queries, Ainslie et al. 2023)
    D width of a head     P virtual tokens               V vocabulary      L layers      r rank
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minipeft.models.layout import Layout, Runs, Spans
from minipeft.models.products import is_switched, multiply_with_mkl

# Within fast_products: up to FEW_COLUMNS key columns torch's fused product is faster with MKL than with oneDNN, and
# causal attention over a number of columns in BLOCKED is fastest in blocks of BLOCK queries (docs/performance.md).
FEW_COLUMNS, BLOCKED, BLOCK = 256, range(97, 769), 64


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    window: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T where visible within the window) v, heads merged; `scale` None is 1 / sqrt(D).

    With a cap the softmax is of cap * tanh(scores / cap) (Gemma 2).

    q [B, H, T, D], k and v [B, K, S, D] -> [B, T, H * D]
    """
    view = layout.views[window]
    if view.runs is not None:
        return attend_by_run(q, k, v, layout, view.runs, dropout, scale, cap)
    if view.spans is not None:
        return attend_by_row(q, k, v, view.spans, scale, cap)
    y = product(q, k, v, view.mask, view.mask is None, dropout, scale, cap)  # [B, H, T, D]
    return y.transpose(1, 2).flatten(2)  # [B, T, H * D]


def product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float | None,
    cap: float | None = None,
) -> Tensor:
    """torch's fused attention product; with a cap by hand, and in blocks where that is faster.

    q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D]; `causal` means S = T.
    """
    if q.is_meta:  # planning.py counts what a fused kernel saves; torch would run the unfused product here
        y: Tensor = ProductOnMeta.apply(q, k, v)
        return y
    if cap is not None:
        return capped_product(q, k, v, mask, causal, dropout, scale, cap)
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and lacks_masked_groups(q):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))  # [B, H, S, D]
        grouped = False
    plain = causal and not dropout and q.dtype == torch.float32 and q.device.type == "cpu"
    if plain and q.shape[2] in BLOCKED and is_switched():
        y = BlockCausalProduct.apply(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)
        return y

    def attend_fused() -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )

    return multiply_with_mkl(attend_fused) if k.shape[2] <= FEW_COLUMNS else attend_fused()


def capped_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float | None, cap: float
) -> Tensor:
    """Attention with scores cap * tanh(scores / cap) before the mask, which torch's fused product does not support."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))  # [B, H, S, D]
    scores = cap * torch.tanh(q @ k.transpose(2, 3) * (scale or q.shape[3] ** -0.5) / cap)  # [B, H, T, S]
    if causal:
        ahead = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)  # [T, S]
        scores = scores.masked_fill(ahead, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)  # [B, H, T, S]
    return F.dropout(weights, dropout) @ v if dropout else weights @ v  # [B, H, T, D]


class BlockCausalProduct(torch.autograd.Function):
    """Causal attention of BLOCK queries at a time, whose products see the columns up to the block's last alone.

        P = softmax(scale q k^T)     y = P v        dv += P^T dy     dS = P * (dy v^T - sum(dy * y))
                                                    dq = scale dS k    dk += scale dS^T q

    q [B, H, T, D], k and v [B, K, T, D] -> [B, H, T, D]. The H / K heads of a group are rows of one product. Kept for
    backward are q, k, v and y (Dao et al. 2022, algorithm 4).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        qs, ks, vs = group_heads(q, k), k.flatten(0, 1), v.flatten(0, 1)  # [B K, G, T, D], [B K, T, D] twice
        y = torch.empty_like(qs)
        for block in cut_blocks(q.shape[2]):
            p = causal_weights(qs, ks, scale, block)  # [B K, G n, end]
            y[:, :, block] = (p @ vs[:, : block.stop]).view_as(y[:, :, block])
        y = y.view(q.shape)
        ctx.save_for_backward(q, k, v, y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y = ctx.saved_tensors
        qs, ks, vs, dys = group_heads(q, k), k.flatten(0, 1), v.flatten(0, 1), group_heads(dy, k)
        sums = group_heads((dy * y).sum(-1, keepdim=True), k)  # [B K, G, T, 1]
        dq, dk, dv = torch.empty_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
        for block in cut_blocks(q.shape[2]):
            p, seen = causal_weights(qs, ks, ctx.scale, block), slice(block.stop)
            d = dys[:, :, block].flatten(1, 2)  # [B K, G n, D]
            dv[:, seen].baddbmm_(p.mT, d)
            ds = (d @ vs[:, seen].mT).sub_(sums[:, :, block].flatten(1, 2)).mul_(p)  # [B K, G n, end]
            dq[:, :, block] = (ds @ ks[:, seen]).view_as(dq[:, :, block])
            dk[:, seen].baddbmm_(ds.mT, qs[:, :, block].flatten(1, 2), alpha=ctx.scale)
        return dq.mul_(ctx.scale).view(q.shape), dk.view(k.shape), dv.view(v.shape), None


def group_heads(q: Tensor, k: Tensor) -> Tensor:
    """The query heads beside their key head. [B, H, T, D] -> [B K, H / K, T, D]"""
    return q.reshape(q.shape[0] * k.shape[1], -1, *q.shape[2:])


def cut_blocks(tokens: int) -> list[slice]:
    """Blocks of BLOCK tokens."""
    return [slice(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]


def causal_weights(qs: Tensor, ks: Tensor, scale: float, block: slice) -> Tensor:
    """softmax(scale q k^T) of a block of queries over the columns up to its last. [B K, G, T, D] -> [B K, G n, end]"""
    scores = (qs[:, :, block].flatten(1, 2) * scale) @ ks[:, : block.stop].mT  # [B K, G n, end]
    n = block.stop - block.start
    ahead = torch.full((n, n), -math.inf).triu_(1)
    scores.view(*qs.shape[:2], n, block.stop)[..., block] += ahead
    return torch.softmax(scores, dim=-1)


class ProductOnMeta(torch.autograd.Function):
    """The shapes of a fused attention product, without data. q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D]"""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q.contiguous())  # [B, H, T, D]
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))  # the last: log-sum-exp
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def lacks_masked_groups(q: Tensor) -> bool:
    """Whether no fused kernel supports a mask with grouped heads: on CUDA torch would form the [T, S] scores of
    each head in float32 (https://github.com/Comfy-Org/ComfyUI/pull/15135)."""
    return q.is_cuda


def attend_by_run(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, rows: Runs, dropout: float, scale: float | None, cap: float | None
) -> Tensor:
    """Attention one document at a time: a packed row costs sum n^2 over its documents instead of T^2.

    `split` cuts the rows, because its backward is one `cat`; the backward of a slice fills a row with zeros. On a GPT-2
    layer, 4 rows of 1024 tokens with 27 documents each, this took 53 ms against 496 ms for the dense mask (one CPU
    thread).
    """
    virtual_tokens = layout.virtual_tokens
    keys_only = [virtual_tokens] if virtual_tokens and not layout.prompted else []  # a prefix has no queries
    parts = []
    for row, runs in enumerate(rows):
        lengths = [n for n, _ in runs]
        qs = q[row].transpose(0, 1).split(lengths)  # each [n, H, D]
        ks, vs = (t[row].transpose(0, 1).split(keys_only + lengths) for t in (k, v))  # each [n, K, D]
        for i, (_, mask) in enumerate(runs, start=len(keys_only)):
            k_run, v_run = ks[i], vs[i]
            if virtual_tokens and i > 0:
                k_run, v_run = torch.cat([ks[0], k_run]), torch.cat([vs[0], v_run])  # [P + n, K, D]
            q_run = heads_first(qs[i - len(keys_only)])
            y = product(q_run, heads_first(k_run), heads_first(v_run), mask, mask is None, dropout, scale, cap)
            parts.append(y[0].transpose(0, 1).flatten(1))  # [n, H * D]
    return torch.cat(parts).view(q.shape[0], q.shape[2], -1)  # [B, T, H * D]


def attend_by_row(q: Tensor, k: Tensor, v: Tensor, rows: Spans, scale: float | None, cap: float | None) -> Tensor:
    """Attention of one query a row, each over its own columns: the product of a row alone, whatever the others are.

    q [B, H, 1, D], k and v [B, K, S, D] -> [B, 1, H * D]
    """
    parts = []
    for row, spans in enumerate(rows):
        ks, vs = (
            torch.cat([t[row, :, first:end] for first, end in spans], dim=1)[None] for t in (k, v)
        )  # [1, K, n, D]
        parts.append(product(q[row : row + 1], ks, vs, None, False, 0.0, scale, cap))  # [1, H, 1, D]
    return torch.cat(parts).transpose(1, 2).flatten(2)


def heads_first(run: Tensor) -> Tensor:
    """[n, H, D] -> [1, H, n, D]"""
    return run.transpose(0, 1)[None]


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Apply several linears to the same x; if the first has `together` (LoRA), it computes them in shared passes."""
    together: Callable[..., tuple[Tensor, ...]] | None = getattr(linears[0], "together", None)
    return tuple(linear(x) for linear in linears) if together is None else together(x, linears)


def run_block(block: nn.Module, activation_checkpointing: bool, *arguments: object) -> Tensor:
    """Apply a decoder block; with activation checkpointing, keep only its input and run it again in backward.

    Source: Chen et al. 2016.
    """
    return checkpoint(block, *arguments, use_reentrant=False) if activation_checkpointing else block(*arguments)
