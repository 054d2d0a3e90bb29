"""The Triton kernels of the LoRA linear. Importing this file imports Triton, so only a Triton backend does.

A kernel is the text of ONE program: it computes one tile of the output, and `tl.program_id` says which. Shapes at line
ends are those of the tile. Every load has a mask, so any M, N, K and r will do; a masked entry is read as 0.

All sums are float32, formed in a fixed order: no atomics, so two runs agree to the bit. Where a sum is divided among
programs each writes its part, and `reduce` adds the parts in order.

UPCAST widens tiles to float32 as soon as they are loaded. It is for Triton's interpreter, which computes nonsense on
bfloat16 (it works on the raw bits); on a GPU it is off and the tensor cores get the 16-bit tiles. For the same reason
no arithmetic here touches a loaded 16-bit tile but after `wide` or `.to(tl.float32)`.
"""

# The arguments of a kernel have the types that Triton infers at the launch.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B1)
MIX_1 = tl.constexpr(0x7FEB352D)
MIX_2 = tl.constexpr(0x846CA68B)
KEYS = ["low", "high", "limit"]  # a seed must not compile a kernel anew


@triton.jit
def mix(h, key):
    """dropout._mix: each input bit moves each output bit. h and key are uint32."""
    h = (h ^ (h >> 16)) * MIX_1 + key
    h = (h ^ (h >> 15)) * MIX_2
    return h ^ (h >> 16)


