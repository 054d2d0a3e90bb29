"""The Triton kernels of decoding: a low-rank product for each token, with the adapter of its row.

For a few tokens the product is a stream of A and B through memory, without tensor cores. Two kernels: s, then the
update of y. triton_blocks.py says what UPCAST is.
"""

# The arguments of a kernel have the types that Triton infers at the launch.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .triton_blocks import round_to


@triton.jit
def rows_shrink(
    x, A, owner, s, T, K, R, OWNED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """s = x A[owner]^T, one token a program.

    x [B * T, K], A [adapters, R, K], owner [B]; s [SPLIT, B * T, R] in float32. For owner -1 nothing is read or
    written. OWNED is false where all rows have the same adapter.
    """
    token, part = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(owner + token // T).to(tl.int32) if OWNED else token * 0
    if adapter >= 0:
        for first in range(0, R, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)  # [r]
            total = tl.zeros((BLOCK_R,), tl.float32)  # [r]
            for start in range(part * BLOCK_K, K, SPLIT * BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)  # [k]
                x_tile = tl.load(x + token.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)  # [k]
                A_at = A + (adapter.to(tl.int64) * R + r)[:, None] * K + k[None, :]  # [r, k]
                A_tile = tl.load(A_at, mask=(r < R)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)  # [r, k]
                total += tl.sum(A_tile * x_tile[None, :], axis=1)  # [r]
            s_at = s + (part.to(tl.int64) * tl.num_programs(0) + token) * R + r  # [r]
            tl.store(s_at, total, mask=r < R)


@triton.jit
def rows_expand(
    y,
    s,
    B,
    owner,
    scales,
    T,
    N,
    R,
    factor,
    OWNED: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y += scales[owner] s B[owner]^T in place (`factor` without OWNED), one token and BLOCK_N columns a program."""
    token = tl.program_id(0)
    adapter = tl.load(owner + token // T).to(tl.int32) if OWNED else token * 0
    if adapter >= 0:
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [n]
        scale = tl.load(scales + adapter).to(tl.float32) if OWNED else factor
        update = tl.zeros((BLOCK_N,), tl.float32)  # [n]
        for first in range(0, R, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)  # [r]
            total = tl.zeros((BLOCK_R,), tl.float32)  # [r]
            for part in tl.static_range(SPLIT):
                s_at = s + (part * tl.num_programs(0) + token) * R + r  # [r]
                total += tl.load(s_at, mask=r < R, other=0.0).to(tl.float32)  # [r]
            B_at = B + (adapter.to(tl.int64) * N + n)[:, None] * R + r[None, :]  # [n, r]
            B_tile = tl.load(B_at, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)  # [n, r]
            update += tl.sum(B_tile * total[None, :], axis=1)  # [n]
        y_at = y + token.to(tl.int64) * N + n  # [n]
        base = tl.load(y_at, mask=n < N, other=0.0).to(tl.float32)  # [n]
        tl.store(y_at, round_to(base + scale * update, y, UPCAST), mask=n < N)
