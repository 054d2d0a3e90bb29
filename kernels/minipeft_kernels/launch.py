"""Launch the kernels of triton_kernels.py: choose tiles and grids, allocate outputs. One function a kernel."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from . import tiles, triton_kernels
from .dropout import LEVELS, Dropout
from .reference import NF4Weight

Grid = tuple[int, ...]


def launch_kernel(kernel: object, grid: Grid, *arguments: object, **settings: object) -> None:
    """Launch a kernel on the device of its first tensor. All launches go through here; a test counts them."""
    if is_interpreted():
        kernel[grid](*arguments, **settings)  # type: ignore[index]
        return
    first = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(first.device):
        kernel[grid](*arguments, **settings)  # type: ignore[index]


def is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU: TRITON_INTERPRET=1 was set when triton was imported."""
    return bool(triton.knobs.runtime.interpret)


def shrink(x: Tensor, A: Tensor, drop: Dropout | None) -> Tensor:
    """s = drop(x) A^T, [M, R] in the dtype of x: one read of x for each 64 ranks."""
    s = x.new_empty(len(x), len(A))  # [M, R]
    for s_part, A_part in zip(s.split(tiles.RANKS[-1], dim=1), A.split(tiles.RANKS[-1])):
        _shrink_into(s_part, x, A_part, drop)
    return s


