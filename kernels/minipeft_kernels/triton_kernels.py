"""The Triton kernels of training, forward and backward. Importing this file imports Triton; only Triton backends do.

A kernel is the code of ONE program: it computes one tile of the output, which `tl.program_id` selects. Shapes at line
ends are those of the tile; triton_blocks.py has the functions called here, and says what UPCAST is.

All sums are float32 in a fixed order, without atomics, so two runs agree to the bit. Where a sum is divided among
programs, each writes its part and `reduce` adds the parts in order.
"""

# The arguments of a kernel have the types that Triton infers at the launch.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .triton_blocks import (
    KEYS,
    add_product,
    apply_dropout,
    locate_tile,
    make_keep_mask,
    multiply_add,
    multiply_low_rank,
    round_to,
)


@triton.jit(do_not_specialize=KEYS)
def shrink(
    x,
    A,
    s,
    M,
    K,
    R,
    stride_x,
    stride_s,
    low,
    high,
    limit,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """s = drop(x) A^T: one read of x. x [M, K], A [R, K]; s [SPLIT, M, R], K divided among SPLIT programs."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [m]
    part = tl.program_id(1)
    r = tl.arange(0, BLOCK_R)  # [r]
    k = part * BLOCK_K + tl.arange(0, BLOCK_K)  # [k]
    x_at = x + rows.to(tl.int64)[:, None] * stride_x + k[None, :]  # [m, k]
    A_at = A + r[None, :] * K + k[:, None]  # [k, r]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)  # [m, r]
    for start in range(part * BLOCK_K, K, SPLIT * BLOCK_K):
        inside = start + tl.arange(0, BLOCK_K) < K  # [k]
        tile = tl.load(x_at, mask=(rows < M)[:, None] & inside[None, :], other=0.0)  # [m, k]
        if DROPOUT:
            tile = apply_dropout(tile, rows, start, low, high, limit, BLOCK_K, UPCAST)  # [m, k]
        total = multiply_add(
            tile, tl.load(A_at, mask=inside[:, None] & (r < R)[None, :], other=0.0), total, UPCAST
        )  # [m, r]
        x_at += SPLIT * BLOCK_K
        A_at += SPLIT * BLOCK_K
    s_at = s + (part.to(tl.int64) * M + rows)[:, None] * stride_s + r[None, :]  # [m, r]
    tl.store(s_at, round_to(total, s, UPCAST), mask=(rows < M)[:, None] & (r < R)[None, :])


@triton.jit
def seeded_forward(
    x,
    W,
    absmax,
    table,
    bias,
    s,
    B,
    y,
    M,
    N,
    K,
    R,
    stride_x,
    stride_s,
    factor,
    BIAS: tl.constexpr,
    NF4: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = factor s B^T + bias + x W^T: the sum starts at the rank-r product; y is written once, never read."""
    row, column = locate_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)  # [m], [n]
    total = (
        multiply_low_rank(s, B, rows, columns, M, N, R, stride_s, False, BLOCK_M, BLOCK_N, BLOCK_R, UPCAST) * factor
    )  # [m, n]
    if BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]  # [m, n]
    total = add_product(
        total, x, W, absmax, table, rows, column, M, N, K, stride_x, False, NF4, BLOCK_N, BLOCK_K, UPCAST
    )  # [m, n]
    y_at = y + rows.to(tl.int64)[:, None] * N + columns[None, :]  # [m, n]
    tl.store(y_at, round_to(total, y, UPCAST), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=KEYS)
