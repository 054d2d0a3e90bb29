"""Cross-entropy from the hidden states in chunks of tokens, so that the [tokens, V] logits are never formed at once.

    loss = sum over supervised t of  -log softmax(h_t W^T)[label_{t+1}]

With a vocabulary of 50,000 the logits of one row of 1024 tokens take 200 MB, and their gradient the same. Here the
forward pass computes the loss and the gradient (softmax - one-hot) of each chunk together, and saves only dh [N, C]
(and dW, if the head is trained) for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minipeft.documents import IGNORED

CHUNK_LOGITS = 2**23  # logits at a time: 32 MB in float32


def finish(logits: Tensor, divisor: float = 1.0, cap: float | None = None) -> Tensor:
    """cap * tanh(logits / divisor / cap); without a cap logits / divisor."""
    if divisor != 1.0:
        logits = logits / divisor
    return logits if cap is None else cap * torch.tanh(logits / cap)


class LinearCrossEntropy(torch.autograd.Function):
    """h [N, C], W [V, C], targets [N] -> the sum of the N losses, in float32; `bias` [V], the rest as in `finish`."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        divisor: float = 1.0,
        cap: float | None = None,
    ) -> Tensor:
        wants_h, wants_w = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h) if wants_h else None  # [N, C]
        dw: Tensor | None = None  # [V, C]
        db = None if bias is None or not ctx.needs_input_grad[3] else torch.zeros_like(bias)  # [V]
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        rows = max(1, min(h.shape[0], CHUNK_LOGITS // weight.shape[0]))
        chunk = h.new_empty(rows, weight.shape[0])  # one for all chunks
        for start in range(0, h.shape[0], rows):
            part, target = h[start : start + rows], targets[start : start + rows]
            logits = torch.mm(part, weight.t(), out=chunk[: len(part)])  # [n, V]
            logits = finish((logits if bias is None else logits.add_(bias)).float(), divisor, cap)
            slope = 1 / divisor if cap is None else (1 - (logits / cap).square()) / divisor  # d finish / d logits
            logits.sub_(logits.amax(dim=1, keepdim=True))  # exp cannot overflow; the following lines work in place too
            chosen = logits.gather(1, target[:, None])  # [n, 1]
            mass = logits.exp_().sum(dim=1, keepdim=True)  # [n, 1]
            total += (mass.log() - chosen).sum()
            if not wants_w and dh is None and db is None:
                continue
            d = logits.div_(mass)  # softmax  [n, V]
            d.scatter_add_(1, target[:, None], torch.full_like(mass, -1.0))
            if cap is not None or divisor != 1.0:
                d = d.mul_(slope)
            d = d.to(part.dtype)
            if dh is not None:
                dh[start : start + rows] = d @ weight.to(part.dtype)
            if wants_w:
                dw = d.T @ part if dw is None else dw.addmm_(d.T, part)
            if db is not None:
                db += d.sum(dim=0)
            del logits, slope, d  # before the next chunk is allocated
        if wants_w and dw is None:  # no token is supervised
            dw = torch.zeros_like(weight)
        ctx.save_for_backward(dh, dw, db)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw, db = ctx.saved_tensors
        dh, db = (None if d is None else d * scale.to(d.dtype) for d in (dh, db))
        if dw is not None:
            dw.mul_(scale.to(dw.dtype))  # without a copy [V, C]; torch refuses a second backward
        return dh, dw, None, db, None, None


def count_targets(labels: Tensor) -> int:
    """Count the supervised tokens of labels [B, T]; the first token of a row never is one: nothing predicts it."""
    return int((labels[:, 1:] != IGNORED).sum())


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    divisor: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Sum of the next-token losses in nats. hidden [B, T, C], head weight [V, C], labels [B, T] aligned with the ids.

    A label of -100 is excluded. This is the only place that shifts: hidden t predicts label t + 1. On the meta device,
    where labels have no values, every token counts as supervised. `bias` [V] is the head's; divisor and cap of the
    logits as in `finish`.
    """
    hidden, targets = select_supervised(hidden, labels)  # [N, C], [N]
    return LinearCrossEntropy.apply(hidden, weight, targets, bias, divisor, cap)


def select_supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a supervised token, and the tokens. [B, T, C], [B, T] -> [N, C], [N]"""
    hidden, targets = hidden[:, :-1], labels[:, 1:]  # [B, T - 1, ...]
    if labels.is_meta or torch.compiler.is_compiling():  # all: their number is not known, and the loss ignores -100
        return hidden.flatten(0, 1), targets.flatten()
    supervised = targets != IGNORED
    return hidden[supervised], targets[supervised]


def adapted_cross_entropy(
    hidden: Tensor, logits: Callable[[Tensor], Tensor], labels: Tensor, vocabulary: int
) -> Tensor:
    """`cross_entropy` for a head that is more than a product with one weight, as LoRA's W + s B A: autograd
    differentiates it, and each chunk's logits are computed again in backward. `logits` [n, C] -> [n, V]."""
    hidden, targets = select_supervised(hidden, labels)  # [N, C], [N]
    rows = max(1, CHUNK_LOGITS // vocabulary)

    def add_up(part: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits(part).float(), target, reduction="sum")

    parts = zip(hidden.split(rows), targets.split(rows))
    losses = [checkpoint(add_up, part, target, use_reentrant=False) for part, target in parts]
    return torch.stack(losses).sum()
