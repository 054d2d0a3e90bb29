"""LoRA's first product in decoding, each token with its own adapter.

    s = x A[owner]^T          x [B * T, K],  A [adapters, R, K],  owner [B],  s [SPLIT, B * T, R] in float32

In decoding there are few tokens, and the product is a walk through A. One program a token: tl.program_id(0) is the
token, and row token // T of the batch owns it. `owner` -1 means no adapter: then nothing is read or written. Where
OWNED is false all tokens have adapter 0, and `owner` is not read.

K is divided among SPLIT programs: part = tl.program_id(1) takes the blocks of BLOCK_K columns number part, part +
SPLIT, part + 2 SPLIT, ..., and writes its own s[part] (`reduce` adds them up). R may be larger than BLOCK_R: go
through it in blocks. Every matrix is contiguous, with its last dimension at stride 1, and K and R are any numbers:
each load and store has a mask. x and A may be 16 bits wide: `.to(tl.float32)` after the load.
"""

from __future__ import annotations

from typing import Any

import torch

from minipeft.tour.exercises.judging import require, require_close
from minipeft.tour.exercises.kernel_memory import confined
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft_kernels.triton_decode.rows_shrink",
    hints=(
        "Begin with one adapter, SPLIT = 1 and R <= BLOCK_R: total [r], a loop over K in steps of BLOCK_K.",
        "A tile of A is [r, k]: (adapter * R + r)[:, None] * K + k[None, :]. tl.sum(A_tile * x_tile[None, :], axis=1) "
        "is its product with x.",
        "for start in range(part * BLOCK_K, K, SPLIT * BLOCK_K) goes through this program's blocks; s[part] begins at "
        "part * tl.num_programs(0) * R.",
    ),
    needs="triton",
)


def run(
    kernel: Any, rows: int, T: int, K: int, R: int, owner: list[int] | None, split: int = 1, block_r: int = 16
) -> None:
    """Run the kernel and compare each of its parts with float64."""
    torch.manual_seed(0)
    adapters = 1 if owner is None else max(owner) + 1
    x, A, parts = torch.randn(rows * T, K), torch.randn(adapters, R, K), torch.full((split, rows * T, R), 7.0)
    owners = torch.full((rows,), 99) if owner is None else torch.tensor(owner)
    reads = {"x": x, "A": A} if owner is None else {"x": x, "A": A, "owner": owners}
    settings = {"OWNED": owner is not None, "SPLIT": split, "BLOCK_R": block_r, "BLOCK_K": 16}
    with confined(reads, {"s": parts}):
        kernel[(rows * T, split)](x, A, owners, parts, T, K, R, **settings)
    taken = torch.arange(K) // 16 % split  # [K] the part that takes a column
    for token in range(rows * T):
        own = 0 if owner is None else owner[token // T]
        what = f"s of token {token} (K={K}, R={R}, T={T}, owner={own}, SPLIT={split})"
        if own < 0:
            require(bool((parts[:, token] == 7).all()), f"{what}: a token without an adapter was written")
        else:
            terms = A[own].double() * x[token].double()  # [R, K]
            exact = torch.stack([terms[:, taken == part].sum(dim=1) for part in range(split)])  # [SPLIT, R]
            require_close(parts[:, token], exact, f"{what}, [SPLIT, R]", 1e-5)


def check_one_adapter(kernel: Answer) -> None:
    """One adapter for all, K and R of whole blocks."""
    run(kernel, 2, 1, 32, 16, None)


def check_ragged(kernel: Answer) -> None:
    """K = 37 and R = 5 fill no whole blocks; R = 20 takes two blocks."""
    run(kernel, 2, 1, 37, 5, None)
    run(kernel, 1, 1, 20, 20, None)


def check_owners(kernel: Answer) -> None:
    """Each row has its own adapter, and one has none; two tokens a row."""
    run(kernel, 4, 2, 19, 6, [2, -1, 0, 1])


def check_split(kernel: Answer) -> None:
    """K is divided among three programs, each of which writes the part of its own blocks."""
    run(kernel, 2, 1, 70, 6, [1, 0], split=3)
    run(kernel, 1, 1, 20, 4, None, split=4)
