"""The smallest Triton kernel, to be read before the others: z = x + y, a block of entries by each program.

    entries    0 1 2 3 | 4 5 6 7 | 8 9 . .        10 entries, BLOCK 4: three programs, the last one masks two entries
    program       0    |    1    |    2

The same function runs on a GPU, and with TRITON_INTERPRET=1 on a CPU, in NumPy.
"""

# mypy: disable-error-code="no-untyped-def"

import json

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_block(x, y, z, N, BLOCK: tl.constexpr):
    """One program: z = x + y for BLOCK entries, from the one that its number selects."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] offsets, not values
    inside = at < N  # the last program's block may reach past the end
    total = tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside)  # pointer + offsets: BLOCK addresses
    tl.store(z + at, total, mask=inside)


def add(x: Tensor, y: Tensor, block: int = 256) -> Tensor:
    """Return x + y of two vectors of one length. [N], [N] -> [N]"""
    z = torch.empty_like(x)  # [N]
    programs = triton.cdiv(len(x), block)
    add_block[(programs,)](x, y, z, len(x), BLOCK=block)
    return z


def main() -> None:
    """Print, as JSON, the programs and the largest error of one sum."""
    torch.manual_seed(0)
    x, y = torch.randn(1000), torch.randn(1000)
    error = (add(x, y) - (x + y)).abs().max().item()
    print(json.dumps({"entries": len(x), "block": 256, "programs": triton.cdiv(len(x), 256), "error": error}))


if __name__ == "__main__":
    main()