def seeded_backward(
    dy_0,
    dy_1,
    dy_2,
    W_0,
    W_1,
    W_2,
    absmax_0,
    absmax_1,
    absmax_2,
    table,
    dS,
    A,
    dx,
    M,
    K,
    N_0,
    N_1,
    N_2,
    R,
    stride_s,
    low,
    high,
    limit,
    PARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    NF4: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dx = drop(dS A) + dY_0 W_0 + dY_1 W_1 + dY_2 W_2: up to three projections of one x; dx is written once."""
    row, column = locate_tile(M, K, BLOCK_M, BLOCK_N, GROUP)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)  # [m], [k]
    total = multiply_low_rank(
        dS, A, rows, columns, M, K, R, stride_s, True, BLOCK_M, BLOCK_N, BLOCK_R, UPCAST
    )  # [m, k]
    if DROPOUT:
        total = tl.where(make_keep_mask(rows, column, low, high, limit, BLOCK_N), total, 0.0)  # [m, k]
    total = add_product(
        total, dy_0, W_0, absmax_0, table, rows, column, M, K, N_0, N_0, True, NF4, BLOCK_N, BLOCK_K, UPCAST
    )  # [m, k]
    if PARTS > 1:
        total = add_product(
            total, dy_1, W_1, absmax_1, table, rows, column, M, K, N_1, N_1, True, NF4, BLOCK_N, BLOCK_K, UPCAST
        )  # [m, k]
    if PARTS > 2:
        total = add_product(
            total, dy_2, W_2, absmax_2, table, rows, column, M, K, N_2, N_2, True, NF4, BLOCK_N, BLOCK_K, UPCAST
        )  # [m, k]
    dx_at = dx + rows.to(tl.int64)[:, None] * K + columns[None, :]  # [m, k]
    tl.store(dx_at, round_to(total, dx, UPCAST), mask=(rows < M)[:, None] & (columns < K)[None, :])


@triton.jit
def gradient_B(
    dy,
    B,
    s,
    dS,
    dB,
    M,
    N,
    R,
    stride_s,
    SLAB,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dS = dY B and dB = dY^T s from one read of dY [M, N]: a program walks down SLAB rows of BLOCK_N columns.

    Its part of dS is one of cdiv(N, BLOCK_N), its part of dB one of cdiv(M, SLAB): dS [parts, M, R], dB [parts, N, R].
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [n]
    slab = tl.program_id(1)
    r = tl.arange(0, BLOCK_R)  # [r]
    small = (columns < N)[:, None] & (r < R)[None, :]  # [n, r]
    B_tile = tl.load(B + columns[:, None] * R + r[None, :], mask=small, other=0.0)  # [n, r]
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)  # [n, r]
    for start in range(slab * SLAB, min(slab * SLAB + SLAB, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)  # [m]
        dy_at = dy + rows.to(tl.int64)[:, None] * N + columns[None, :]  # [m, n]
        tile = tl.load(dy_at, mask=(rows < M)[:, None] & (columns < N)[None, :], other=0.0)  # [m, n]
        inside = (rows < M)[:, None] & (r < R)[None, :]  # [m, r]
        dS_tile = multiply_add(tile, B_tile, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), UPCAST)  # [m, r]
        dS_at = dS + (tl.program_id(0).to(tl.int64) * M + rows)[:, None] * R + r[None, :]  # [m, r]
        tl.store(dS_at, dS_tile, mask=inside)
        s_tile = tl.load(s + rows.to(tl.int64)[:, None] * stride_s + r[None, :], mask=inside, other=0.0)  # [m, r]
        total = multiply_add(tl.trans(tile), s_tile, total, UPCAST)  # [n, r]
    dB_at = dB + (slab.to(tl.int64) * N + columns)[:, None] * R + r[None, :]  # [n, r]
    tl.store(dB_at, total, mask=small)


@triton.jit(do_not_specialize=KEYS)
def gradient_A(
    x,
    dS,
    dA,
    M,
    K,
    R,
    stride_x,
    stride_s,
    SLAB,
    low,
    high,
    limit,
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dA = dS^T drop(x) from one read of x [M, K]: dA [cdiv(M, SLAB), R, K], one part for each slab of rows."""
    column = tl.program_id(0) * BLOCK_K
    columns = column + tl.arange(0, BLOCK_K)  # [k]
    slab = tl.program_id(1)
    r = tl.arange(0, BLOCK_R)  # [r]
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)  # [r, k]
    for start in range(slab * SLAB, min(slab * SLAB + SLAB, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)  # [m]
        x_at = x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :]  # [m, k]
        tile = tl.load(x_at, mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0)  # [m, k]
        if DROPOUT:
            tile = apply_dropout(tile, rows, column, low, high, limit, BLOCK_K, UPCAST)  # [m, k]
        inside = (rows < M)[:, None] & (r < R)[None, :]  # [m, r]
        dS_tile = tl.load(dS + rows.to(tl.int64)[:, None] * stride_s + r[None, :], mask=inside, other=0.0)  # [m, r]
        total = multiply_add(tl.trans(dS_tile), tile, total, UPCAST)  # [r, k]
    dA_at = dA + (slab.to(tl.int64) * R + r)[:, None] * K + columns[None, :]  # [r, k]
    tl.store(dA_at, total, mask=(r < R)[:, None] & (columns < K)[None, :])


@triton.jit
def reduce(parts, out, PARTS, M, N, stride_out, factor, UPCAST: tl.constexpr, BLOCK: tl.constexpr):
    """out = factor times the sum of parts [PARTS, M, N], added in order; out may be columns of a wider matrix."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [b]
    inside = at < M * N  # [b]
    total = tl.zeros((BLOCK,), tl.float32)  # [b]
    for _ in range(0, PARTS):
        total += tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)  # [b]
        parts += M * N
    tl.store(out + at // N * stride_out + at % N, round_to(total * factor, out, UPCAST), mask=inside)


@triton.jit(do_not_specialize=KEYS)
def expand_add(
    y,
    s,
    b,
    M,
    N,
    R,
    stride_s,
    low,
    high,
    limit,
    DROPOUT: tl.constexpr,
    B_ROWS_ARE_R: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y += drop(s b) in place, for the hybrid backend's backward: torch's addmm_ has no mask."""
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)  # [m], [n]
    total = multiply_low_rank(
        s, b, rows, columns, M, N, R, stride_s, B_ROWS_ARE_R, BLOCK_M, BLOCK_N, BLOCK_R, UPCAST
    )  # [m, n]
    if DROPOUT:
        total = tl.where(make_keep_mask(rows, column, low, high, limit, BLOCK_N), total, 0.0)  # [m, n]
    y_at = y + rows.to(tl.int64)[:, None] * N + columns[None, :]  # [m, n]
    inside = (rows < M)[:, None] & (columns < N)[None, :]  # [m, n]
    total += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)  # [m, n]
    tl.store(y_at, round_to(total, y, UPCAST), mask=inside)
