"""Where LoRA starts: B A = 0.

An adapter that has just been added must not change the model, so the update s B A is 0 at first. But A and B must not
both be 0: with dY the gradient of the output, dL/dA = s B^T dY^T x and dL/dB = s dY^T x A^T would both be 0, for ever.

`initialize(self, init, generator)` fills `self.lora_A` [r, in] and `self.lora_B` [out, r], two Parameters that hold
zeros, in place:

    "uniform"      A ~ U(-1/sqrt(in), 1/sqrt(in)),   B stays 0            He et al. 2015, as HF PEFT
    "gaussian"     A ~ N(0, 1/r^2),                  B stays 0
    "orthogonal"   A = Q1^T N1 / 10,  B = N2^T Q2 / 10                     N1 [r/2, in], N2 [r/2, out] ~ N(0, 1)

For "orthogonal" take a random orthogonal Q [r, r] (r is even): Q1 are its rows 0, 2, 4, ..., Q2 its rows 1, 3, 5, ...
(each [r/2, r]). Then B A = N2^T Q2 Q1^T N1 / 100 = 0 although neither is 0. Every number is drawn from `generator`.
"""

from __future__ import annotations

import torch
from torch import nn

from minipeft.adapters.lora import LoRAConfig, LoRALinear
from minipeft.tour.exercises.judging import require, require_close
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.adapters.lora.LoRALinear.initialize",
    hints=(
        "Write into a Parameter within torch.no_grad(), by self.lora_A.copy_(...): it stays the same Parameter.",
        "torch.rand is U(0, 1): scale and shift it. torch.randn / r has the standard deviation 1/r.",
        "Q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator)) is orthogonal; its rows are Q[0::2], Q[1::2].",
    ),
)


def start(initialize: Answer, init: str, seed: int = 0, width: int = 300, rank: int = 8) -> LoRALinear:
    """A layer after initialize."""
    layer = LoRALinear(nn.Linear(width, 200), rank, 16.0, LoRAConfig(rank=rank, alpha=16.0))
    A = layer.lora_A
    before = torch.random.get_rng_state()
    initialize(layer, init, torch.Generator().manual_seed(seed))
    same = torch.equal(before, torch.random.get_rng_state())
    require(same, f"init {init!r} draws from torch's global generator: pass generator=generator to each draw")
    require(layer.lora_A is A and A.requires_grad, "lora_A must stay the same trained Parameter: fill it in place")
    return layer


def check_uniform(initialize: Answer) -> None:
    """uniform: A is uniform on [-1/sqrt(in), 1/sqrt(in)], B is 0."""
    layer = start(initialize, "uniform")
    A, bound = layer.lora_A.detach(), 300**-0.5
    require_close(layer.lora_B, torch.zeros(200, 8), "B", 0)
    require(float(A.abs().max()) <= bound, f"|A| reaches {float(A.abs().max()):.4f}, beyond 1/sqrt(in) = {bound:.4f}")
    shares = torch.histc(A, 4, -bound, bound) / A.numel()
    require_close(shares, torch.full((4,), 0.25), "the share of A in each quarter of the interval", 0.2)


def check_gaussian(initialize: Answer) -> None:
    """gaussian: A has mean 0 and standard deviation 1/r, B is 0."""
    for rank in (4, 8):
        layer = start(initialize, "gaussian", rank=rank)
        A = layer.lora_A.detach()
        require_close(layer.lora_B, torch.zeros(200, rank), "B", 0)
        require_close(A.std(), torch.tensor(1 / rank), f"the standard deviation of A at rank {rank}", 0.1)
        require(abs(float(A.mean())) < 0.1 / rank, "the mean of A is not 0")
        require(float(A.abs().max()) > 2.5 / rank, "A has no tails: is it normal?")


def check_orthogonal(initialize: Answer) -> None:
    """orthogonal: B A is 0, though A and B are not."""
    layer = start(initialize, "orthogonal")
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    require_close(A.square().mean().sqrt(), 0.5**0.5 / 10, "the root mean square of A", 0.06)
    require_close(B.square().mean().sqrt(), 0.5**0.5 / 10, "the root mean square of B", 0.06)
    require(float((B @ A).abs().max()) < 1e-6, f"B A reaches {float((B @ A).abs().max()):.3g}: the layer changes")
    require(int(torch.linalg.matrix_rank(A.float())) == 4, "the rank of A is not r/2: N1 has r/2 rows")


def check_generator(initialize: Answer) -> None:
    """The same seed gives the same bits, another seed others; torch's global generator is not used."""
    for init in ("uniform", "gaussian", "orthogonal"):
        first, again, other = (start(initialize, init, seed).lora_A.detach() for seed in (1, 1, 2))
        require_close(again, first, f"A of init {init!r} from the same seed", 0)
        require(not torch.equal(first, other), f"A of init {init!r} is the same from another seed")
