"""Several LoRA adapters as one of small rank.

    U = sum_i f_i B_i A_i          the best B A of rank r for it: keep the r largest singular values of U

Source: Eckart and Young 1936. Each term is `Term(factor f, A [r_i, in], B [out, r_i])`. Return A [r, in] and B [out, r]
with B A that best approximation; `rank` None means the largest r_i. U [out, in] is as large as a weight and must not be
formed: with k = sum r_i, concatenate all f_i A_i to A [k, in] and all B_i to B [out, k] (`concatenate(terms, None)`
does it), so that U = B A. Then

    B = Q_B R_B,   A^T = Q_A R_A          U = Q_B (R_B R_A^T) Q_A^T          and the SVD of the small matrix is U's

Where the rank exceeds what there is, fill with zeros: the shapes are always [r, in] and [out, r].
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from minipeft.adapters.combine import Term
from minipeft.tour.exercises.judging import require, require_close, require_equal
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.adapters.combine.truncate",
    hints=(
        "torch.linalg.qr(B) is [out, k], [k, k] for k <= out; torch.linalg.qr(A.t()) is [in, k], [k, k] for k <= in.",
        "U, S, Vt = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False): the k singular values of the whole.",
        "A = Vt[:r] @ Q_A.t(), B = Q_B @ (U[:, :r] * S[:r]); then torch.nn.functional.pad for the missing rows of A "
        "and columns of B.",
    ),
)


class Largest(TorchFunctionMode):
    """Keeps the number of entries of the largest tensor that an operator returned."""

    entries = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor):
                self.entries = max(self.entries, t.numel())
        return result


def make_terms(out: int, width: int, ranks: tuple[int, ...]) -> list[Term]:
    """Random updates with factors of both signs."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    return [Term((-1) ** i * (i + 0.5), draw(r, width), draw(out, r)) for i, r in enumerate(ranks)]


def check_best(truncate: Answer) -> None:
    """For each rank, B A is the sum of U's largest singular parts, by the SVD of U in float64."""
    terms = make_terms(9, 7, (2, 3))
    whole = torch.zeros(9, 7, dtype=torch.float64)
    for term in terms:
        whole += term.factor * term.B @ term.A
    U, S, Vt = torch.linalg.svd(whole, full_matrices=False)
    for rank in (1, 2, 4, 5):
        A, B = truncate(terms, rank)
        require_equal((list(A.shape), list(B.shape)), ([rank, 7], [9, rank]), f"the shapes of A and B at rank {rank}")
        require_close(B @ A, (U[:, :rank] * S[:rank]) @ Vt[:rank], f"B A at rank {rank}", 1e-9)


def check_default_rank(truncate: Answer) -> None:
    """Without a rank, it is that of the largest term."""
    for ranks in ((2, 3), (3, 1), (1,)):
        A, B = truncate(make_terms(9, 7, ranks), None)
        require_equal((len(A), B.shape[1]), (max(ranks), max(ranks)), f"the rank for terms of ranks {ranks}")


def check_missing(truncate: Answer) -> None:
    """A rank beyond that of U is filled with zeros, and B A is U."""
    (term,) = terms = make_terms(6, 5, (2,))
    A, B = truncate(terms, 4)
    require_equal((list(A.shape), list(B.shape)), ([4, 5], [6, 4]), "the shapes of A and B at rank 4")
    require_close(B @ A, term.factor * term.B @ term.A, "B A", 1e-9)
    require(bool((A[2:] == 0).all() and (B[:, 2:] == 0).all()), "the rows and columns beyond U's rank are zeros")


def check_small(truncate: Answer) -> None:
    """No tensor as large as U is formed: only tensors of k rows or columns."""
    terms = make_terms(200, 300, (2, 2))
    with Largest() as seen:
        truncate(terms, 3)
    require(seen.entries <= 5 * 300, f"a tensor of {seen.entries:,} entries was formed; U has {200 * 300:,}")
