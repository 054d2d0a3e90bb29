"""Stochastic rounding of float32 numbers to bfloat16, so that a small update of a bfloat16 weight is not lost.

A bfloat16 is the upper half of a float32. AdamW moves a weight by about the learning rate; rounding to nearest undoes a
move of less than half the distance to the next bfloat16: a weight of 1 stays 1 at any learning rate below 0.0019. Here

    s eeeeeeee mmmmmmm | llllllllllllllll        float32: what bfloat16 keeps | what it drops, the integer l
                       + rrrrrrrrrrrrrrrr        r uniform in 0 ... 2^16 - 1; a carry has probability l / 2^16

so a number between two bfloat16 goes to the one away from 0 with the probability l / 2^16 and to the other else: its
mean is the number. What bfloat16 holds exactly (l = 0) stays, and so do NaN and Inf.

Source: Gupta et al. 2015; for bfloat16 weights Zamirai et al. 2021 (Revisiting BFloat16 training).
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 2**16


def round_stochastically(wide: Tensor, rounded: Tensor, generator: torch.Generator) -> None:
    """Write float32 numbers, rounded, to a bfloat16 tensor of the same shape. `generator` is of their device."""
    draws = torch.empty(-(-wide.numel() // 4), dtype=torch.int64, device=wide.device)  # four r each
    draws.random_(-(2**63), None, generator=generator)
    r = draws.view(torch.int16)[: wide.numel()].view(wide.shape)  # as int16: r - 2^15
    bits = wide.view(torch.int32) + r
    bits += LEVELS // 2
    bits &= -LEVELS
    rounded.copy_(bits.view(torch.float32))  # exact
