"""The fused LoRA linear.

    y = factor s B^T + bias + x W^T          x [M, K], W [N, K], bias [N], s [M, R], B [N, R], y [M, N];  s = x A^T

Source: Hu et al. 2021, eq. 3. In torch y is written by x W^T, then read and written again to add the update. Here one
program computes a tile of y, BLOCK_M rows and BLOCK_N columns: the sum begins at the low-rank product, goes on with
bias and x W^T, and is written once.

The library's pieces are there (minipeft_kernels/triton_blocks.py):

    locate_tile(M, N, BLOCK_M, BLOCK_N, GROUP)        the first row and column of this program's tile
    multiply_low_rank(s, B, rows, columns, M, N, R, stride_s, False, BLOCK_M, BLOCK_N, BLOCK_R, UPCAST)
                                                      s B^T of the tile [m, n] in float32; rows [m] and columns [n]
    add_product(total, x, W, absmax, table, rows, column, M, N, K, stride_x, False, NF4, BLOCK_N, BLOCK_K, UPCAST)
                                                      total + x W^T
    round_to(total, y, UPCAST)                        the tile in the dtype of y

y is contiguous: entry (m, n) is at y + m * N + n; convert rows to int64 before you multiply by N. Rows beyond M and
columns beyond N must not be written. bias is read only if BIAS, and may be 16 bits wide. absmax, table and NF4 are for
a weight in 4 bits: pass them on.
"""

from __future__ import annotations

from typing import Any

import torch

from minipeft.tour.exercises.judging import require_close
from minipeft.tour.exercises.kernel_memory import confined
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft_kernels.triton_kernels.seeded_forward",
    hints=(
        "row, column = locate_tile(...); rows = row + tl.arange(0, BLOCK_M), columns = column + tl.arange(0, BLOCK_N).",
        "total = multiply_low_rank(...) * factor, then the bias as [None, :], then add_product.",
        "The mask of the store is (rows < M)[:, None] & (columns < N)[None, :].",
    ),
    needs="triton",
)


def run(kernel: Any, M: int, N: int, K: int, R: int, bias: bool, dtype: torch.dtype = torch.float32) -> None:
    """Run the kernel on all tiles and compare with float64."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape).to(dtype)
    x, W, s, B = draw(M, K + 3)[:, :K], draw(N, K), draw(M, R + 2)[:, :R], draw(N, R)
    b, y = draw(N), torch.full((M, N), 7.0).to(dtype)
    tiles = -(-M // 16) * -(-N // 16)
    blocks = {"GROUP": 2, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_R": 16}
    arguments = (x, W, W, W, b if bias else x, s, B, y, M, N, K, R, x.stride(0), s.stride(0), 0.75)
    with confined({"x": x, "W": W, "s": s, "B": B, **({"bias": b} if bias else {})}, {"y": y}):
        kernel[(tiles,)](*arguments, BIAS=bias, NF4=False, UPCAST=True, **blocks)
    exact = 0.75 * s.double() @ B.double().t() + x.double() @ W.double().t() + (b.double() if bias else 0)
    what = f"y for M={M}, N={N}, K={K}, R={R}, bias={bias}, {dtype}"
    require_close(y, exact, what, 1e-5 if dtype == torch.float32 else 5e-3)


def check_one_tile(kernel: Answer) -> None:
    """A single tile without a bias."""
    run(kernel, 16, 16, 16, 16, False)


def check_bias(kernel: Answer) -> None:
    """With a bias, which is added once and not scaled."""
    run(kernel, 16, 16, 32, 8, True)


def check_tiles(kernel: Answer) -> None:
    """Several tiles whose edges lie beyond the matrix; x and s are columns of wider matrices."""
    run(kernel, 33, 21, 19, 5, True)
    run(kernel, 18, 36, 20, 20, False)


def check_bfloat16(kernel: Answer) -> None:
    """bfloat16 tensors are summed in float32 and rounded once."""
    run(kernel, 18, 20, 24, 4, True, torch.bfloat16)
