"""The first kernel: add two vectors.

A Triton kernel is the code of ONE program, and a launch starts many of them; each computes a block of the result.

    entry      0 1 2 3 | 4 5 6 7 | 8 9              N = 10, BLOCK = 4: three programs
    program    0       | 1       | 2    . .         the last one has two lanes beyond the end

x, y and z are pointers to N numbers, and z = x + y. Within a kernel:

    tl.program_id(0)                             which program this is: 0, 1, 2, ...
    tl.arange(0, BLOCK)                          0, 1, ..., BLOCK - 1, a vector
    tl.load(x + at, mask=inside, other=0.0)      the numbers at `at`; nothing is read where the mask is false
    tl.store(z + at, value, mask=inside)         write them

What lies beyond N belongs to somebody else: reading it is an error on a GPU, and writing it destroys data. So every
load and store needs the mask, and the check watches each address. It runs the kernel in Triton's interpreter, on the
CPU. Source: Tillet et al. 2019, and Triton's first tutorial.
"""

from __future__ import annotations

from typing import Any

import torch

from minipeft.tour.exercises.judging import require_close
from minipeft.tour.exercises.kernel_memory import confined
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft_kernels.vector_add.add_block",
    hints=(
        "The program's places: at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).",
        "inside = at < N is a vector of true and false: the mask of both loads and of the store.",
    ),
    needs="triton",
)


def run(add_block: Any, n: int, block: int) -> None:
    """Add two vectors of n numbers, and compare."""
    torch.manual_seed(n)
    x, y, out = torch.randn(n), torch.randn(n), torch.full((n,), 7.0)
    with confined({"x": x, "y": y}, {"z": out[:n]}):
        add_block[(-(-n // block),)](x, y, out, n, BLOCK=block)
    require_close(out[:n], x + y, f"out for N = {n}, BLOCK = {block}", 0)


def check_whole_blocks(add_block: Answer) -> None:
    """64 numbers in blocks of 16."""
    run(add_block, 64, 16)


def check_one_program(add_block: Answer) -> None:
    """One program, with as many lanes as numbers, and with more."""
    run(add_block, 16, 16)
    run(add_block, 5, 16)


def check_ragged(add_block: Answer) -> None:
    """Numbers that fill no whole block: nothing beyond them is read or written."""
    for n in (1, 17, 31, 100):
        run(add_block, n, 16)


def check_large(add_block: Answer) -> None:
    """5,000 numbers in blocks of 128."""
    run(add_block, 5000, 128)
