"""Rotary position embeddings (Su et al. 2021), and the published scalings beyond the pretraining context.

    q, k -> (re + i im) * e^(i p w_j)        w_j = theta^(-2j/D) for pair j of a head at position p

The layout is Hugging Face's half-split one: of the rotated dimensions, the first half are the real parts and the second
half the imaginary parts. `fraction` < 1 rotates only the first D * fraction dimensions.

    linear     w / factor                                              Chen et al. 2023
    llama3     long waves divided by factor, short ones kept           Llama 3.1
    yarn       the same by a ramp over the pairs, and cos and sin times a factor               Peng et al. 2023
    longrope   w / short_factor[j], and cos and sin times a factor     Ding et al. 2024
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import InputError, has_type
from minipeft.models.layout import Rotary

REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("original_max_position_embeddings",),
}
OPTIONAL = {
    "yarn": ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """One rotary setting."""

    theta: float
    context: int  # max_position_embeddings
    scaling: Mapping[str, Any] | None = None  # {"rope_type": ..., "factor": ..., ...}
    fraction: float = 1.0  # rotated share of each head

    def turned(self, width: int) -> int:
        """The number of rotated dimensions of a head of `width`."""
        return int(width * self.fraction)


def check_rope(rope: Rope, width: int) -> None:
    """Check a rotary setting for heads of `width`.

    Raises:
        InputError: a type that is not in REQUIRED, a field that is missing or wrong, an odd number of dimensions.
    """
    turned = rope.turned(width)
    if turned % 2 or turned < 2:
        what = ("head_dim", f"{width}") if rope.fraction == 1 else ("partial_rotary_factor", f"{turned} of {width}")
        raise InputError(f"{what[1]} must be even and >= 2: rotary positions turn pairs", where=what[0])
    if rope.scaling is None:
        return
    kind = rope.scaling.get("rope_type")
    if kind == "dynamic":
        problem = "rope type 'dynamic' is not supported: its frequencies depend on the length of each call, so keys in"
        raise InputError(f"{problem} a cache would not fit later ones ({', '.join(REQUIRED)})", where="rope_scaling")
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise InputError(f"rope type {kind!r} is not supported ({', '.join(REQUIRED)})", where="rope_scaling")
    given = tuple(name for name in OPTIONAL.get(kind, ()) if rope.scaling.get(name) is not None)
    for name in REQUIRED[kind] + given:
        if not is_positive(rope.scaling.get(name)):
            problem = f"{rope.scaling.get(name)!r} must be a finite number > 0 (1e-9 to 1e18)"
            raise InputError(problem, where=f"rope_scaling.{name}")
    if kind == "llama3" and rope.scaling["high_freq_factor"] <= rope.scaling["low_freq_factor"]:
        raise InputError("must be above low_freq_factor", where="rope_scaling.high_freq_factor")
    if kind == "yarn" and rope.theta == 1:
        raise InputError("1 turns every pair alike, which yarn cannot stretch", where="rope_theta")
    if kind == "longrope" and rope.scaling["original_max_position_embeddings"] <= 1:
        raise InputError("must be > 1", where="rope_scaling.original_max_position_embeddings")
    if kind == "yarn" and not rope.scaling.get("truncate", True):
        raise InputError("false is not supported", where="rope_scaling.truncate")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors = rope.scaling.get(name)
        if not isinstance(factors, list) or len(factors) != turned // 2 or not all(map(is_positive, factors)):
            raise InputError(f"must be a list of {turned // 2} finite numbers > 0", where=f"rope_scaling.{name}")


def is_positive(value: Any) -> bool:
    """Whether a JSON value is a number > 0, in a range whose quotients and logarithms are finite."""
    return has_type(value, float) and 1e-9 <= value <= 1e18


def compute_frequencies(rope: Rope, width: int, device: torch.device) -> tuple[Tensor, float]:
    """Angle per position of each pair, and the factor of cos and sin. ([D * fraction / 2] in float32, factor)"""
    turned, scaling = rope.turned(width), rope.scaling
    pairs = torch.arange(0, turned, 2, dtype=torch.int64, device=device).float()
    if scaling is not None and scaling["rope_type"] == "longrope":
        short = torch.tensor(scaling["short_factor"], dtype=torch.float32, device=device)
        return 1.0 / (short * rope.theta ** (pairs / turned)), compute_long_factor(rope)
    turn = 1.0 / rope.theta ** (pairs / turned)  # [D * fraction / 2]
    if scaling is None:
        return turn, 1.0
    if scaling["rope_type"] == "linear":
        return turn / scaling["factor"], 1.0
    if scaling["rope_type"] == "yarn":
        keep = 1 - compute_yarn_ramp(rope, turned).to(device)  # 1: short waves, 0: long waves
        return turn / scaling["factor"] * (1 - keep) + turn * keep, compute_yarn_factor(scaling)
    low, high, trained = (scaling[name] for name in REQUIRED["llama3"][1:])
    wavelength = 2 * math.pi / turn
    blend = ((trained / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long waves, 1: short waves
    return (1 - blend) * turn / scaling["factor"] + blend * turn, 1.0


def compute_yarn_ramp(rope: Rope, turned: int) -> Tensor:
    """0 for pairs with beta_fast or more rotations in the pretraining context, 1 for beta_slow or fewer. [pairs]"""
    scaling = rope.scaling or {}
    trained = scaling.get("original_max_position_embeddings") or rope.context

    def pair_with(turns: float) -> float:
        return turned * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_with(scaling.get("beta_slow") or 1)), turned - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(turned // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def compute_yarn_factor(scaling: Mapping[str, Any]) -> float:
    """YaRN's factor of cos and sin: 0.1 ln(factor) + 1, unless the file gives another."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    size = lambda m: 0.1 * m * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return float(size(scaling["mscale"]) / size(scaling["mscale_all_dim"]))
    return float(size(1.0))


def compute_long_factor(rope: Rope) -> float:
    """LongRoPE's factor of cos and sin: sqrt(1 + ln(stretch) / ln(pretraining context)); short texts use it too."""
    scaling = rope.scaling or {}
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    trained = scaling["original_max_position_embeddings"]
    stretch = scaling.get("factor") or rope.context / trained
    return math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0


def make_rotation(rope: Rope, width: int, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Cosine and sine of each position's angles, repeated for both halves. [B, T] -> two of [B, 1, T, D * fraction]"""
    turn, factor = compute_frequencies(rope, width, positions.device)
    angles = positions[..., None].float() * turn  # [B, T, D * fraction / 2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [B, 1, T, D * fraction]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """(re + i im) * (cos + i sin), re and im the two halves of the rotated dimensions. [B, H, T, D] -> same

    The tables may be float32 beside a narrower x (OLMo): the product is rounded once.
    """
    cos, sin = rotary
    if cos.shape[-1] < x.shape[-1]:
        turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        return torch.cat([rotate(turned, rotary), kept], dim=-1)
    re, im = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-im, re], dim=-1) * sin).to(x.dtype)
