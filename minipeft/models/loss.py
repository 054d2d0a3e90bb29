"""Token cross-entropy straight from the hidden states, in chunks: the [tokens, V] logits never stand in memory at once.

    loss = sum over supervised t of  -log softmax(h_t W^T)[label_{t+1}]

A vocabulary of 50,000 makes the logits of one row of 1024 tokens 200 MB, and their gradient as much again. Here each
chunk of tokens is taken through the head, its loss and its gradient (softmax - one-hot) are worked out together in the
forward pass, and only dh [N, C] (and dW, where the head is trained) is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that is no target
CHUNK_LOGITS = 2**24  # logits at a time: 64 MB in float32


class LinearCrossEntropy(torch.autograd.Function):
    """h [N, C], W [V, C], targets [N] -> the sum of the N losses, in float32."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_h, wants_w = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h) if wants_h else None  # [N, C]
        dw = torch.zeros_like(weight) if wants_w else None  # [V, C]
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, h.shape[0], rows):
            part, target = h[start : start + rows], targets[start : start + rows]
            logits = F.linear(part, weight).float()  # [n, V]
            logits.sub_(logits.amax(dim=1, keepdim=True))  # so that exp cannot overflow; the rest in place too
            chosen = logits.gather(1, target[:, None])  # [n, 1]
            mass = logits.exp_().sum(dim=1, keepdim=True)  # [n, 1]
            total += (mass.log() - chosen).sum()
            if dh is None and dw is None:
                continue
            d = logits.div_(mass)  # softmax  [n, V]
            d.scatter_add_(1, target[:, None], torch.full_like(mass, -1.0))
            d = d.to(part.dtype)
            if dh is not None:
                dh[start : start + rows] = d @ weight.to(part.dtype)
            if dw is not None:
                dw += d.T @ part
        ctx.save_for_backward(dh, dw)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dh, dw = ctx.saved_tensors
        return (
            (None if dh is None else dh * scale.to(dh.dtype)),
            (None if dw is None else dw * scale.to(dw.dtype)),
            None,
        )


def count_targets(labels: Tensor) -> int:
    """How many tokens of [B, T] labels are supervised; the first of a row never is: nothing comes before it."""
    return int((labels[:, 1:] != IGNORED).sum())


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the next-token losses in nats. hidden [B, T, C], head weight [V, C], labels [B, T] aligned with the ids.

    A label of -100 is no target. The shift stands here and nowhere else: hidden t is held against label t + 1.
    """
    targets = labels[:, 1:]  # [B, T - 1]
    supervised = targets != IGNORED
    return LinearCrossEntropy.apply(hidden[:, :-1][supervised], weight, targets[supervised])
