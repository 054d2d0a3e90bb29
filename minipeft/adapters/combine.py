"""A weighted sum of LoRA updates as one LoRA: U = sum_i w_i s_i B_i A_i in each linear.

    cat       A = [w_i s_i A_i],  B = [B_i]                        exact; the rank is the sum of the ranks
    svd       the best approximation of U of the given rank        Eckart & Young 1936
    linear    A = sum_i sign_i sqrt(|w_i s_i|) A_i,  B = sum_i sqrt(|w_i s_i|) B_i      all of one rank

"linear" follows PEFT's add_weighted_adapter: B A contains products of one adapter's B with another's A, so it is
not U. `relative_error` says how far each is from U.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minipeft.errors import InputError


class Term(NamedTuple):
    """One adapter's update in a linear, with the factor w s of B A."""

    factor: float
    A: Tensor  # [r, in]
    B: Tensor  # [out, r]


Pair = tuple[Tensor, Tensor]  # A [r, in], B [out, r], of scale 1


def concatenate(terms: Sequence[Term], rank: int | None) -> Pair:
    """Represent U exactly; the rank is the sum of the ranks."""
    A = torch.cat([term.factor * term.A for term in terms])  # [sum r, in]
    return A, torch.cat([term.B for term in terms], dim=1)  # [out, sum r]


def truncate(terms: Sequence[Term], rank: int | None) -> Pair:
    """Approximate U by the best update of this rank (default the terms' largest), without forming U.

    B A = Q_B (R_B R_A^T) Q_A^T, and the singular values are those of the small matrix in the middle.
    """
    A, B = concatenate(terms, None)
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.t())  # [out, k], [k, R]; [in, l], [l, R]
    U, S, Vt = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)  # [k, m], [m], [m, l]
    rank = rank or max(len(term.A) for term in terms)
    A, B = Vt[:rank] @ Q_A.t(), Q_B @ (U[:, :rank] * S[:rank])  # [r, in], [out, r]
    missing = rank - len(A)  # a rank beyond that of U
    return torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))


def average(terms: Sequence[Term], rank: int | None) -> Pair:
    """Sum the As and the Bs, each with its weight.

    Raises:
        InputError: the ranks differ.
    """
    ranks = {len(term.A) for term in terms}
    if len(ranks) > 1:
        hint = 'Combine them by "svd" or "cat"'
        raise InputError(f"adds matrices of one rank, and these have {sorted(ranks)}", where="linear", hint=hint)
    roots = [math.sqrt(abs(term.factor)) for term in terms]
    A = sum(math.copysign(root, term.factor) * term.A for root, term in zip(roots, terms))
    B = sum(root * term.B for root, term in zip(roots, terms))
    return A, B  # type: ignore[return-value]


WAYS: dict[str, Callable[[Sequence[Term], int | None], Pair]] = {"cat": concatenate, "svd": truncate, "linear": average}


def compute_squared_errors(terms: Sequence[Term], pair: Pair) -> tuple[float, float]:
    """Compute ||B A - U||^2 and ||U||^2 from the factors alone: <B A, D C> = <B^T D, A C^T>, in float64."""
    A, B = (t.double() for t in concatenate(terms, None))
    own_A, own_B = (t.double() for t in pair)
    both_A, both_B = torch.cat([own_A, -A]), torch.cat([own_B, B], dim=1)
    square = lambda A, B: max(0.0, ((B.t() @ B) * (A @ A.t())).sum().item())
    return square(both_A, both_B), square(A, B)
