"""Dropout without a stored mask: a hash of (seed, row, column) says which entries of x are dropped.

A stored mask costs a byte an entry, and with a stateful generator the order of the draws becomes part of the result. A
hash of the entry's place does neither: forward, backward, recomputation under activation checkpointing, CPU and GPU
compute the same mask. One 32-bit hash decides two neighbouring columns, 16 bits each.

The two multipliers are those of Chris Wellons' `lowbias32` (https://github.com/skeeto/hash-prospector, public domain).
All arithmetic is that of wrapping 32-bit integers.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = Any  # of int32, NumPy's or torch's: the operators that the hash uses mean the same in both


class Constants(NamedTuple):
    """The numbers of the hash, as int32."""

    golden: Array = -1640531535  # 0x9E3779B1: 2^32 / golden ratio, odd
    mix_1: Array = 0x7FEB352D
    mix_2: Array = -2073254261  # 0x846CA68B
    shift_16: Array = 16
    shift_15: Array = 15
    low_16: Array = (1 << 16) - 1
    low_17: Array = (1 << 17) - 1


# As arrays without dimensions: a Python int is converted at each operator, which a small mask notices.
NUMPY = Constants(*(np.array(number, dtype=np.int32) for number in Constants()))
TORCH = Constants(*(torch.tensor(number, dtype=torch.int32, device="cpu") for number in Constants()))
LEVELS = 65536  # a decision has 16 bits
SMALL_MASK = 1 << 15  # up to so many entries, a CPU's mask is made by NumPy, whose operators cost less to call


class Dropout(NamedTuple):
    """A mask that can be made again: two 32-bit keys and how many of the 65536 levels drop."""

    low: int
    high: int
    drops: int

    @property
    def keep(self) -> float:
        """Return the exact probability that an entry is kept: that of the quantised threshold, not 1 - dropout."""
        return 1.0 - self.drops / LEVELS


def make_dropout(dropout: float, seed: int | None) -> Dropout | None:
    """Return the mask's description, or None for dropout 0; without a seed one is drawn from torch's CPU generator.

    Activation checkpointing saves and restores torch's generator, so a recomputation draws the same seed again.

    Raises:
        ValueError: the probability is outside [0, 1), or too close to an end for 16 bits.
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
    if 0 < rows * columns <= SMALL_MASK and torch.device(device).type == "cpu":
        level = torch.from_numpy(_make_small_levels(drop, rows, columns, first))[:, :columns]  # [M, K]
    else:
        row = torch.arange(first, first + rows, dtype=torch.int32, device=device)  # [M]
        pair = torch.arange((columns + 1) // 2, dtype=torch.int32, device=device)  # [K/2]
        level = _hash(drop, row, pair, TORCH).view(torch.int16)[:, :columns]  # [M, K]
    # Into a tensor of x's own dtype, torch compares and converts at once: 36 us, against 292 us by way of a bool
    # (341 x 768, float32, Zen 5, one thread).
    return torch.ge(level, drop.drops - LEVELS // 2, out=torch.empty(level.shape, dtype=dtype, device=device))  # [M, K]


@functools.lru_cache(maxsize=128)
def _make_small_levels(drop: Dropout, rows: int, columns: int, first: int) -> Array:
    """Return the 16 bits that decide each entry. Kept, 8 MB at most: backward needs what forward had."""
    row, pair = np.arange(first, first + rows, dtype=np.int32), np.arange((columns + 1) // 2, dtype=np.int32)
    return _hash(drop, row, pair, NUMPY).view(np.int16)  # [M, K], K even


def _hash(drop: Dropout, row: Array, pair: Array, c: Constants) -> Array:
    """Return the 32-bit hash of each row [M] and each pair of columns [K/2]. -> [M, K/2]"""
    row *= c.golden
    row += drop.low
    key = _mix(row, c)  # [M]
    key_2 = _mix(key ^ drop.high, c)  # [M]
    pair *= c.golden
    return _mix(pair + key[:, None], c, key_2[:, None])  # [M, K/2]


def _mix(h: Array, c: Constants, key: Array | None = None) -> Array:
    """Mix 32 bits, in place, each input bit moving each output bit; a second key enters between the rounds."""
    h = _fold(h, c.shift_16, c.low_16)
    h *= c.mix_1
    if key is not None:
        h += key
    h = _fold(h, c.shift_15, c.low_17)
    h *= c.mix_2
    return _fold(h, c.shift_16, c.low_16)


def _fold(h: Array, shift: Array, low: Array) -> Array:
    """h ^= h >> shift, in place; the mask `low` makes the signed `>>` shift in zeros."""
    shifted = h >> shift
    shifted &= low
    h ^= shifted
    return h


def _splitmix64(seed: int) -> int:
    """Spread a seed over 64 bits (Steele, Lea and Flood 2014), so that seeds 0, 1, 2 have nothing in common."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def _signed(bits: int) -> int:
    """Read 32 bits as a signed number."""
    return bits - (1 << 32) if bits >> 31 else bits
