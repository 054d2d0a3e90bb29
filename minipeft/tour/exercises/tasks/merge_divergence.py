"""How much a merge changed the answers.

    KL(p || q) = sum over the vocabulary of p (log p - log q)          p = softmax(p_logits), q = softmax(q_logits)

Source: Kullback and Leibler 1951. Two tensors of logits [n, V], of the unmerged and of the merged model, give one value
in nats a row, [n] in float64: in float32 the difference of two nearly equal logarithms is noise. KL is never negative;
where rounding makes it so, it is 0.
"""

from __future__ import annotations

import math

import torch

from minipeft.tour.exercises.judging import require, require_close, require_dtype
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.adapters.verdict.compute_divergence",
    hints=(
        "logits.double().log_softmax(dim=-1) is log p, and does not overflow.",
        "p is log_p.exp(); sum p (log p - log q) over the last dimension.",
        "Clamp at 0.",
    ),
)


def check_by_hand(compute_divergence: Answer) -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3, and another value the other way round."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forth = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    back = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    require_close(compute_divergence(p, q), torch.tensor([forth]), "KL(p || q)", 1e-6)
    require_close(compute_divergence(q, p), torch.tensor([back]), "KL(q || p)", 1e-6)


def check_loops(compute_divergence: Answer) -> None:
    """Random logits, in loops over the vocabulary; one value a row."""
    torch.manual_seed(0)
    p, q = torch.randn(4, 6), torch.randn(4, 6)
    expected = []
    for a, b in zip(p.tolist(), q.tolist()):
        za, zb = math.fsum(map(math.exp, a)), math.fsum(map(math.exp, b))
        expected.append(math.fsum(math.exp(i) / za * ((i - math.log(za)) - (j - math.log(zb))) for i, j in zip(a, b)))
    found = compute_divergence(p, q)
    require_dtype(found, torch.float64, "KL")
    require_close(found, torch.tensor(expected, dtype=torch.float64), "KL", 1e-12)


def check_large(compute_divergence: Answer) -> None:
    """Logits of 1000 do not overflow."""
    p, q = torch.tensor([[1000.0, 0.0], [1000.0, 999.0]]), torch.tensor([[1000.0, 1.0], [1000.0, 999.0]])
    require_close(compute_divergence(p, q), torch.zeros(2), "KL", 1)


def check_never_negative(compute_divergence: Answer) -> None:
    """Distributions that differ in the last bit: 0 or more."""
    torch.manual_seed(1)
    p = torch.randn(2000, 5, dtype=torch.float64)
    found = compute_divergence(p, p + 1e-13 * torch.randn_like(p))
    require(float(found.min()) >= 0, f"KL is {float(found.min()):.3g}")
    require(float(found.max()) < 1e-12, f"KL is {float(found.max()):.3g} for equal distributions")
