"""A prefix behind a gate.

    y = tanh(g) softmax(scale q prefix_k^T) prefix_v          g [H], one gate a query head, 0 at first

Source: Zhang et al. 2023, "LLaMA-Adapter", eq. 6. This y is added to the text's own attention, which keeps its own
softmax: so nothing changes while g is 0.

`forward(self, q, scale, cap)` is a method of GatedPrefix. q is [B, H, T, D]; `self.prefix.key_value()` returns keys and
values, two of [K, P, D] in float32, the same for all rows; `self.gate` is g. Every query sees all P virtual tokens.
K may be smaller than H (grouped queries): each key/value head serves H / K query heads in a row, heads 0 and 1 the
first, heads 2 and 3 the second, .... `scale` None means 1 / sqrt(D). With a cap the softmax is of
cap * tanh(scores / cap). Return [B, T, H * D], the heads side by side, in the dtype of q.

`product(q, k, v, mask, causal, dropout, scale, cap)` is the library's attention: k, v [B, K, S, D] -> [B, H, T, D].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minipeft.adapters.prefix import GatedPrefix, Prefix
from minipeft.tour.exercises.judging import require_close, require_dtype
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.adapters.prefix.GatedPrefix.forward",
    hints=(
        "Cast keys and values to q.dtype and expand them over the rows: [K, P, D] -> [B, K, P, D].",
        "No mask and not causal: product(q, k, v, None, False, 0.0, scale, cap).",
        "tanh(g) has shape [H]; multiply [B, H, T, D] by it as [H, 1, 1]. Then transpose heads and tokens and flatten.",
    ),
)


def make_gated(gate: list[float]) -> GatedPrefix:
    """K = 2 key/value heads, P = 3 virtual tokens, D = 4, and a gate for each of the query heads."""
    torch.manual_seed(0)
    gated = GatedPrefix(Prefix(torch.randn(2, 3, 4), torch.randn(2, 3, 4)), len(gate))
    gated.gate.data = torch.tensor(gate)
    return gated


def attend_in_loops(gated: GatedPrefix, q: Tensor, scale: float, cap: float | None) -> Tensor:
    """The equation, one number at a time."""
    rows, heads, tokens, width = q.shape
    key, value = (t.double() for t in gated.prefix.key_value())
    y = torch.zeros(rows, tokens, heads * width, dtype=torch.float64)
    for b in range(rows):
        for h in range(heads):
            group = h // (heads // len(key))
            for t in range(tokens):
                scores = [scale * float(q[b, h, t].double() @ k) for k in key[group]]
                if cap is not None:
                    scores = [cap * math.tanh(score / cap) for score in scores]
                weights = [math.exp(score) for score in scores]
                mean = sum(w / sum(weights) * v for w, v in zip(weights, value[group]))
                y[b, t, h * width : (h + 1) * width] = math.tanh(float(gated.gate[h])) * mean
    return y


@torch.no_grad()
def check_loops(forward: Answer) -> None:
    """y equals the equation in loops: two rows, four query heads on two key/value heads."""
    gated, q = make_gated([0.5, -1.0, 2.0, 0.1]), torch.randn(2, 4, 5, 4)
    require_close(forward(gated, q, 0.3, None), attend_in_loops(gated, q, 0.3, None), "y", 1e-5)


@torch.no_grad()
def check_scale(forward: Answer) -> None:
    """Without a scale it is 1 / sqrt(D); a cap limits the scores."""
    gated, q = make_gated([0.5, 1.5]), 3 * torch.randn(1, 2, 3, 4)
    require_close(forward(gated, q, None, None), attend_in_loops(gated, q, 0.5, None), "y without a scale", 1e-5)
    require_close(forward(gated, q, 0.5, 2.0), attend_in_loops(gated, q, 0.5, 2.0), "y with cap=2", 1e-5)


@torch.no_grad()
def check_zero_gate(forward: Answer) -> None:
    """A gate of 0 adds exactly 0."""
    require_close(forward(make_gated([0.0, 0.0]), torch.randn(1, 2, 3, 4), None, None), torch.zeros(1, 3, 8), "y", 0)


@torch.no_grad()
def check_dtype(forward: Answer) -> None:
    """A bfloat16 q gives a bfloat16 y."""
    gated, q = make_gated([0.5, 1.5]), torch.randn(1, 2, 3, 4).bfloat16()
    y = forward(gated, q, None, None)
    require_dtype(y, torch.bfloat16, "y")
    require_close(y, attend_in_loops(gated, q, 0.5, None), "y in bfloat16", 0.03)


def check_gradient(forward: Answer) -> None:
    """At 0 the gate itself has a gradient, so that it opens; keys and values get none yet."""
    gated = make_gated([0.0, 0.0])
    forward(gated, torch.randn(1, 2, 3, 4), None, None).sum().backward()
    assert gated.gate.grad is not None
    require_close((gated.gate.grad != 0).float(), torch.ones(2), "whether each gate has a gradient", 0)