def _shrink_into(s: Tensor, x: Tensor, A: Tensor, drop: Dropout | None) -> None:
    """Write drop(x) A^T into s, which may be columns of a wider matrix."""
    m, k, r = *x.shape, len(A)
    architecture, processors = _describe_gpu(x)
    tile = tiles.pick("shrink", architecture, m, 0, k, r, drop is not None, processors)
    split = 1 if -(-m // tile.m) >= processors else tiles.SHRINK_SPLIT
    out = s if split == 1 else x.new_empty(split, m, r, dtype=torch.float32)  # [M, R] or [4, M, R]
    launch_kernel(
        triton_kernels.shrink,
        (-(-m // tile.m), split),
        x,
        A,
        out,
        m,
        k,
        r,
        x.stride(0),
        out.stride(-2),
        *_get_mask_arguments(drop),
        DROPOUT=drop is not None,
        SPLIT=split,
        BLOCK_M=tile.m,
        BLOCK_R=tiles.pad_rank(r),
        BLOCK_K=tile.k,
        **get_settings(tile),
    )
    if split > 1:
        reduce(out, s)


def seeded_forward(
    x: Tensor, W: Tensor | NF4Weight, bias: Tensor | None, s: Tensor, B: Tensor, factor: float
) -> Tensor:
    """y = x W^T + bias + factor s B^T, [M, N]: one product, y written once."""
    (m, k), (n, r) = x.shape, B.shape
    y = x.new_empty(m, n)  # [M, N]
    architecture, processors = _describe_gpu(x)
    nf4 = isinstance(W, NF4Weight)
    tile = tiles.pick("seeded_forward", architecture, m, n, k, r, False, processors, nf4=nf4)
    launch_kernel(
        triton_kernels.seeded_forward,
        (-(-m // tile.m) * -(-n // tile.n),),
        x,
        *(W if nf4 else (W, W, W)),
        x if bias is None else bias,
        s,
        B,
        y,
        m,
        n,
        k,
        r,
        x.stride(0),
        s.stride(0),
        factor,
        BIAS=bias is not None,
        NF4=nf4,
        GROUP=tiles.GROUP,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=tiles.STEP,
        **get_settings(tile),
    )
    return y


def seeded_backward(
    dys: Sequence[Tensor], weights: Sequence[Tensor] | Sequence[NF4Weight], dS: Tensor, A: Tensor, drop: Dropout | None
) -> Tensor:
    """dx = drop(dS A) + sum_i dY_i W_i, [M, K], for one to three projections: one product, dx written once."""
    m, (r, k) = len(dS), A.shape
    dx = dS.new_empty(m, k)  # [M, K]
    architecture, processors = _describe_gpu(dx)
    wide = [dy.shape[1] for dy in dys]
    absent = 3 - len(dys)  # missing projections are passed with width 0
    parts = 1 if absent == 2 else 3
    nf4 = isinstance(weights[0], NF4Weight)
    tile = tiles.pick("seeded_backward", architecture, m, k, sum(wide), r, drop is not None, processors, parts, nf4)
    codes, absmax, table = zip(*(w if isinstance(w, NF4Weight) else (w, w, w) for w in weights))
    launch_kernel(
        triton_kernels.seeded_backward,
        (-(-m // tile.m) * -(-k // tile.n),),
        *dys,
        *[dys[0]] * absent,
        *codes,
        *[codes[0]] * absent,
        *absmax,
        *[absmax[0]] * absent,
        table[0],
        dS,
        A,
        dx,
        m,
        k,
        *wide,
        *[0] * absent,
        r,
        dS.stride(0),
        *_get_mask_arguments(drop),
        PARTS=parts,
        DROPOUT=drop is not None,
        NF4=nf4,
        GROUP=tiles.GROUP,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=tiles.STEP,
        **get_settings(tile),
    )
    return dx


def gradient_B(dy: Tensor, B: Tensor, s: Tensor, factor: float, dS: Tensor) -> Tensor:
    """Return dB = factor dY^T s in float32, [N, r], and write factor dY B into dS [M, r]: one read of dY."""
    most = tiles.RANKS[-1]
    if B.shape[1] > most:  # one read for each 64 ranks
        columns = zip(B.split(most, dim=1), s.split(most, dim=1), dS.split(most, dim=1))
        return torch.cat([gradient_B(dy, b.contiguous(), s_, factor, dS_) for b, s_, dS_ in columns], dim=1)  # [N, r]
    (m, n), r = dy.shape, B.shape[1]
    architecture, processors = _describe_gpu(dy)
    tile = tiles.pick("gradient_B", architecture, m, n, 0, r, False, processors)
    chunks = -(-n // tile.n)
    slab = _choose_slab(m, tile.m, chunks, processors)
    slabs = -(-m // slab)
    dS_parts = dy.new_empty(chunks, m, r, dtype=torch.float32)  # [N / n, M, r]
    dB_parts = dy.new_empty(slabs, n, r, dtype=torch.float32)  # [M / slab, N, r]
    launch_kernel(
        triton_kernels.gradient_B,
        (chunks, slabs),
        dy,
        B,
        s,
        dS_parts,
        dB_parts,
        m,
        n,
        r,
        s.stride(0),
        slab,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=tiles.pad_rank(r),
        **get_settings(tile),
    )
    reduce(dS_parts, dS, factor)
    return reduce(dB_parts, dB_parts.new_empty(n, r), factor)


def gradient_A(x: Tensor, dS: Tensor, drop: Dropout | None) -> Tensor:
    """dA = dS^T drop(x) in float32, [R, K]: one read of x for each 64 ranks."""
    if dS.shape[1] > tiles.RANKS[-1]:
        return torch.cat([gradient_A(x, part, drop) for part in dS.split(tiles.RANKS[-1], dim=1)])  # [R, K]
    (m, k), r = x.shape, dS.shape[1]
    architecture, processors = _describe_gpu(x)
    tile = tiles.pick("gradient_A", architecture, m, 0, k, r, drop is not None, processors // 8)
    chunks = -(-k // tile.k)
    slab = _choose_slab(m, tile.m, chunks, processors)
    parts = x.new_empty(-(-m // slab), r, k, dtype=torch.float32)  # [M / slab, R, K]
    launch_kernel(
        triton_kernels.gradient_A,
        (chunks, len(parts)),
        x,
        dS,
        parts,
        m,
        k,
        r,
        x.stride(0),
        dS.stride(0),
        slab,
        *_get_mask_arguments(drop),
        DROPOUT=drop is not None,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        BLOCK_R=tiles.pad_rank(r),
        **get_settings(tile),
    )
    return reduce(parts, parts.new_empty(r, k))


def reduce(parts: Tensor, out: Tensor, factor: float = 1.0) -> Tensor:
    """out = factor times the sum of the parts, added in order. parts [P, M, N], out [M, N]."""
    count, m, n = parts.shape
    launch_kernel(
        triton_kernels.reduce,
        (-(-m * n // tiles.REDUCE.n),),
        parts,
        out,
        count,
        m,
        n,
        out.stride(0),
        factor,
        BLOCK=tiles.REDUCE.n,
        **get_settings(tiles.REDUCE),
    )
    return out


def expand_add(y: Tensor, s: Tensor, b: Tensor, drop: Dropout) -> Tensor:
    """y += drop(s b) in place: y [M, N], s [M, R], b [R, N]."""
    (m, n), r = y.shape, len(b)
    tile = tiles.pick("expand_add", _describe_gpu(y)[0], m, n, 0, r, True, 0)
    launch_kernel(
        triton_kernels.expand_add,
        (-(-m // tile.m), -(-n // tile.n)),
        y,
        s,
        b,
        m,
        n,
        r,
        s.stride(0),
        *_get_mask_arguments(drop),
        DROPOUT=True,
        B_ROWS_ARE_R=True,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=tiles.STEP,
        **get_settings(tile),
    )
    return y


def _get_mask_arguments(drop: Dropout | None) -> tuple[int, int, int]:
    """Return the kernels' mask arguments: two keys and the limit; without dropout they are not read."""
    return (0, 0, 0) if drop is None else (drop.low, drop.high, (drop.drops - LEVELS // 2) << 16)


def _choose_slab(m: int, block: int, chunks: int, processors: int) -> int:
    """Return the rows that one program sums over, for about two programs a multiprocessor."""
    slabs = max(1, min(2 * processors // chunks, -(-m // block)))
    return -(-m // (slabs * block)) * block


def get_settings(tile: tiles.Tile) -> dict[str, int | bool]:
    """Return the settings that all kernels share: UPCAST, warps and stages."""
    return {"UPCAST": is_interpreted(), "num_warps": tile.warps, "num_stages": tile.stages}


def _describe_gpu(x: Tensor) -> tuple[int, int]:
    """Return the architecture (90 for sm_90) and the number of multiprocessors; those of an H200 in the interpreter."""
    if not x.is_cuda:
        return 90, 132
    found = torch.cuda.get_device_properties(x.device)
    return found.major * 10 + found.minor, found.multi_processor_count
