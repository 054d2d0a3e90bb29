"""LoRA's equation.

    y_i = x W_i^T + b_i + s_i (drop(x) A_i^T) B_i^T        for each projection i of the same x

Source: Hu et al. 2021, "LoRA", eq. 3. W is frozen; A [r, K] and B [N, r] are trained, and s = alpha / r.

`parts` is a list of `Part(weight [N, K], bias [N] or None, lora_A [r, K], lora_B [N, r], scale)`. x is [..., K], in any
dtype; A and B may be in float32 beside a bfloat16 x and W, and y has the dtype of x. `drop` is torch's dropout, drawn
once for all parts: it acts on the input of A only, never on that of W. `seed` belongs to another implementation: with
dropout, a seed that is not None is a ValueError; without dropout it is ignored.
"""

from __future__ import annotations

import torch

from minipeft.adapters.lora import Part
from minipeft.tour.exercises.judging import require, require_close, require_dtype
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft_kernels.reference.trace",
    hints=(
        "F.linear(x, W, b) is x W^T + b. Multiply by A first: [..., K] -> [..., r] -> [..., N]; B A is never formed.",
        "Draw F.dropout(x, dropout) once, before you go through the parts; W gets x itself.",
        "For each part: F.linear(x, W, b) + s * F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype)).",
    ),
)


def make_part(rows: int, rank: int, columns: int, bias: bool = True) -> Part:
    """A projection with random tensors in float64."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    return Part(draw(rows, columns), draw(rows) if bias else None, draw(rank, columns), draw(rows, rank), 0.75)


def check_one_projection(trace: Answer) -> None:
    """y equals the sum written out in loops, entry by entry."""
    torch.manual_seed(0)
    x, part = torch.randn(3, 5, dtype=torch.float64), make_part(4, 2, 5)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for m in range(3):
        for n in range(4):
            assert part.bias is not None
            update = sum(
                float(part.lora_B[n, r]) * float(part.lora_A[r, k]) * float(x[m, k]) for r in range(2) for k in range(5)
            )
            base = sum(float(part.weight[n, k]) * float(x[m, k]) for k in range(5))
            expected[m, n] = base + float(part.bias[n]) + part.scale * update
    ys = trace(x, [part], 0.0, None)
    require(isinstance(ys, list) and len(ys) == 1, "one part gives a list of one y")
    require_close(ys[0], expected, "y", 1e-12)


def check_several_projections(trace: Answer) -> None:
    """Parts of other widths and ranks, one without a bias, give one y each; x may have any leading dimensions."""
    torch.manual_seed(1)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    parts = [make_part(4, 2, 6), make_part(7, 3, 6, bias=False)]
    ys = trace(x, parts, 0.0, 5)
    require(len(ys) == 2, f"two parts gave {len(ys)} outputs")
    for y, part in zip(ys, parts):
        merged = part.weight + part.scale * part.lora_B @ part.lora_A
        require_close(y, x @ merged.t() + (0 if part.bias is None else part.bias), "y", 1e-12)


def check_dtype(trace: Answer) -> None:
    """A and B in float32 beside a bfloat16 x: y is bfloat16."""
    torch.manual_seed(2)
    weight, A, B, _, _ = *(torch.randn(4, 4) for _ in range(3)), None, None
    part = Part(weight.bfloat16(), None, A, B, 1.0)
    (y,) = trace(torch.ones(2, 4, dtype=torch.bfloat16), [part], 0.0, None)
    require_dtype(y, torch.bfloat16, "y")


def check_dropout(trace: Answer) -> None:
    """Dropout acts on the input of A alone, scales by 1 / (1 - p), and is the same for all parts."""
    torch.manual_seed(3)
    one = torch.ones(1, 1)
    part = Part(7 * one, None, one, one, 2.0)
    first, second = trace(torch.ones(4000, 1), [part, part], 0.25, None)
    dropped = first[:, 0] == 7
    kept = first[~dropped, 0]
    require(0.2 < float(dropped.float().mean()) < 0.3, "with dropout 0.25 about a quarter of the updates is 0")
    require_close(kept, torch.full_like(kept, 7 + 2 / 0.75), "y where x was kept", 1e-6)
    require_close(second, first, "y of a second part with the same tensors", 0)


def check_seed(trace: Answer) -> None:
    """A seed beside dropout is a ValueError."""
    part = make_part(2, 1, 2)
    try:
        trace(torch.ones(1, 2, dtype=torch.float64), [part], 0.5, 3)
    except ValueError:
        return
    raise AssertionError("dropout=0.5 with seed=3 gave an answer")
