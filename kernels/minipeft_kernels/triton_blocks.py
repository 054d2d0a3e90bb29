"""The functions that the Triton kernels are made of: the dropout mask, dtypes, and products of tiles.

Shapes at line ends are those of a tile. Every load has a mask and reads 0 outside the matrix, so M, N, K and r may have
any size.

UPCAST widens tiles to float32 as soon as they are loaded. It is for Triton's interpreter, whose bfloat16 arithmetic is
wrong (it computes on the raw bits); on a GPU it is off and the tensor cores get the 16-bit tiles. A loaded 16-bit tile
must therefore pass through `widen` or `.to(tl.float32)` before any arithmetic.
"""

# The arguments of a kernel have the types that Triton infers at the launch.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B1)
MIX_1 = tl.constexpr(0x7FEB352D)
MIX_2 = tl.constexpr(0x846CA68B)
KEYS = ["low", "high", "limit"]  # not specialized: a new seed must not recompile a kernel


@triton.jit
def mix(h, key):
    """dropout._mix: each input bit moves each output bit. h and key are uint32."""
    h = (h ^ (h >> 16)) * MIX_1 + key
    h = (h ^ (h >> 15)) * MIX_2
    return h ^ (h >> 16)


@triton.jit
def make_keep_mask(rows, column, low, high, limit, WIDTH: tl.constexpr):
    """dropout.make_keep_mask for these rows and the WIDTH columns from `column` (even): one hash decides two columns.

    limit is (drops - 32768) * 65536, so that the high half is compared in place, without a shift.
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
def widen(tile, UPCAST: tl.constexpr):
    """Return a loaded tile as an operand of a product: float32 under UPCAST, else as it is."""
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def round_to(total, out, UPCAST: tl.constexpr):
    """Round a float32 sum to the nearest value of `out`'s dtype; the interpreter would truncate bfloat16."""
    if UPCAST and out.dtype.element_ty == tl.bfloat16:
        bits = total.to(tl.uint32, bitcast=True)
        total = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return total.to(out.dtype.element_ty)


@triton.jit
def multiply_add(a, b, total, UPCAST: tl.constexpr):
    """total + a b on the tensor cores, accumulated in float32."""
    return tl.dot(widen(a, UPCAST), widen(b, UPCAST), total, input_precision="ieee")


@triton.jit
def apply_dropout(tile, rows, column, low, high, limit, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """drop(tile), without the factor 1 / keep."""
    tile = widen(tile, UPCAST)
    return tl.where(make_keep_mask(rows, column, low, high, limit, WIDTH), tile, 0.0)


@triton.jit
def locate_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return the first row and column of the program's tile: bands of GROUP rows of tiles, for L2 reuse."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = program // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    inside = program % (GROUP * tiles_n)
    return (band * GROUP + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def load_nf4(codes, absmax, table, rows, column, N, K, like, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """W[rows, column : column + WIDTH] of an NF4 weight [N, K], in the dtype of `like`: table[code] * absmax. [n, k]

    A byte holds the codes of two neighbours, the first in its high half; K and column are even. A block has 64 codes.
    """
    pairs = column // 2 + tl.arange(0, WIDTH // 2)  # [k/2]
    at = rows.to(tl.int64)[:, None] * (K // 2) + pairs[None, :]  # [n, k/2] in codes
    inside = (rows < N)[:, None] & (pairs < K // 2)[None, :]  # [n, k/2]
    byte = tl.load(codes + at, mask=inside, other=0).to(tl.int32)  # [n, k/2]
    scale = tl.load(absmax + at // 32, mask=inside, other=0.0).to(tl.float32)  # [n, k/2]
    first = tl.load(table + (byte >> 4)).to(tl.float32) * scale  # [n, k/2]
    second = tl.load(table + (byte & 15)).to(tl.float32) * scale  # [n, k/2]
    return round_to(tl.interleave(first, second), like, UPCAST)  # [n, k]


@triton.jit
def add_product(
    total,
    a,
    w,
    absmax,
    table,
    rows,
    column,
    M,
    N,
    K,
    stride_a,
    W_ROWS_ARE_K: tl.constexpr,
    NF4: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """total + a w, summed along K. a [M, K]; w is [N, K], read transposed (forward), or [K, N] (backward).

    With NF4, w holds the codes, and a tile of the weight is dequantized in registers; absmax and table are not read
    otherwise.
    """
    columns = column + tl.arange(0, BLOCK_N)  # [n]
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
        if NF4 and W_ROWS_ARE_K:
            weight = load_nf4(w, absmax, table, start + k, column, K, N, a, BLOCK_N, UPCAST)  # [k, n]
        elif NF4:
            weight = tl.trans(load_nf4(w, absmax, table, columns, start, N, K, a, BLOCK_K, UPCAST))  # [k, n]
        else:
            weight = tl.load(w_at, mask=inside[:, None] & (columns < N)[None, :], other=0.0)  # [k, n]
        total = multiply_add(tile, weight, total, UPCAST)  # [m, n]
        a_at += BLOCK_K
        w_at += step
    return total


@triton.jit
def multiply_low_rank(
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
    """s b, where the large product starts. s [M, R]; b is [N, R], read transposed (forward), or [R, N] (backward)."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # [m, n]
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)  # [r]
        s_at = s + rows.to(tl.int64)[:, None] * stride_s + r[None, :]  # [m, r]
        s_tile = tl.load(s_at, mask=(rows < M)[:, None] & (r < R)[None, :], other=0.0)  # [m, r]
        b_at = b + (r[:, None] * N + columns[None, :] if B_ROWS_ARE_R else columns[None, :] * R + r[:, None])  # [r, n]
        b_tile = tl.load(b_at, mask=(r < R)[:, None] & (columns < N)[None, :], other=0.0)  # [r, n]
        total = multiply_add(s_tile, b_tile, total, UPCAST)  # [m, n]
    return total
