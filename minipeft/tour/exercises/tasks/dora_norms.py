"""The norms that DoRA divides by.

    ||W + s B A||       of each row, in float32        W [out, in], A [r, in], B [out, r]  ->  [out]

Source: Liu et al. 2024, "DoRA", eq. 5; the norm is a constant to the gradient (section 4.3). W + s B A is as large as
W, so it is not formed. Row by row, with <.,.> the sum over r:

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>

W may be bfloat16: widen to float32 before you square. Rounding may make the sum a little negative where the norm is 0:
then the norm is 0, not NaN.
"""

from __future__ import annotations

import torch

from minipeft.tour.exercises.judging import require, require_close, require_dtype
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.adapters.dora.compute_row_norms",
    hints=(
        "Check the identity by hand for one row w and one b [r]: (w + s A^T b)^2 has three terms.",
        "<W A^T, B> is ((W @ A.t()) * B).sum(dim=1): [out, r] before the sum.",
        "Clamp the sum of squares at 0 before the square root.",
    ),
)


def check_norms(compute_row_norms: Answer) -> None:
    """The norms equal those of W + s B A, formed in float64."""
    torch.manual_seed(0)
    for out, width, r, scale in ((5, 7, 2, 0.5), (1500, 12, 3, 2.0), (4, 3, 8, 1.25)):
        W, A, B = torch.randn(out, width), torch.randn(r, width), torch.randn(out, r)
        exact = torch.linalg.vector_norm(W.double() + scale * B.double() @ A.double(), dim=1)
        require_close(compute_row_norms(W, A, B, scale), exact, f"the norms of a [{out}, {width}] weight", 1e-5)


def check_bfloat16(compute_row_norms: Answer) -> None:
    """A bfloat16 weight is widened: the result is float32, and exact to float32's rounding."""
    torch.manual_seed(1)
    W, A, B = torch.randn(6, 64).bfloat16(), torch.randn(2, 64), torch.randn(6, 2)
    norms = compute_row_norms(W, A, B, 0.5)
    require_dtype(norms, torch.float32, "the norms")
    exact = torch.linalg.vector_norm(W.double() + 0.5 * B.double() @ A.double(), dim=1)
    require_close(norms, exact, "the norms of a bfloat16 weight", 1e-5)


def check_zero(compute_row_norms: Answer) -> None:
    """Where W = - s B A the norm is 0 and not NaN."""
    torch.manual_seed(2)
    A, B = torch.randn(3, 50), torch.randn(400, 3)
    norms = compute_row_norms(-0.3 * (B @ A), A, B, 0.3)
    require(not bool(norms.isnan().any()), "the norm of a row that is 0 is NaN")
    require(float(norms.max()) < 1e-2, "the norm of a row that is 0 is not 0")
    require(float(norms.min()) == 0, "no negative sum of squares became 0")


def check_no_gradient(compute_row_norms: Answer) -> None:
    """The norms are a constant to the gradient."""
    A, B = torch.ones(1, 2, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    require(not compute_row_norms(torch.ones(2, 2), A, B, 1.0).requires_grad, "the norms have a gradient")
