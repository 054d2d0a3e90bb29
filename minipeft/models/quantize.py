"""A frozen weight in 4 or 8 bits: NF4 with double quantization (Dettmers et al. 2023, QLoRA) and int8 by row.

    NF4   W = 64 values a block:  w = code[c] * absmax        c 4 bits, two to a byte, the first in the high half
          absmax = 256 blocks a group:  absmax = dynamic[q] * largest + mean      q 8 bits: 4.127 bits a weight in all
    int8  W = a row:  w = c * absmax / 127                    c 8 bits

NF4's 16 values are quantiles of the normal distribution, because a block of weights over its largest is nearly normal:
each value is then used equally often. With e = 1 - (1/32 + 1/30) / 2 the quantile of the largest, 7 values are
negative and 8 positive, at equal steps of probability, and 0 is exact:

    code = sort(-Phi^-1(linspace(e, 1/2, 8)[:-1]), 0, Phi^-1(linspace(e, 1/2, 9)[:-1])) / Phi^-1(e)

Codes, scales and dequantized values are those of bitsandbytes, to the bit (its native CPU kernel alone misses the
nearest code of some second-level scales). quantized.py makes such codes a weight.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.errors import InputError

BLOCK, GROUP = 64, 256  # weights to an absmax, absmaxes to a second-level scale
NF4_CODE = (  # as published, in float32
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
AT_ONCE = 1 << 20  # values that are quantized at a time, a multiple of a block: what is allocated beside codes is small
SMALLEST = 1e-38  # in place of a largest value of 0
CPU = torch.device("cpu")


class NF4(NamedTuple):
    """The tensors of an NF4 weight: codes two to a byte, and its scales, quantized in their turn."""

    codes: Tensor  # uint8 [ceil(N K / 2)]
    scales: Tensor  # uint8 [ceil(N K / 64)]
    largest: Tensor  # float32 [ceil(N K / 64 / 256)]
    mean: Tensor  # float32 []

    @classmethod
    def quantize(cls, weight: Tensor) -> NF4:
        """The nearest codes of a weight [N, K]."""
        codes, absmax = nearest(weight.flatten(), make_nf4_code(weight.device), BLOCK)  # [N K], [blocks]
        if codes.numel() % 2:
            codes = F.pad(codes, (0, 1), value=NF4_CODE.index(0.0))
        mean = absmax.mean()
        scales, largest = nearest(absmax - mean, make_dynamic_code(weight.device), GROUP)  # [blocks], [groups]
        return cls(codes[::2].bitwise_left_shift_(4) | codes[1::2], scales, largest, mean)

    def values(self, start: int, stop: int, width: int) -> Tensor:
        """The weight's rows `start` to `stop`, in float32. [n, K]"""
        first, last = start * width, stop * width  # in the flattened weight
        base = first // BLOCK * BLOCK  # where the first of their blocks begins
        pairs = self.codes[base // 2 : -(-last // 2)]
        values = look_up(make_pair_table(pairs.device), pairs).view(torch.float32)  # two values a byte
        blocks = slice(base // BLOCK, -(-last // BLOCK))
        short = -len(values) % BLOCK  # of a last block that is not whole
        values = (F.pad(values, (0, short)) if short else values).view(-1, BLOCK)  # [blocks, 64]
        values = values.mul_(self.absmax(blocks)[:, None]).flatten()
        return values[first - base : last - base].view(stop - start, width)  # [n, K]

    def absmax(self, blocks: slice) -> Tensor:
        """The scales of these blocks, in float32. [blocks]"""
        largest = self.largest[blocks.start // GROUP : -(-blocks.stop // GROUP)].repeat_interleave(GROUP)
        shift = blocks.start % GROUP
        scales = look_up(make_dynamic_code(self.scales.device), self.scales[blocks])  # [blocks]
        return scales * largest[shift : shift + len(scales)] + self.mean


class Int8(NamedTuple):
    """The tensors of an int8 weight, one scale for each output."""

    codes: Tensor  # int8 [N, K]
    absmax: Tensor  # float32 [N]

    @classmethod
    def quantize(cls, weight: Tensor) -> Int8:
        """Round each row to 255 steps of its largest value. [N, K]"""
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)  # [N, K]
        absmax = torch.empty(len(weight), device=weight.device)  # [N]
        rows = max(1, AT_ONCE // weight.shape[1])
        for part, code, largest in zip(weight.split(rows), codes.split(rows), absmax.split(rows)):
            values = part.float()
            torch.amax(values.abs(), dim=1, out=largest)
            code.copy_(values.mul(127.0 / largest.clamp(min=SMALLEST)[:, None]).round_())
        return cls(codes, absmax)

    def values(self, start: int, stop: int, width: int) -> Tensor:
        """The weight's rows `start` to `stop`, in float32. [n, K]"""
        return self.codes[start:stop] * (self.absmax[start:stop, None] / 127.0)  # [n, K]


FORMATS: dict[str, type[NF4] | type[Int8]] = {"nf4": NF4, "int8": Int8}


def nearest(values: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The nearest code to each value over its block's largest, and the largest. [n] -> uint8 [n], [ceil(n / block)]"""
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    absmax = torch.empty(-(-len(values) // block), device=values.device)
    middles = (code[:-1] + code[1:]) / 2
    for part, found, largest in zip(values.split(AT_ONCE), codes.split(AT_ONCE), absmax.split(AT_ONCE // block)):
        blocks = F.pad(part.float(), (0, -len(part) % block)).view(-1, block)  # [blocks, block]
        torch.amax(blocks.abs(), dim=1, out=largest)
        scaled = (blocks * (1.0 / largest.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1)
        found.copy_(torch.bucketize(scaled, middles, out_int32=True).flatten()[: len(part)])
    return codes, absmax


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """The entries of a table [256] at these codes, by index_select: 3.6 times as fast as table[codes] on a CPU. [n]"""
    return table.index_select(0, codes.int())


@cache
def make_nf4_code(device: torch.device) -> Tensor:
    """The 16 values of a code. [16]"""
    return torch.tensor(NF4_CODE, device=device)


@cache
def make_dynamic_code(device: torch.device = CPU) -> Tensor:
    """The 256 values of a scale's second level: seven decades, each with twice as many steps as the one below it."""
    parts = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)  # [2^decade]
        parts += [middles, -middles]
    return torch.cat(parts).sort().values.to(device)  # [256]


@cache
def make_pair_table(device: torch.device) -> Tensor:
    """The two float32 values of each byte, side by side in one int64, so that a single lookup yields both. [256]"""
    code = make_nf4_code(CPU)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # [256, 2]: high half, low half
    return pairs.view(torch.int64).flatten().to(device)


def check_format(format: str) -> None:
    """Check the name of a format.

    Raises:
        InputError: it is none of FORMATS.
    """
    if format not in FORMATS:
        raise InputError(f"{format!r} is not a format for weights ({', '.join(FORMATS)})", where="quantize")
