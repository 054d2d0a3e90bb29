"""The tile sizes of the Triton kernels: one list for the launcher, for tuning and for compile_check.py.

Five numbers determine a kernel's speed: the tile's rows, columns and depth, its warps, and its pipeline stages. If they
are too large, registers spill or shared memory overflows; `kernels/compile_check.py` compiles every configuration of
`list_configurations` for each architecture and rejects those. Nothing is autotuned at run time: another tile sums in
another order, and a run could not be repeated to the bit. TUNED holds the results of a benchmark.
"""

from dataclasses import dataclass

RANKS = (16, 32, 64)  # the rank is padded with zeros to one of these; 128 at once spills registers (sm_80, sm_100)
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # limit of a program, by architecture
ARCHITECTURES = (80, 90, 100)  # that compile_check.py compiles for


@dataclass(frozen=True)
class Tile:
    """BLOCK_M x BLOCK_N (x BLOCK_K for products along a long dimension), warps, and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configuration:
    """One compilation: a Triton kernel, its tile, and the constants that change its code."""

    kernel: str
    tile: Tile
    rank: int  # BLOCK_R
    dropout: bool = False
    parts: int = 1
    nf4: bool = False  # the frozen weight is dequantized in registers


# The first tile of a list is for large shapes; a later one is used where the first would leave most of the GPU idle.
# `seeded_*` and `expand_add` loop over the rank in steps of 16, the depth of one tensor-core instruction, so one
# compilation serves every rank.
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
NF4_TILES = {  # of products with an NF4 weight, whose float32 values take registers: with a depth of 64 some spill
    "seeded_forward": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
    "seeded_backward": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 3)),
}
WHOLE_RANK = ("shrink", "gradient_B", "gradient_A")  # kernels whose tile holds the whole padded rank
MASKED = ("shrink", "seeded_backward", "gradient_A", "expand_add")  # kernels that compute the dropout mask
# Tiles that spill under Triton 3.6.0 or 3.9.0 (compile_check.py), and their replacements, which spill under neither
# (None: the next tile of the list). Kernel, architecture, tile, rank, dropout, parts.
REPLACEMENTS = {
    ("seeded_forward", 80, Tile(128, 256, 64, 8, 3), 16, False, 1): Tile(128, 256, 32, 8, 4),
    ("seeded_backward", 90, Tile(128, 256, 64, 8, 3), 16, True, 3): None,
    ("seeded_backward", 90, Tile(128, 256, 64, 8, 4), 16, True, 3): None,
    ("shrink", 80, Tile(64, 0, 128, 4, 3), 64, True, 1): Tile(64, 0, 64, 4, 3),
    ("shrink", 80, Tile(32, 0, 128, 4, 3), 64, True, 1): Tile(32, 0, 64, 4, 3),
    ("shrink", 100, Tile(64, 0, 128, 4, 3), 32, True, 1): None,
}
# Decoding, by padded rank: one token a program, no tensor cores. ROWS_SHRINK: columns of K a step; ROWS_EXPAND: columns
# of N a program.
ROWS_SHRINK = {16: Tile(1, 0, 256, 4, 2), 32: Tile(1, 0, 256, 8, 2), 64: Tile(1, 0, 256, 4, 2)}
ROWS_EXPAND = {16: Tile(1, 64, 0, 4, 2), 32: Tile(1, 32, 0, 4, 2), 64: Tile(1, 32, 0, 2, 2)}
SHRINK_SPLIT = 4  # programs that share K where there are few rows
ROWS_SPLIT = 4  # programs that share one token's K
REDUCE = Tile(1, 1024, 0, 4, 2)  # entries a program of `reduce` sums
STEP = 16  # ranks that `seeded_*` and `expand_add` take at a time
GROUP = 8  # rows of tiles that are scheduled together, for reuse in the L2 cache

# (architecture, kernel, N, K, rank, dropout) -> Tile. Empty: nothing has been measured on a GPU yet.
TUNED: dict[tuple[int, str, int, int, int, bool], Tile] = {}


def pad_rank(r: int) -> int:
    """Return the rank block that holds r; a rank above the largest block is processed that many at a time."""
    return next((block for block in RANKS if r <= block), RANKS[-1])


def pick(
    kernel: str,
    architecture: int,
    m: int,
    n: int,
    k: int,
    r: int,
    dropout: bool,
    processors: int,
    parts: int = 1,
    nf4: bool = False,
) -> Tile:
    """Return the tile for an [m, n] output (k the summed dimension): measured, else the first that fills the GPU."""
    tuned = TUNED.get((architecture, kernel, n, k, pad_rank(r), dropout)) if TUNED and not nf4 else None
    if tuned is not None:
        return tuned
    tiles = list_tiles(kernel, architecture, r, dropout, parts, nf4)
    for tile in tiles:
        programs = -(-m // tile.m) * (-(-n // tile.n) if tile.n else 1)
        if programs >= processors:
            return tile
    return tiles[-1]


def list_tiles(
    kernel: str, architecture: int, r: int, dropout: bool = False, parts: int = 1, nf4: bool = False
) -> list[Tile]:
    """Return a kernel's tiles that fit the architecture's shared memory and registers."""
    limit = SHARED_BYTES.get(architecture, min(SHARED_BYTES.values()))
    checked = 80 if 80 <= architecture < 90 else architecture  # sm_86 and sm_89 have sm_80's registers and instructions
    rank = pad_rank(r) if kernel in WHOLE_RANK else STEP
    masked = dropout and kernel in MASKED
    if nf4:
        tiles: list[Tile | None] = list(NF4_TILES[kernel])
    else:
        tiles = [REPLACEMENTS.get((kernel, checked, t, rank, masked, parts), t) for t in TILES[kernel]]
    return [t for t in tiles if t is not None and (t.m + t.n) * t.k * 2 * t.stages <= limit]


def list_configurations(architecture: int) -> list[Configuration]:
    """Return every configuration that the launcher can choose on an architecture."""
    found = [Configuration("reduce", REDUCE, STEP)]
    for kernel in TILES:
        for rank, dropout, parts in _list_switches(kernel):
            tiles = list_tiles(kernel, architecture, rank, dropout, parts)
            found += [Configuration(kernel, tile, rank, dropout, parts) for tile in tiles]
            if kernel in NF4_TILES:
                tiles = list_tiles(kernel, architecture, rank, dropout, parts, nf4=True)
                found += [Configuration(kernel, tile, rank, dropout, parts, nf4=True) for tile in tiles]
    for kernel, by_rank in (("rows_shrink", ROWS_SHRINK), ("rows_expand", ROWS_EXPAND)):
        found += [Configuration(kernel, tile, rank) for rank, tile in by_rank.items()]
    return found


def _list_switches(kernel: str) -> list[tuple[int, bool, int]]:
    """Return the (rank block, dropout, projections) combinations that a kernel is compiled for."""
    if kernel == "seeded_backward":
        return [(STEP, dropout, parts) for parts in (1, 3) for dropout in (False, True)]
    if kernel in ("seeded_forward", "expand_add"):
        return [(STEP, kernel == "expand_add", 1)]
    if kernel == "gradient_B":
        return [(rank, False, 1) for rank in RANKS]
    return [(rank, dropout, 1) for rank in RANKS for dropout in (False, True)]
