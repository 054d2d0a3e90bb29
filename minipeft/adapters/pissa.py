"""PiSSA and OLoRA: LoRA initialized with a part of the weight itself (Meng et al. 2024, eq. 2-4; Büyükakyüz 2024).

    pissa   W = U S V^T;    A0 = sqrt(S_r / s) V_r^T,   B0 = U_r sqrt(S_r / s)      r largest of S, s = alpha / r
    olora   W = Q R;        A0 = R_r,  B0 = Q_r         the first r rows of R and columns of Q: B0 is orthonormal

    y = x (W - s B0 A0)^T + s (x A^T) B^T                                 A, B start as A0, B0: a no-op at first

The papers replace W by the residual W - s B0 A0. Here W keeps its bytes, and the update since the init is one pair; so
the adapter can be saved as plain LoRA of rank 2r:

    s B A - s B0 A0 = s [B, B - B0] [A - A0 ; A0]

Of two equal forms it is the one whose rounding in bfloat16 is a share of the update: [B, -B0] [A ; A0] rounds A, B and
A0, B0, each as large as the part of W, and its error was up to 1.4 times that of PEFT (tests/adapters/test_pissa.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minipeft.adapters.lora import LoRAConfig, LoRALinear, Part

LARGE = 1024  # the smaller side of a weight up to which its whole SVD is computed
ITERATIONS = 16  # of the randomized SVD: a flat spectrum, as of these weights, needs many


class ResidualLinear(LoRALinear):
    """y = x W^T + b + s (dropout(x) [A - A0 ; A0]^T) [B, B - B0]^T, with the frozen initial pair A0, B0 beside A, B."""

    A0: Tensor
    B0: Tensor

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, config: LoRAConfig):
        super().__init__(linear, rank, alpha, config)
        self.register_buffer("A0", torch.zeros_like(self.lora_A), persistent=False)  # [r, in]
        self.register_buffer("B0", torch.zeros_like(self.lora_B), persistent=False)  # [out, r]
        self.init = config.init

    def initialize(self, init: str, generator: torch.Generator) -> None:
        """A = A0 and B = B0, the part of W."""
        A, B = RESIDUAL[init](self.weight, self.rank, self.scale)
        with torch.no_grad():
            for tensor, value in ((self.lora_A, A), (self.A0, A), (self.lora_B, B), (self.B0, B)):
                tensor.copy_(value)

    def part(self) -> Part:
        """The product's tensors: the update minus its initial value, as one pair of rank 2r."""
        A = torch.cat([self.lora_A - self.A0, self.A0])  # [2r, in]
        B = torch.cat([self.lora_B, self.lora_B - self.B0], dim=1)  # [out, 2r]
        return super().part()._replace(lora_A=A, lora_B=B)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.product(x, *self.part(), dropout)  # [B, T, out]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.init}"


@torch.no_grad()
def compute_principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r] with s B0 A0 the best approximation of W of this rank, in float32."""
    U, S, Vt = decompose(weight.dequantize().float(), rank)  # [out, k], [k], [k, in]
    root = (S[:rank] / scale).sqrt()  # [r]
    return root[:, None] * Vt[:rank], U[:, :rank] * root  # [r, in], [out, r]


def decompose(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of W [out, in]; of a large W the first 2 r alone, by randomized SVD (Halko et al. 2011).

    Q spans nearly the space of the largest singular vectors, and the SVD of the small Q^T W gives them. On SmolLM2's
    weights the approximation of rank r leaves at most 1.0001 times the residual of the best one; the model's output is
    unchanged at first in any case.
    """
    if min(W.shape) <= LARGE or 2 * rank >= min(W.shape):
        return torch.linalg.svd(W, full_matrices=False)
    draw = torch.randn(W.shape[1], 2 * rank, generator=torch.Generator().manual_seed(0)).to(W.device)
    Q, _ = torch.linalg.qr(W @ draw)  # [out, 2r]
    for _ in range(ITERATIONS):
        Q, _ = torch.linalg.qr(W @ torch.linalg.qr(W.t() @ Q).Q)
    U, S, Vt = torch.linalg.svd(Q.t() @ W, full_matrices=False)
    return Q @ U, S, Vt


@torch.no_grad()
def compute_orthonormal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r], the first r rows of R and columns of Q, in float32; their product is one, whatever
    the signs of the decomposition."""
    Q, R = torch.linalg.qr(weight.dequantize().float())  # [out, k], [k, in]
    return R[:rank], Q[:, :rank]


RESIDUAL: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "pissa": compute_principal,
    "olora": compute_orthonormal,
}
