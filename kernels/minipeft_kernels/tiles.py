"""The tile sizes that the Triton kernels may use: one list for the launcher, for tuning and for the compiler's check.

A kernel's speed hangs on five numbers: the tile's rows, columns and depth, the warps that share it, and how many tiles
are in flight (stages). Too large, and registers spill or shared memory overflows; `kernels/compile_check.py` compiles
every configuration of `live` for each architecture and refuses those. No configuration is picked by timing at run time:
another choice adds in another order, and a run could not be repeated to the bit. TUNED holds what a benchmark found.
"""

from dataclasses import dataclass

RANKS = (16, 32, 64)  # the rank is padded with zeros to one of these; 128 at once spills registers (sm_80, sm_100)
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # a program's limit, by architecture
ARCHITECTURES = (80, 90, 100)  # what the compiler's check covers


@dataclass(frozen=True)
class Tile:
    """BLOCK_M x BLOCK_N (x BLOCK_K for products along a long dimension), warps, and tiles in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configuration:
    """One compilation: a kernel of device.py, its tile, and the switches that change its code."""

    kernel: str
    tile: Tile
    rank: int  # BLOCK_R
    dropout: bool = False
    parts: int = 1
    split: int = 1


# The first tile of a list is for large shapes; a later one is used where the first would leave most of the GPU idle.
# `seeded_*` and `expand_add` meet the rank in steps of 16, the depth of one tensor-core instruction: one code for all.
TILES = {
    "shrink": (Tile(64, 0, 128, 4, 3), Tile(32, 0, 128, 4, 3)),
    "seeded_forward": (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
    ),
    "seeded_backward": (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 64, 32, 4, 3),
    ),
    "gradient_B": (Tile(64, 256, 0, 8, 2), Tile(64, 128, 0, 4, 2)),
    "gradient_A": (Tile(64, 0, 128, 4, 3), Tile(32, 0, 64, 4, 4)),
    "expand_add": (Tile(128, 128, 0, 8, 1),),
}
WHOLE_RANK = ("shrink", "gradient_B", "gradient_A")  # kernels that take the padded rank at once
# What compile_check.py found to spill, so that it is never picked: kernel, architecture, tile, rank, dropout, parts.
SPILLS = {
    ("seeded_backward", 90, Tile(128, 256, 64, 8, 3), 16, True, 3),
    ("seeded_backward", 90, Tile(128, 256, 64, 8, 4), 16, True, 3),
    ("shrink", 100, Tile(64, 0, 128, 4, 3), 32, True, 1),
}
SMALL = Tile(1, 0, 0, 4, 2)  # reduce and decode: no tensor cores, four warps
STEP = 16  # ranks that `seeded_*` and `expand_add` take at a time
ROWS_SPLIT, ROWS_K, ROWS_N = 4, 256, 64  # decode: programs that share one token's K; columns a step
GROUP = 8  # rows of tiles that are walked together, for the L2 cache
REDUCE = 1024  # entries a program of `reduce` sums

# (architecture, kernel, N, K, rank, dropout) -> Tile. Nothing has been measured on a GPU yet, so it is empty.
TUNED: dict[tuple[int, str, int, int, int, bool], Tile] = {}


def rank_block(r: int) -> int:
    """Return the padded rank for r; beyond the largest, a kernel or its launcher takes that many at a time."""
    return next((block for block in RANKS if r <= block), RANKS[-1])


def pick(
    kernel: str, architecture: int, m: int, n: int, k: int, r: int, dropout: bool, processors: int, parts: int = 1
) -> Tile:
    """Return the tile for an [m, n] output (k the summed dimension): measured, else the first that fills the GPU."""
    tuned = TUNED.get((architecture, kernel, n, k, rank_block(r), dropout)) if TUNED else None
    if tuned is not None:
        return tuned
    tiles = fitting(kernel, architecture, r, dropout, parts)
    for tile in tiles:
        programs = -(-m // tile.m) * (-(-n // tile.n) if tile.n else 1)
        if programs >= processors:
            return tile
    return tiles[-1]


def fitting(kernel: str, architecture: int, r: int, dropout: bool = False, parts: int = 1) -> list[Tile]:
    """Return a kernel's tiles whose stages fit the architecture's shared memory, and whose sums fit its registers."""
    limit = SHARED_BYTES.get(architecture, min(SHARED_BYTES.values()))
    tiles = [t for t in TILES[kernel] if (t.m + t.n) * t.k * 2 * t.stages <= limit]
    rank = rank_block(r) if kernel in WHOLE_RANK else STEP
    return [t for t in tiles if (kernel, architecture, t, rank, dropout, parts) not in SPILLS]


def live(architecture: int) -> list[Configuration]:
    """Return every configuration that the launcher can ask for on an architecture."""
    found = [Configuration("reduce", Tile(1, REDUCE, 0, 4, 1), 16)]
    for kernel, tiles in TILES.items():
        for c in (c for tile in tiles for c in _switches(kernel, tile)):
            if c.tile in fitting(kernel, architecture, c.rank, c.dropout, c.parts):
                found.append(c)
    found += [Configuration("rows_shrink", Tile(1, 0, ROWS_K, 4, 2), rank, split=ROWS_SPLIT) for rank in RANKS]
    found += [Configuration("rows_expand", Tile(1, ROWS_N, 0, 4, 2), rank, split=ROWS_SPLIT) for rank in RANKS]
    return found


def _switches(kernel: str, tile: Tile) -> list[Configuration]:
    """Return the ranks, dropout, shared projections and split sums with which a kernel's tile is used."""
    if kernel == "seeded_forward":
        return [Configuration(kernel, tile, STEP)]
    if kernel == "seeded_backward":
        return [Configuration(kernel, tile, STEP, dropout, parts) for parts in (1, 3) for dropout in (False, True)]
    if kernel == "gradient_B":
        return [Configuration(kernel, tile, rank) for rank in RANKS]
    if kernel == "expand_add":
        return [Configuration(kernel, tile, STEP, dropout=True)]
    return [Configuration(kernel, tile, rank, dropout) for rank in RANKS for dropout in (False, True)]
