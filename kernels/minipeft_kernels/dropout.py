"""Dropout without a stored mask: a hash of (seed, row, column) says which entries of x are dropped.

A mask that is stored costs a byte an entry, and a generator with a state makes the order of its draws part of the
result. A hash of the entry's place does neither: forward, backward, a recomputation under checkpointing, CPU and GPU
all ask the same question and get the same answer. One 32-bit hash decides two neighbouring columns, 16 bits each.

The two multipliers are those of Chris Wellons' `lowbias32` (https://github.com/skeeto/hash-prospector, public domain).
All arithmetic is that of wrapping 32-bit integers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# int32 numbers as tensors: of a Python int torch makes and converts one each time, which a small mask notices.
GOLDEN = torch.tensor(-1640531535, dtype=torch.int32, device="cpu")  # 0x9E3779B1: 2^32 / golden ratio, odd
MIX_1 = torch.tensor(0x7FEB352D, dtype=torch.int32, device="cpu")
MIX_2 = torch.tensor(-2073254261, dtype=torch.int32, device="cpu")  # 0x846CA68B
SHIFT_16, SHIFT_15 = (torch.tensor(bits, dtype=torch.int32, device="cpu") for bits in (16, 15))
LOW_16, LOW_17 = (torch.tensor((1 << bits) - 1, dtype=torch.int32, device="cpu") for bits in (16, 17))
LEVELS = 65536  # a decision has 16 bits


class Dropout(NamedTuple):
    """A mask that can be made again: two 32-bit keys and the number of the 65536 levels that drop."""

    low: int
    high: int
    drops: int

    @property
    def keep(self) -> float:
        """Return the exact probability that an entry is kept: that of the quantised threshold, not 1 - dropout."""
        return 1.0 - self.drops / LEVELS


def make_dropout(dropout: float, seed: int | None) -> Dropout | None:
    """Return the mask's description, or None for dropout 0; without a seed one is drawn from torch's CPU generator.

    torch's generator is what checkpointing saves and restores, so a recomputation draws the same seed again.

    Raises: ValueError for a probability outside [0, 1) or too close to an end for 16 bits.
    """
    if dropout == 0.0:
        return None
    drops = round(dropout * LEVELS) if 0.0 < dropout < 1.0 else 0
    if not 0 < drops < LEVELS:
        raise ValueError(f"dropout={dropout!r} cannot be honoured: give 0, or a probability in [1/65536, 65535/65536]")
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    key = _splitmix64(seed)
    return Dropout(_signed(key & 0xFFFFFFFF), _signed(key >> 32), drops)


def keep_mask(
    drop: Dropout,
    rows: int,
    columns: int,
    device: torch.device | str = "cpu",
    first: int = 0,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """Return which entries of x[first : first + rows] are kept, 1 with probability `drop.keep`: the published hash.

    `h >> 16` and `h` cut to 16 bits are two signed numbers, uniform on [-32768, 32767]; column 2c takes the low half of
    hash c and column 2c + 1 the high half, which is how a little-endian machine sees an int32 as two int16.
    """
    row = torch.arange(first, first + rows, dtype=torch.int32, device=device)  # [M]
    key = _mix(row.mul_(GOLDEN).add_(drop.low))  # [M]
    key_2 = _mix(key ^ drop.high)  # [M]
    pair = torch.arange((columns + 1) // 2, dtype=torch.int32, device=device).mul_(GOLDEN)  # [K/2]
    h = _mix(pair + key[:, None], key_2[:, None])  # [M, K/2]
    level = h.view(torch.int16)[:, :columns]  # [M, K]
    # Into a tensor of x's own dtype, torch compares and converts at once: 36 us, against 292 us by way of a bool
    # (341 x 768, float32, Zen 5, one thread).
    return torch.ge(level, drop.drops - LEVELS // 2, out=torch.empty(level.shape, dtype=dtype, device=device))  # [M, K]


def _mix(h: Tensor, key: Tensor | None = None) -> Tensor:
    """Mix 32 bits, in place, each input bit moving each output bit; a second key enters between the rounds."""
    h = _fold(h, SHIFT_16, LOW_16).mul_(MIX_1)
    if key is not None:
        h += key
    h = _fold(h, SHIFT_15, LOW_17).mul_(MIX_2)
    return _fold(h, SHIFT_16, LOW_16)


def _fold(h: Tensor, shift: Tensor, low: Tensor) -> Tensor:
    """h ^= h >> shift, in place; the mask makes `>>` shift in zeros."""
    return h.bitwise_xor_(torch.bitwise_right_shift(h, shift).bitwise_and_(low))


def _splitmix64(seed: int) -> int:
    """Spread a seed over 64 bits (Steele, Lea and Flood 2014), so that seeds 0, 1, 2 have nothing in common."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def _signed(bits: int) -> int:
    """Read 32 bits as a signed number."""
    return bits - (1 << 32) if bits >> 31 else bits
