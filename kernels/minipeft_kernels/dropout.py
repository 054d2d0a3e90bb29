"""Dropout without a stored mask: a hash of (seed, row, column) decides which entries of x are dropped.

A stored mask takes a byte an entry, and with a stateful generator the result depends on the order of the draws. With a
hash of the entry's position, forward, backward, recomputation under activation checkpointing, CPU and GPU compute the
same mask. One 32-bit hash decides two adjacent columns, 16 bits each.

The two multipliers are those of Chris Wellons' `lowbias32` (https://github.com/skeeto/hash-prospector, public domain).
All arithmetic is on 32-bit integers that wrap.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = Any  # an int32 array of NumPy or torch: the hash uses operators that both have


class Constants(NamedTuple):
    """The numbers of the hash, as int32."""

    golden: Array = -1640531535  # 0x9E3779B1: 2^32 / golden ratio, odd
    mix_1: Array = 0x7FEB352D
    mix_2: Array = -2073254261  # 0x846CA68B
    shift_16: Array = 16
    shift_15: Array = 15
    low_16: Array = (1 << 16) - 1
    low_17: Array = (1 << 17) - 1


# As 0-d arrays: a Python int is converted on every call, a cost that shows for small masks.
NUMPY = Constants(*(np.array(number, dtype=np.int32) for number in Constants()))
TORCH = Constants(*(torch.tensor(number, dtype=torch.int32, device="cpu") for number in Constants()))
LEVELS = 65536  # a decision has 16 bits
SMALL_MASK = 1 << 15  # up to this many entries a CPU's mask is computed by NumPy, whose operators have less overhead


class Dropout(NamedTuple):
    """A reproducible mask: two 32-bit keys, and how many of the 65536 levels are dropped."""

    low: int
    high: int
    drops: int

    @property
    def keep(self) -> float:
        """Return the exact keep probability: that of the quantised threshold, not 1 - dropout."""
        return 1.0 - self.drops / LEVELS


def make_dropout(dropout: float, seed: int | None) -> Dropout | None:
    """Return the mask, or None for dropout 0; without a seed one is drawn from torch's CPU generator.

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


def make_keep_mask(
    drop: Dropout,
    rows: int,
    columns: int,
    device: torch.device | str = "cpu",
    first: int = 0,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """Return the mask of x[first : first + rows]: 1 where an entry is kept, with probability `drop.keep`.

    The low and the high 16 bits of h are two signed integers, uniform on [-32768, 32767]: column 2c takes the low half
    of hash c, column 2c + 1 the high half, which is how a little-endian machine views an int32 as two int16.
    """
    if 0 < rows * columns <= SMALL_MASK and torch.device(device).type == "cpu":
        level = torch.from_numpy(_make_small_levels(drop, rows, columns, first))[:, :columns]  # [M, K]
    else:
        row = torch.arange(first, first + rows, dtype=torch.int32, device=device)  # [M]
        pair = torch.arange((columns + 1) // 2, dtype=torch.int32, device=device)  # [K/2]
        level = _hash(drop, row, pair, TORCH).view(torch.int16)[:, :columns]  # [M, K]
    # With `out` in the dtype of x, torch compares and converts in one pass: 36 us, against 292 us through a bool tensor
    # (341 x 768, float32, Zen 5, one thread).
    return torch.ge(level, drop.drops - LEVELS // 2, out=torch.empty(level.shape, dtype=dtype, device=device))  # [M, K]


@functools.lru_cache(maxsize=128)
def _make_small_levels(drop: Dropout, rows: int, columns: int, first: int) -> Array:
    """Return the 16 bits that decide each entry. Cached (at most 8 MB), because backward needs the mask of forward."""
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
    """Mix 32 bits in place, each input bit affecting each output bit; a second key is added between the rounds."""
    h = _fold(h, c.shift_16, c.low_16)
    h *= c.mix_1
    if key is not None:
        h += key
    h = _fold(h, c.shift_15, c.low_17)
    h *= c.mix_2
    return _fold(h, c.shift_16, c.low_16)


def _fold(h: Array, shift: Array, low: Array) -> Array:
    """h ^= h >> shift, in place; masking with `low` makes the signed shift a logical one."""
    shifted = h >> shift
    shifted &= low
    h ^= shifted
    return h


def _splitmix64(seed: int) -> int:
    """Spread a seed over 64 bits (Steele, Lea and Flood 2014), so that seeds 0, 1, 2 give independent masks."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def _signed(bits: int) -> int:
    """Reinterpret 32 bits as a signed integer."""
    return bits - (1 << 32) if bits >> 31 else bits
