"""Nucleus sampling (Holtzman et al. 2020): draw the next token from the most probable ones that sum to `top_p`.

    p = softmax(logits / temperature)                      sorted: 0.5  0.25  0.125  0.125     top_p = 0.7
    nucleus = the fewest tokens that sum to top_p or more          0.5  0.25
    token = the first whose cumulative sum exceeds u * 0.75        u = 0.6: 0.45 < 0.5, the first

A prompt's numbers u come from its own random stream, seeded by (seed, index).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.documents import derive_seed

CANDIDATES = 64  # tokens in which the nucleus is looked for first


def draw_uniforms(seed: int, number: int, count: int) -> Tensor:
    """Draw the uniform random numbers of prompt `number`. -> [count], in [0, 1)"""
    generator = torch.Generator().manual_seed(derive_seed(seed, number))
    return torch.rand(count, generator=generator)


def choose(logits: Tensor, draw: Tensor, temperature: float, top_p: float) -> Tensor:
    """Choose one token per row: the likeliest if `temperature` is 0, else by inverting the nucleus' CDF at the uniform
    `draw`. [B, V], [B] -> [B]"""
    if temperature == 0:
        return logits.argmax(dim=1)
    probabilities = F.softmax(logits / temperature, dim=1)  # [B, V]
    ordered, tokens = sort_best(probabilities, top_p)  # [B, n]
    before = ordered.cumsum(dim=1) - ordered  # probability before each token
    kept = torch.where(before < top_p, ordered, 0.0)  # the nucleus; it always holds the first token
    upto = kept.cumsum(dim=1)  # [B, n]
    place = torch.searchsorted(upto, draw[:, None] * upto[:, -1:], right=True)  # [B, 1]
    return tokens.gather(1, place.clamp(max=(kept > 0).sum(dim=1, keepdim=True) - 1))[:, 0]


def sort_best(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Sort the tokens of each row by probability, then id: the first CANDIDATES, or all if the nucleus needs more.

    [B, V] -> two of [B, n]: probabilities and tokens. Sorting 50,000 takes longer than the rest of the choice.
    """
    if probabilities.shape[1] > CANDIDATES:
        tokens = probabilities.topk(CANDIDATES, dim=1).indices.sort(dim=1).values  # [B, n]
        ordered, order = probabilities.gather(1, tokens).sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(dim=1) - ordered
        last = ordered == ordered[:, -1:]  # of tokens that tie with these, topk may have left out any
        if not (last & (before < top_p)).any():
            return ordered, tokens.gather(1, order)
    return probabilities.sort(dim=1, descending=True, stable=True)
