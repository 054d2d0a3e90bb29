"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, "DoRA", eq. 5).

    W' = m * V / ||V||,    V = W + s B A        one trained length m and one direction for each row of W

m starts as ||W||, so at first nothing changes. The norm is a constant to the gradient, as in the paper's section 4.3.
In a forward pass V itself is never formed: with g = m / ||V||, one number a row,

    y = g * (x W^T + s (dropout(x) A^T) B^T) + b

and the norm comes from products with r columns only; the sum W + s B A, as large as W, is not needed:

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>        row by row; <.,.> sums over r
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minipeft.adapters.lora import LoRAConfig, LoRALinear

BLOCK = 1024  # rows of W that are widened to float32 at a time


class DoRALinear(LoRALinear):
    """y = g * (x W^T + s (dropout(x) A^T) B^T) + b,  g = m / ||W + s B A||"""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, config: LoRAConfig):
        super().__init__(linear, rank, alpha, config)
        self.lora_magnitude_vector = nn.Parameter(self.zeros(linear.weight.shape[0]))  # m [out]

    def initialize(self, init: str, generator: torch.Generator) -> None:
        """A and B as LoRA's; m = ||W||, the norm at B = 0."""
        super().initialize(init, generator)
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self.norms())

    def norms(self) -> Tensor:
        """||W + s B A|| of each row, a constant to the gradient. [out]"""
        return compute_row_norms(self.weight, self.lora_A, self.lora_B, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        gain = (self.lora_magnitude_vector / self.norms()).to(x.dtype)  # g [out]
        dropout = self.dropout if self.training else 0.0
        y = self.product(x, self.weight, None, self.lora_A, self.lora_B, self.scale, dropout) * gain  # [B, T, out]
        bias = self.used_bias()
        return y if bias is None else y + bias

    def together(self, x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Apply several linears to the same x, one by one: the gain comes between product and bias."""
        return tuple(linear(x) for linear in linears)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """g * (W + s B A) and b, in float32. [out, in], [out]"""
        weight, bias = super().merged()
        weight *= (self.lora_magnitude_vector / self.norms())[:, None]
        return weight, bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dora"


@torch.no_grad()
def compute_row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Compute ||W + s B A|| of each row, in float32. W [out, in], A [r, in], B [out, r] -> [out]"""
    A, B = A.float(), B.float()
    gram = A @ A.t()  # [r, r]
    squares = []
    for rows, b in zip(weight.split(BLOCK), B.split(BLOCK)):
        rows = rows.float()  # [n, in]; no copy where W is float32
        own = torch.linalg.vector_norm(rows, dim=1).square()  # [n]
        cross = ((rows @ A.t()) * b).sum(dim=1)  # [n]
        added = ((b @ gram) * b).sum(dim=1)  # [n]
        squares.append(own + 2 * scale * cross + scale**2 * added)
    return torch.cat(squares).clamp(min=0).sqrt()  # [out]
