"""The first kernel to read: out = x + y. triton_kernels.py goes on from here.

A kernel is the code of ONE program, and a launch starts many: program p computes the entries from p * BLOCK on.

    entry      0 1 2 3 | 4 5 6 7 | 8 9              N = 10, BLOCK = 4: three programs
    program    0       | 1       | 2    . .         the last one has two lanes beyond the end: they are masked

    add[(triton.cdiv(N, BLOCK),)](x, y, out, N, BLOCK=4)
"""

# The arguments of a kernel have the types that Triton infers at the launch.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, N, BLOCK: tl.constexpr):
    """out = x + y. x, y and out are pointers to N numbers."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [b]
    inside = at < N  # [b]
    total = tl.load(x + at, mask=inside, other=0.0) + tl.load(y + at, mask=inside, other=0.0)  # [b]
    tl.store(out + at, total, mask=inside)