@triton.jit
def keep_mask(rows, column, low, high, limit, WIDTH: tl.constexpr):
    """dropout.keep_mask for the given rows and the WIDTH columns from `column` (even): one hash serves two columns.

    limit is (drops - 32768) * 65536, so that the high half is compared where it stands, without a shift.
    """
    zero = tl.zeros_like(rows).to(tl.uint32)  # [m]
    key = mix(rows.to(tl.uint32) * GOLDEN + low.to(tl.uint32), zero)  # [m]
    key_2 = mix(key ^ high.to(tl.uint32), zero)  # [m]
    pair = (column // 2 + tl.arange(0, WIDTH // 2)).to(tl.uint32) * GOLDEN  # [n/2]
    h = mix(pair[None, :] + key[:, None], key_2[:, None])  # [m, n/2]
    even = (h << 16).to(tl.int32, bitcast=True) >= limit  # [m, n/2]
    odd = h.to(tl.int32, bitcast=True) >= limit  # [m, n/2]
    return tl.interleave(even, odd)  # [m, n]


@triton.jit
def wide(tile, UPCAST: tl.constexpr):
    """Return a loaded tile as it should enter a product."""
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def narrow(total, out, UPCAST: tl.constexpr):
    """Round a float32 sum to the dtype of `out`, to nearest; by hand for the interpreter, which would cut bfloat16."""
    if UPCAST and out.dtype.element_ty == tl.bfloat16:
        bits = total.to(tl.uint32, bitcast=True)
        total = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return total.to(out.dtype.element_ty)


@triton.jit
def product(a, b, total, UPCAST: tl.constexpr):
    """total + a b, on the tensor cores, with a float32 sum."""
    return tl.dot(wide(a, UPCAST), wide(b, UPCAST), total, input_precision="ieee")


@triton.jit
def dropped(tile, rows, column, low, high, limit, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """drop(tile), without the factor 1 / keep."""
    tile = wide(tile, UPCAST)
    return tl.where(keep_mask(rows, column, low, high, limit, WIDTH), tile, 0.0)


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
            tile = dropped(tile, rows, start, low, high, limit, BLOCK_K, UPCAST)  # [m, k]
        total = product(
            tile, tl.load(A_at, mask=inside[:, None] & (r < R)[None, :], other=0.0), total, UPCAST
        )  # [m, r]
        x_at += SPLIT * BLOCK_K
        A_at += SPLIT * BLOCK_K
    s_at = s + (part.to(tl.int64) * M + rows)[:, None] * stride_s + r[None, :]  # [m, r]
    tl.store(s_at, narrow(total, s, UPCAST), mask=(rows < M)[:, None] & (r < R)[None, :])


@triton.jit
def place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Say which tile a program computes: down GROUP tiles, then right; neighbours share what the L2 cache holds."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = program // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    inside = program % (GROUP * tiles_n)
    return (band * GROUP + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def add_product(
    total,
    a,
    w,
    rows,
    columns,
    M,
    N,
    K,
    stride_a,
    W_ROWS_ARE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """total + a w, tile by tile along K. a [M, K]; w is [N, K] read across (forward), or [K, N] (backward)."""
    k = tl.arange(0, BLOCK_K)  # [k]
    a_at = a + rows.to(tl.int64)[:, None] * stride_a + k[None, :]  # [m, k]
    if W_ROWS_ARE_K:
        w_at = w + k.to(tl.int64)[:, None] * N + columns[None, :]  # [k, n]
        step = BLOCK_K * N
    else:
        w_at = w + columns.to(tl.int64)[None, :] * K + k[:, None]  # [k, n]
        step = BLOCK_K
    for start in range(0, K, BLOCK_K):
        inside = start + k < K  # [k]
        tile = tl.load(a_at, mask=(rows < M)[:, None] & inside[None, :], other=0.0)  # [m, k]
        weight = tl.load(w_at, mask=inside[:, None] & (columns < N)[None, :], other=0.0)  # [k, n]
        total = product(tile, weight, total, UPCAST)  # [m, n]
        a_at += BLOCK_K
        w_at += step
    return total


@triton.jit
def rank_r(
    s,
    b,
    rows,
    columns,
    M,
    N,
    R,
    stride_s,
    B_ROWS_ARE_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """s b, with which the big product begins. s [M, R]; b is [N, R] read across (forward), or [R, N] (backward)."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # [m, n]
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)  # [r]
        s_at = s + rows.to(tl.int64)[:, None] * stride_s + r[None, :]  # [m, r]
        s_tile = tl.load(s_at, mask=(rows < M)[:, None] & (r < R)[None, :], other=0.0)  # [m, r]
        b_at = b + (r[:, None] * N + columns[None, :] if B_ROWS_ARE_R else columns[None, :] * R + r[:, None])  # [r, n]
        b_tile = tl.load(b_at, mask=(r < R)[:, None] & (columns < N)[None, :], other=0.0)  # [r, n]
        total = product(s_tile, b_tile, total, UPCAST)  # [m, n]
    return total


@triton.jit
def seeded_forward(
    x,
    W,
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
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = factor s B^T + bias + x W^T: the sum starts at the rank-r product, so y is written once and never read."""
    row, column = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)  # [m], [n]
    total = rank_r(s, B, rows, columns, M, N, R, stride_s, False, BLOCK_M, BLOCK_N, BLOCK_R, UPCAST) * factor  # [m, n]
    if BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]  # [m, n]
    total = add_product(total, x, W, rows, columns, M, N, K, stride_x, False, BLOCK_K, UPCAST)  # [m, n]
    y_at = y + rows.to(tl.int64)[:, None] * N + columns[None, :]  # [m, n]
    tl.store(y_at, narrow(total, y, UPCAST), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=KEYS)
def seeded_backward(
    dy_0,
    dy_1,
    dy_2,
    W_0,
    W_1,
    W_2,
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
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dx = drop(dS A) + dY_0 W_0 + dY_1 W_1 + dY_2 W_2: up to three projections of one x; dx is written once."""
    row, column = place(M, K, BLOCK_M, BLOCK_N, GROUP)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)  # [m], [k]
    total = rank_r(dS, A, rows, columns, M, K, R, stride_s, True, BLOCK_M, BLOCK_N, BLOCK_R, UPCAST)  # [m, k]
    if DROPOUT:
        total = tl.where(keep_mask(rows, column, low, high, limit, BLOCK_N), total, 0.0)  # [m, k]
    total = add_product(total, dy_0, W_0, rows, columns, M, K, N_0, N_0, True, BLOCK_K, UPCAST)  # [m, k]
    if PARTS > 1:
        total = add_product(total, dy_1, W_1, rows, columns, M, K, N_1, N_1, True, BLOCK_K, UPCAST)  # [m, k]
    if PARTS > 2:
        total = add_product(total, dy_2, W_2, rows, columns, M, K, N_2, N_2, True, BLOCK_K, UPCAST)  # [m, k]
    dx_at = dx + rows.to(tl.int64)[:, None] * K + columns[None, :]  # [m, k]
    tl.store(dx_at, narrow(total, dx, UPCAST), mask=(rows < M)[:, None] & (columns < K)[None, :])


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
        dS_tile = product(tile, B_tile, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), UPCAST)  # [m, r]
        dS_at = dS + (tl.program_id(0).to(tl.int64) * M + rows)[:, None] * R + r[None, :]  # [m, r]
        tl.store(dS_at, dS_tile, mask=inside)
        s_tile = tl.load(s + rows.to(tl.int64)[:, None] * stride_s + r[None, :], mask=inside, other=0.0)  # [m, r]
        total = product(tl.trans(tile), s_tile, total, UPCAST)  # [n, r]
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
            tile = dropped(tile, rows, column, low, high, limit, BLOCK_K, UPCAST)  # [m, k]
        inside = (rows < M)[:, None] & (r < R)[None, :]  # [m, r]
        dS_tile = tl.load(dS + rows.to(tl.int64)[:, None] * stride_s + r[None, :], mask=inside, other=0.0)  # [m, r]
        total = product(tl.trans(dS_tile), tile, total, UPCAST)  # [r, k]
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
    tl.store(out + at // N * stride_out + at % N, narrow(total * factor, out, UPCAST), mask=inside)


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
    total = rank_r(s, b, rows, columns, M, N, R, stride_s, B_ROWS_ARE_R, BLOCK_M, BLOCK_N, BLOCK_R, UPCAST)  # [m, n]
    if DROPOUT:
        total = tl.where(keep_mask(rows, column, low, high, limit, BLOCK_N), total, 0.0)  # [m, n]
    y_at = y + rows.to(tl.int64)[:, None] * N + columns[None, :]  # [m, n]
    inside = (rows < M)[:, None] & (columns < N)[None, :]  # [m, n]
    total += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)  # [m, n]
    tl.store(y_at, narrow(total, y, UPCAST), mask=inside)


@triton.jit
def rows_shrink(
    x, A, owner, s, T, K, R, OWNED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """s = x A[owner]^T for one token a program: a few rows are a stream of A, not a product for tensor cores.

    x [B * T, K], A [adapters, R, K], owner [B]; s [SPLIT, B * T, R] in float32. An owner of -1 reads and writes
    nothing; without owners there is one adapter.
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
    """y += scales[owner] s B[owner]^T in place (factor where no one owns), one token and BLOCK_N columns a program."""
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
        tl.store(y_at, narrow(base + scale * update, y, UPCAST), mask=n < N)
