"""Sample from the nucleus.

Sort a row's tokens by probability, the largest first (of equal ones the smaller id first), and keep the smallest head
whose probabilities sum to top_p or more: a token is kept if the sum before it is below top_p. So the first is always
kept. Then sample from the kept ones in proportion to their probabilities.

Source: Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1. The sample is drawn by
inverting the kept tokens' cumulative distribution at a given number u in [0, 1), so that it is a function of u alone,
whatever else is in the batch:

    chosen = the first kept token whose cumulative probability, over that of all kept ones, is greater than u

A u that was rounded up to 1 gives the last kept token.

`choose(logits [B, V], draw [B], temperature, top_p)` returns one token a row, int64 [B]. `temperature` divides the
logits before the softmax; temperature 0 means the most probable token, and u plays no part.
`sort_best(probabilities, top_p)` sorts as above, and gives probabilities and tokens, two of [B, n]; n may be less than
V where the rest cannot be kept.
"""

from __future__ import annotations

import math

import torch

from minipeft.tour.exercises.judging import require, require_close, require_dtype
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.sampling.choose",
    hints=(
        "ordered.cumsum(dim=1) - ordered is the sum before each token.",
        "Set the probabilities that are not kept to 0; the cumulative sum of the rest ends at the mass that is kept.",
        "torch.searchsorted(upto, u * mass, right=True) is the first place whose sum is greater; clamp it to the last "
        "kept token, in case of rounding.",
    ),
)


def choose_in_loops(logits: list[float], u: float, temperature: float, top_p: float) -> int:
    """One row, by the text."""
    if temperature == 0:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    powers = [math.exp(value / temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda i: (-powers[i], i))
    kept: list[int] = []
    mass = 0.0
    for token in order:
        if kept and mass >= top_p:
            break
        kept.append(token)
        mass += powers[token] / sum(powers)
    place = 0.0
    for token in kept:
        place += powers[token] / sum(powers)
        if place / mass > u:
            return token
    return kept[-1]


def check_by_hand(choose: Answer) -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8 and top_p = 0.8: three are kept, with 4/7, 2/7 and 1/7."""
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log().repeat(6, 1)
    draw = torch.tensor([0.0, 0.56, 0.58, 0.84, 0.87, 0.999])
    chosen = choose(logits, draw, 1.0, 0.8)
    require_dtype(chosen, torch.int64, "the tokens")
    require_close(chosen, torch.tensor([1, 1, 3, 3, 0, 0]), "the tokens", 0)


def check_greedy(choose: Answer) -> None:
    """Temperature 0 takes the most probable token, whatever u is."""
    torch.manual_seed(0)
    logits = torch.randn(20, 9)
    require_close(choose(logits, torch.rand(20), 0.0, 0.9), logits.argmax(dim=1), "the tokens", 0)


def check_small_nucleus(choose: Answer) -> None:
    """A tiny top_p keeps the first token alone; top_p = 1 keeps all."""
    logits = torch.tensor([[0.3, 0.4, 0.3]]).log().repeat(3, 1)
    draw = torch.tensor([0.0, 0.5, 0.9999])
    require_close(choose(logits, draw, 1.0, 0.01), torch.tensor([1, 1, 1]), "the tokens, top_p = 0.01", 0)
    require_close(choose(logits, draw, 1.0, 1.0), torch.tensor([1, 0, 2]), "the tokens, top_p = 1", 0)


def check_boundary(choose: Answer) -> None:
    """Powers of two, where sums are exact: a token that begins at top_p is not kept, and u at a bound is the next."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().repeat(4, 1)
    draw = torch.tensor([0.0, 0.4999, 0.5001, 0.9999])
    require_close(choose(logits, draw, 1.0, 0.5), torch.tensor([0, 0, 0, 0]), "the tokens, top_p = 0.5", 0)
    equal = torch.zeros(4, 4)
    at = torch.tensor([0.0, 0.25, 0.5, 0.75])
    require_close(choose(equal, at, 1.0, 1.0), torch.tensor([0, 1, 2, 3]), "the tokens at u = 0, 1/4, ...", 0)


def check_rounded(choose: Answer) -> None:
    """u = 1, as a draw in a narrower dtype may be rounded: the last token that is kept, not one that is not."""
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    for top_p, last in ((0.4, 1), (0.7, 3), (0.8, 0), (1.0, 2)):
        chosen = choose(logits, torch.ones(1), 1.0, top_p)
        require_close(chosen, torch.tensor([last]), f"the token at u = 1, top_p = {top_p}", 0)


def check_random(choose: Answer) -> None:
    """Random logits, temperatures and top_p, against loops."""
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.3, 1.0, 2.5):
        for top_p in (0.2, 0.7, 0.95):
            logits, draw = torch.randn(50, 12, generator=generator), torch.rand(50, generator=generator)
            wanted = [choose_in_loops(row, u, temperature, top_p) for row, u in zip(logits.tolist(), draw.tolist())]
            chosen = choose(logits, draw, temperature, top_p)
            what = f"the tokens at temperature {temperature}, top_p {top_p}"
            require_close(chosen, torch.tensor(wanted), what, 0)


def check_shares(choose: Answer) -> None:
    """Over 40,000 draws the frequency of each token is its probability."""
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    draw = (torch.arange(40_000) + 0.5) / 40_000
    chosen = choose(probabilities.log().repeat(40_000, 1), draw, 1.0, 1.0)
    require(chosen.shape == (40_000,), f"the tokens have the shape {list(chosen.shape)}")
    require_close(torch.bincount(chosen, minlength=3) / 40_000, probabilities, "the shares", 1e-3)
