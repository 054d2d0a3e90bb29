"""Add up the parts of a sum.

    out = factor * ( parts[0] + parts[1] + ... )          parts [PARTS, M, N],  out [M, N]

Where a sum is divided among programs, each writes its part, and a last kernel adds the parts in order: without atomics,
so that two runs agree to the bit.

The M N numbers of a part stand one after the other, the parts one after the other: number i of part p is at
parts + p * M * N + i. out may be columns of a wider matrix: its rows are `stride_out` apart, so that entry (m, n) is at
out + m * stride_out + n. Program b handles the numbers b * BLOCK ... of the matrix; convert to int64 before you
multiply, because the matrix may have more than 2^31 entries.

parts may be 16 bits wide: add in float32 (`.to(tl.float32)` after the load). `round_to(total, out, UPCAST)` rounds to
the dtype of out.
"""

from __future__ import annotations

from typing import Any

import torch

from minipeft.tour.exercises.judging import require_close
from minipeft.tour.exercises.kernel_memory import confined
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft_kernels.triton_kernels.reduce",
    hints=(
        "As in the vector add: at = program * BLOCK + arange, inside = at < M * N.",
        "for p in range(0, PARTS): total += tl.load(parts + p * M * N + at, mask=inside, other=0.0).to(tl.float32); "
        "total begins as tl.zeros((BLOCK,), tl.float32).",
        "Number `at` is in row at // N and column at % N.",
    ),
    needs="triton",
)


def run(reduce: Any, count: int, m: int, n: int, factor: float, dtype: torch.dtype = torch.float32) -> None:
    """Add up, and compare with float64."""
    torch.manual_seed(0)
    parts = torch.randn(count, m, n).to(dtype)
    out = torch.full((m + 3, n + 5), 7.0).to(dtype)[:m, 2 : 2 + n]
    with confined({"parts": parts}, {"out": out}):
        reduce[(-(-m * n // 32),)](parts, out, count, m, n, out.stride(0), factor, UPCAST=True, BLOCK=32)
    what = f"out for parts [{count}, {m}, {n}], factor {factor}, {dtype}"
    require_close(out, factor * parts.double().sum(dim=0), what, 1e-6 if dtype == torch.float32 else 5e-3)


def check_two(reduce: Answer) -> None:
    """Two parts: a vector add."""
    run(reduce, 2, 4, 8, 1.0)


def check_parts(reduce: Answer) -> None:
    """One part, and five with a factor."""
    run(reduce, 1, 3, 32, 1.0)
    run(reduce, 5, 4, 16, -0.5)


def check_ragged(reduce: Answer) -> None:
    """Sizes that fill no whole block, and a single column."""
    run(reduce, 3, 7, 13, 2.0)
    run(reduce, 2, 37, 1, 1.0)
    run(reduce, 2, 1, 37, 1.0)


def check_bfloat16(reduce: Answer) -> None:
    """Parts in bfloat16 are added in float32 and rounded once."""
    run(reduce, 4, 5, 9, 1.0, torch.bfloat16)
