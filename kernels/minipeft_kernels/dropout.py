"""Dropout without a stored mask: a hash of (seed, row, column) decides which entries of x are dropped.

A stored mask takes a byte an entry, and with a stateful generator the result depends on the order of the draws. With a
hash of the entry's position, forward, backward, recomputation under activation checkpointing, CPU and GPU compute the
same mask. One 32-bit hash decides two adjacent columns, 16 bits each.

The two multipliers are those of Chris Wellons' `lowbias32` (https://github.com/skeeto/hash-prospector, public domain).
All arithmetic is on 32-bit integers that wrap: signed in torch, unsigned in NumPy.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = Any  # an int32 tensor, or a uint32 array of NumPy: the hash uses operators that both have


class Constants(NamedTuple):
    """The numbers of the hash, as 0-d arrays: a Python int is converted on every call, a cost that shows for small
    masks."""

    golden: Array  # 2^32 / golden ratio, odd
    mix_1: Array
    mix_2: Array
    shift_16: Array
    shift_15: Array
    low_16: Array = None  # what a shift of signed numbers is masked with; None: the shift is logical
    low_17: Array = None


NUMBERS = (0x9E3779B1, 0x7FEB352D, 0x846CA68B, 16, 15)
NUMPY = Constants(*(np.array(number, dtype=np.uint32) for number in NUMBERS))
TORCH = Constants(
    *(
        torch.tensor(number, dtype=torch.int64, device="cpu").int()
        for number in (*NUMBERS, (1 << 16) - 1, (1 << 17) - 1)
    )
)
WORD = (1 << 32) - 1
LEVELS = 65536  # a decision has 16 bits
SMALL_MASK = 1 << 15  # entries up to which NumPy computes a CPU's mask, or several together, which are then kept


class Dropout(NamedTuple):
    """A reproducible mask: two 32-bit keys, and how many of the 65536 levels are dropped."""

    low: int
    high: int
    drops: int

    @property
    def keep(self) -> float:
        """Return the exact keep probability: that of the quantised threshold, not 1 - dropout."""
        return 1.0 - self.drops / LEVELS


GUESSED: dict[tuple[Dropout, int, int, torch.dtype], Tensor] = {}  # small masks of the seeds to come


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
    return _key(seed, drops)


def _key(seed: int, drops: int) -> Dropout:
    """Return the mask of a seed."""
    key = _splitmix64(seed)
    return Dropout(_signed(key & WORD), _signed(key >> 32), drops)


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
    row = torch.arange(first, first + rows, dtype=torch.int32, device=device)  # [M]
    pair = torch.arange((columns + 1) // 2, dtype=torch.int32, device=device)  # [K/2]
    level = _hash(drop.low, drop.high, row * TORCH.golden, pair * TORCH.golden, TORCH)  # [M, K/2]
    level = level.view(torch.int16)[:, :columns]  # [M, K]
    # With `out` in the dtype of x, torch compares and converts in one pass: 36 us, against 292 us through a bool tensor
    # (341 x 768, float32, Zen 5, one thread).
    return torch.ge(level, drop.drops - LEVELS // 2, out=torch.empty(level.shape, dtype=dtype, device=device))  # [M, K]


@functools.lru_cache(maxsize=128)
def make_small_mask(drop: Dropout, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """make_keep_mask of a CPU's x with at most SMALL_MASK entries. Do not write to it: backward gets it again. [M, K]

    For a few entries NumPy's operators take nearly as long as for many. So one call also computes the masks of the
    seeds that torch's generator gives next, up to SMALL_MASK entries in all. If other numbers are drawn first, they
    are not used. At most 128 masks are kept, 16 MB in float32.
    """
    found = GUESSED.pop((drop, rows, columns, dtype), None)
    if found is not None:
        return found
    drops = [drop, *(_key(seed, drop.drops) for seed in _foresee_seeds(SMALL_MASK // (rows * columns) - 1))]
    masks = _make_masks(drops, rows, columns).to(dtype).unbind()  # [M, K] each
    GUESSED.clear()
    GUESSED.update(((guess, rows, columns, dtype), mask) for guess, mask in zip(drops[1:], masks[1:]))
    return masks[0]


def _foresee_seeds(number: int) -> list[int]:
    """Return the next seeds that make_dropout would draw from torch's CPU generator, which stays as it is."""
    if number == 0:
        return []
    generator = torch.Generator()
    generator.set_state(torch.default_generator.get_state())
    return torch.randint(2**62, (number,), generator=generator).tolist()


def _make_masks(drops: list[Dropout], rows: int, columns: int) -> Tensor:
    """Return several masks of one shape, which differ in their keys alone. [n, M, K], float32"""
    low, high = (np.array(keys, dtype=np.int64).astype(np.uint32)[:, None] for keys in list(zip(*drops))[:2])  # [n, 1]
    level = _hash(low, high, _count(rows), _count((columns + 1) // 2), NUMPY).view(np.int16)  # [n, M, K], K even
    kept = level[:, :, :columns] >= drops[0].drops - LEVELS // 2  # [n, M, K]
    return torch.from_numpy(kept.astype(np.float32))


@functools.lru_cache(maxsize=128)
def _count(number: int) -> Array:
    """Return golden * (0, 1, ...), which small masks share. [number]"""
    return np.arange(number, dtype=np.uint32) * NUMPY.golden


def _hash(low: Array | int, high: Array | int, row: Array, pair: Array, c: Constants) -> Array:
    """Return the 32-bit hash of each row and pair of columns, given golden * row [M] and golden * pair [K/2].

    low and high are those of one mask, or [n, 1] of several. -> [M, K/2] or [n, M, K/2]
    """
    key = _mix(row + low, c)  # [M]
    key_2 = _mix(key ^ high, c)  # [M]
    return _mix(pair + key[..., None], c, key_2[..., None])  # [M, K/2]


def _mix(h: Array, c: Constants, key: Array | None = None) -> Array:
    """Mix 32 bits in place, each input bit affecting each output bit; a second key is added between the rounds."""
    h ^= _shift(h, c.shift_16, c.low_16)
    h *= c.mix_1
    if key is not None:
        h += key
    h ^= _shift(h, c.shift_15, c.low_17)
    h *= c.mix_2
    h ^= _shift(h, c.shift_16, c.low_16)
    return h


def _shift(h: Array, shift: Array, low: Array | None) -> Array:
    """h >> shift as a logical shift; masking with `low` makes a signed one logical."""
    shifted = h >> shift
    if low is not None:
        shifted &= low
    return shifted


def _splitmix64(seed: int) -> int:
    """Spread a seed over 64 bits (Steele, Lea and Flood 2014), so that seeds 0, 1, 2 give independent masks."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def _signed(bits: int) -> int:
    """Reinterpret 32 bits as a signed integer."""
    return bits - (1 << 32) if bits >> 31 else bits
