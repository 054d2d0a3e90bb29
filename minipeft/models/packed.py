"""Weights packed once for decoding: products of few rows read fewer bytes, and give float32's results.

At batch 1 a product x W^T reads each weight once: its time is that of reading W. FBGEMM (Khudia et al. 2021, which
torch ships for x86) keeps a copy of W in float16, in the order in which its kernel reads it, and multiplies and adds
in float32. Nothing is rounded if every weight is a float16, up to one power of two for the whole tensor:

    y = x (2^k W)^T 2^-k        k: the largest |2^k w| lies in [2^14, 2^15)

Weights that were stored in bfloat16 or float16 are (a bfloat16 down to 2^-32 of the largest), and so are the values of
a quantized weight in bfloat16. A plain tensor that is not is left as it is. A quantized weight would be dequantized for
each token: where float16 does not hold its values, its copy is these values themselves, in its dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.models.decoder import Decoder
from minipeft.models.quantized import QuantizedWeight

ROWS = 64  # rows of x up to which the packed product is used: decoding, not the pass over the prompts


class PackedWeight(Tensor):
    """A weight [N, K] beside a copy for decoding; only F.linear sees the copy, every other operator the weight."""

    plain: Tensor
    version: int  # of `plain`, when it was packed
    copy: Any  # torch's object for 2^k W in float16, or W's values as a tensor
    factor: float  # 2^-k

    @staticmethod
    def __new__(cls, plain: Tensor, copy: Any, factor: float = 1.0) -> PackedWeight:
        made = Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype, device=plain.device)
        made.plain, made.version, made.copy, made.factor = plain, plain._version, copy, factor
        return made

    @property
    def bytes(self) -> int:
        """The bytes of the copy."""
        return self.copy.nbytes if isinstance(self.copy, Tensor) else 2 * self.plain.numel()

    def dequantize(self) -> Tensor:  # a quantized weight's own methods are Python's, which torch does not dispatch
        return self.plain.dequantize()

    def split(self, rows: int, dim: int = 0) -> Any:  # type: ignore[override]
        return self.plain.split(rows, dim)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return multiply(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*(a.plain if isinstance(a, PackedWeight) else a for a in args), **(kwargs or {}))


def multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: the copy's product for few rows without gradients, else the plain one. [..., K] -> [..., N]"""
    if x.numel() > ROWS * x.shape[-1] or torch.is_grad_enabled():
        return F.linear(x, weight.plain, bias)
    if isinstance(weight.copy, Tensor):
        return F.linear(x, weight.copy, bias)
    wide = x if x.dtype == torch.float32 else x.float()
    y: Tensor = torch.ops.quantized.linear_dynamic_fp16(wide, weight.copy)  # [..., N]
    if weight.factor != 1.0:
        y *= weight.factor
    if bias is not None:
        y += bias
    return y if x.dtype == torch.float32 else y.to(x.dtype)


class PackedModel:
    """The packed copies of a model's weights, which products read within `with packed.used():`.

    `half`: copies in float16 where they are exact; without it only quantized weights have copies, of their values.
    """

    def __init__(self, model: Decoder, empty: bool = False, half: bool = True):
        found = [] if empty or not can_pack(model) else find_modules(model)
        made = [(module, pack_weight(find_weight(module), half)) for module in found]
        self.held = [(module, copy) for module, copy in made if copy is not None]
        self.weights = len(find_modules(model))
        self.bytes = sum(copy.bytes for _, copy in self.held)

    def __str__(self) -> str:
        return f"{len(self.held)} of {self.weights} weights packed for decoding ({self.bytes / 1e6:,.0f} MB)"

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within the context the model's products of up to ROWS rows read the copies. A weight that was replaced or
        changed since it was packed is used as it is."""
        current = [
            (module._parameters, copy)
            for module, copy in self.held
            if module._parameters.get("weight") is copy.plain and copy.plain._version == copy.version
        ]
        try:
            for parameters, copy in current:
                parameters["weight"] = copy  # type: ignore[assignment]
            yield
        finally:
            for parameters, copy in current:
                parameters["weight"] = copy.plain  # type: ignore[assignment]


def can_pack(model: Decoder) -> bool:
    """Whether this build of torch has the product for the model's device, and the machine's memory holds weights and
    copies in three quarters; not whether it is free now, so that a machine gives the same answers each time."""
    if model.embedding.weight.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    held = sum(p.nbytes_held() if isinstance(p, QuantizedWeight) else p.nbytes for p in model.parameters())
    weights = [find_weight(module) for module in find_modules(model)]
    copies = sum(w.numel() * (w.itemsize if isinstance(w, QuantizedWeight) else 2) for w in weights)
    return held + copies < 0.75 * memory


def find_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear, which may be quantized or packed."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def find_modules(model: Decoder) -> list[nn.Module]:
    """The modules with a weight [N, K] to multiply with: the linears, adapted or not, and the head."""
    linears = (m for m in model.modules() if isinstance(m, nn.Linear) or getattr(m, "adopts_linear", False))
    return [m for m in linears if not isinstance(find_weight(m), PackedWeight)]


def pack_weight(weight: Tensor, half: bool = True) -> PackedWeight | None:
    """Pack a weight; None if it is plain and float16 does not hold it exactly, whatever the power of two.

    `half` False: without the copy in float16.
    """
    quantized = isinstance(weight, QuantizedWeight)
    if not (half or quantized):
        return None
    wide = weight.dequantize() if quantized else weight.detach().float()
    if half:
        exponent = int(torch.frexp(wide.abs().amax()).exponent)
        for factor in (1.0, 2.0 ** min(max(exponent - 15, -126), 126)):
            scaled = wide if factor == 1.0 else wide / factor
            if all(torch.equal(part.half().float(), part) for part in (scaled[:1], scaled)):  # one row tells most
                return PackedWeight(weight, torch.ops.quantized.linear_prepack_fp16(scaled, None), factor)
    return PackedWeight(weight, wide.to(weight.dtype)) if quantized else None
