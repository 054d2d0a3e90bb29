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
MASKED = ("shrink", "seeded_backward", "gradient_A", "expand_add")  # kernels that make the dropout mask
# What compile_check.py found to spill under Triton 3.6.0 or 3.9.0, and what is used instead, which spills under neither
# (None: the list's next tile). Kernel, architecture, tile, rank, dropout, parts.
INSTEAD = {
    ("seeded_forward", 80, Tile(128, 256, 64, 8, 3), 16, False, 1): Tile(128, 256, 32, 8, 4),
    ("seeded_backward", 90, Tile(128, 256, 64, 8, 3), 16, True, 3): None,
    ("seeded_backward", 90, Tile(128, 256, 64, 8, 4), 16, True, 3): None,
    ("shrink", 80, Tile(64, 0, 128, 4, 3), 64, True, 1): Tile(64, 0, 64, 4, 3),
    ("shrink", 80, Tile(32, 0, 128, 4, 3), 64, True, 1): Tile(32, 0, 64, 4, 3),
    ("shrink", 100, Tile(64, 0, 128, 4, 3), 32, True, 1): None,
}
# Decode, by padded rank: one token a program, no tensor cores. Columns of K a step; columns of N a program.
ROWS_SHRINK = {16: Tile(1, 0, 256, 4, 2), 32: Tile(1, 0, 256, 8, 2), 64: Tile(1, 0, 256, 4, 2)}
ROWS_EXPAND = {16: Tile(1, 64, 0, 4, 2), 32: Tile(1, 32, 0, 4, 2), 64: Tile(1, 32, 0, 2, 2)}
SHRINK_SPLIT = 4  # programs that share K where there are few rows
ROWS_SPLIT = 4  # programs that share one token's K
REDUCE = Tile(1, 1024, 0, 4, 2)  # entries a program of `reduce` sums
STEP = 16  # ranks that `seeded_*` and `expand_add` take at a time
GROUP = 8  # rows of tiles that are walked together, for the L2 cache

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
    checked = 80 if 80 <= architecture < 90 else architecture  # sm_86 and sm_89 have sm_80's registers and instructions
    rank = rank_block(r) if kernel in WHOLE_RANK else STEP
    masked = dropout and kernel in MASKED
    tiles = [INSTEAD.get((kernel, checked, t, rank, masked, parts), t) for t in TILES[kernel]]
    return [t for t in tiles if t is not None and (t.m + t.n) * t.k * 2 * t.stages <= limit]


def live(architecture: int) -> list[Configuration]:
    """Return every configuration that the launcher can ask for on an architecture."""
    found = [Configuration("reduce", REDUCE, STEP)]
    for kernel in TILES:
        for rank, dropout, parts in _switches(kernel):
            tiles = fitting(kernel, architecture, rank, dropout, parts)
            found += [Configuration(kernel, tile, rank, dropout, parts) for tile in tiles]
    for kernel, by_rank in (("rows_shrink", ROWS_SHRINK), ("rows_expand", ROWS_EXPAND)):
        found += [Configuration(kernel, tile, rank) for rank, tile in by_rank.items()]
    return found


def _switches(kernel: str) -> list[tuple[int, bool, int]]:
    """Return the ranks, dropout and shared projections with which a kernel is used."""
    if kernel == "seeded_backward":
        return [(STEP, dropout, parts) for parts in (1, 3) for dropout in (False, True)]
    if kernel in ("seeded_forward", "expand_add"):
        return [(STEP, kernel == "expand_add", 1)]
    if kernel == "gradient_B":
        return [(rank, False, 1) for rank in RANKS]
    return [(rank, dropout, 1) for rank in RANKS for dropout in (False, True)]
