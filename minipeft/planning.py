"""What a run will take, worked out before it starts: parameters and FLOPs from config.json alone, seconds from a probe.

forward        2 FLOPs per weight of a linear and token, and 4 * n * C per token and layer for attention over n keys
backward       as much again for the gradient of the activations, and again for that of the weights, if trained
"""

from __future__ import annotations

import time
from typing import Any

import torch

PROBE = (256, 1024, 1024)  # a product of the size that training has
PROBE_SECONDS = 0.15
EFFICIENCY = 0.6  # of the probe's speed that whole steps reach: 135M Llama, LoRA, one core, fp32 and bf16


def linear_weights(config: Any) -> int:
    """The weights that every token is multiplied with: all linears of the blocks, and the head."""
    from minipeft.models import FAMILIES

    with torch.device("meta"):
        model = FAMILIES[config.model_type][1](config)
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    return blocks + config.vocab_size * config.width


def forward_flops(config: Any, tokens: float, document: int) -> float:
    """FLOPs of one forward pass over `tokens` tokens in documents of about `document` tokens."""
    return tokens * (2 * linear_weights(config) + 4 * document * config.heads * config.head_width * config.layers)


def train_flops(config: Any, tokens: float, document: int, *, full: bool, checkpointing: bool = False) -> float:
    """FLOPs of training on them: forward, backward through the activations, and what is trained or recomputed."""
    return forward_flops(config, tokens, document) * (1 + 1 + full + checkpointing)


def probe_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of this machine for a matrix product of the given kind, measured in about PROBE_SECONDS."""
    m, k, n = PROBE
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    torch.nn.functional.linear(a, b)
    start, products = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < PROBE_SECONDS:
        torch.nn.functional.linear(a, b).sum().item()
        products += 1
    return 2.0 * m * k * n * products / seconds


def in_words(seconds: float) -> str:
    """A duration as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
