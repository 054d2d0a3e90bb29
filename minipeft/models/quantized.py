"""A quantized weight as a tensor subclass: the weight of a linear whose values are stored as codes (quantize.py).

To the rest of the library it is the weight: it has its shape, its device, and the dtype of its dequantized values. It
supports products, moves and dequantization; any other operator is refused by name. Both products dequantize a block of
rows at a time, so that no dense copy of W exists, in forward or backward:

    y[:, n] = x W[n]^T        dx = sum over blocks n of dy[:, n] W[n]

The weight is frozen: only x and the bias have gradients. F.linear, and with it products.linear and the LoRA linear's
reference backend, come here by torch's own dispatch (`__torch_function__`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models.decoder import Decoder
from minipeft.models.quantize import FORMATS, NF4, Int8, check_format, make_nf4_code

CACHE, DEVICE = 1 << 20, 1 << 24  # values dequantized at a time: on a CPU 4 MB in float32, of which a cache holds most


class QuantizedWeight(Tensor):
    """A frozen weight [N, K] of a linear, stored as codes. It supports products, moves and dequantization alone."""

    parts: NF4 | Int8

    @staticmethod
    def __new__(cls, parts: NF4 | Int8, shape: torch.Size, dtype: torch.dtype) -> QuantizedWeight:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device)
        made.parts = parts
        return made

    def dequantize(self) -> Tensor:
        """The weight as a plain float32 tensor, which holds each value of `dtype` exactly. [N, K]"""
        return torch.cat(list(self.split(len(self)))).float()

    def split(self, rows: int, dim: int = 0) -> Iterator[Tensor]:  # type: ignore[override]
        """Yield dequantized blocks of at most so many rows. [n, K]"""
        for start, stop in self.cuts(rows):
            yield self.dense(start, stop)

    def dense(self, start: int, stop: int) -> Tensor:
        """Some rows as a plain tensor of the weight's dtype. [n, K]"""
        return self.parts.values(start, stop, self.shape[1]).to(self.dtype)

    def cuts(self, rows: int | None = None) -> Iterator[tuple[int, int]]:
        """Where blocks of `rows` rows begin and end; by default as many as the device's limit allows."""
        height, width = self.shape
        rows = rows or max(1, (CACHE if self.device.type == "cpu" else DEVICE) // width)
        for start in range(0, height, rows):
            yield start, min(start + rows, height)

    def nf4(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Codes, the absmax of each block and the 16 values of an NF4 weight, for the Triton products; else None.

        A pair of codes must not lie in two rows, so that None is also the answer for an odd width.
        """
        if not isinstance(self.parts, NF4) or self.shape[1] % 2:
            return None
        absmax = self.parts.absmax(slice(0, len(self.parts.scales)))  # [blocks]
        return self.parts.codes, absmax, make_nf4_code(self.device)

    def t(self) -> Transposed:  # type: ignore[override]
        return Transposed(self)

    def nbytes_held(self) -> int:
        """The bytes of codes and scales."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def __repr__(self) -> str:  # type: ignore[override]
        name = type(self.parts).__name__.lower()
        return f"QuantizedWeight({name}, {tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.parts._fields), (type(self.parts), self.shape, self.dtype)

    def __getattr__(self, name: str) -> Tensor:
        if name in NF4._fields or name in Int8._fields:
            tensor: Tensor = getattr(self.parts, name)
            return tensor
        raise AttributeError(name)

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], context: Any, size: Any, stride: Any) -> QuantizedWeight:
        kind, shape, dtype = context
        return QuantizedWeight(kind(**inner), shape, dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            return PRODUCTS[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        packet, kwargs = func.overloadpacket, dict(kwargs or {})
        self = next(a for a in args if isinstance(a, QuantizedWeight))
        if packet in KEEPS:
            dtype = kwargs.pop("dtype", None) or self.dtype
            parts = [func(part, *args[1:], **kwargs) for part in self.parts]
            return QuantizedWeight(type(self.parts)(*parts), self.shape, dtype)
        if packet in MAKES:
            like = torch.empty(self.shape, dtype=self.dtype, device="meta")
            return func(like, *args[1:], **{"device": self.device, **kwargs})
        problem = f"a quantized weight has no {packet.__name__}"
        raise InputError(problem, where="quantize", hint="dequantize_model(model) makes the weights plain again")


class Transposed:
    """W^T of a quantized weight, as an operand of a product."""

    def __init__(self, weight: QuantizedWeight):
        self.weight = weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        dy, weight = args[:2]
        if func is not F.linear or not isinstance(weight, cls):
            return NotImplemented
        return multiply_by_weight(dy, weight.weight)


def multiply_by_weight_t(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x W^T, a block of rows of W at a time. [..., K] -> [..., N]"""
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    y = x.new_empty(len(flat), weight.shape[0])  # [M, N]
    for start, stop in weight.cuts():
        torch.mm(flat, weight.dense(start, stop).t(), out=y[:, start:stop])
    return y.view(*x.shape[:-1], -1)


def multiply_by_weight(dy: Tensor, weight: QuantizedWeight) -> Tensor:
    """dY W, a block of rows of W at a time. [..., N] -> [..., K]"""
    flat = dy.reshape(-1, dy.shape[-1])  # [M, N]
    dx = dy.new_zeros(len(flat), weight.shape[1])  # [M, K]
    for start, stop in weight.cuts():
        dx.addmm_(flat[:, start:stop], weight.dense(start, stop))
    return dx.view(*dy.shape[:-1], -1)


class QuantizedProduct(torch.autograd.Function):
    """x W^T + b; the weight is frozen, so that only x and b have gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = multiply_by_weight_t(x, weight)  # [..., N]
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        needs_x, _, needs_bias = ctx.needs_input_grad
        dx = multiply_by_weight(dy, ctx.weight) if needs_x else None  # [..., K]
        return dx, None, dy.flatten(0, -2).sum(0) if needs_bias else None


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """F.linear of a quantized weight: x W^T + b. [..., K] -> [..., N]"""
    return QuantizedProduct.apply(x, weight, bias)


def add_times_weight(dx: Tensor, dy: Tensor, weight: QuantizedWeight) -> Tensor:
    """dX + dY W in place, as addmm_ of a plain weight. dx [M, K], dy [M, N]"""
    return dx.add_(multiply_by_weight(dy, weight))


aten = torch.ops.aten
PRODUCTS: dict[Any, Callable[..., Tensor]] = {F.linear: linear, Tensor.addmm_: add_times_weight}
KEEPS = {aten.detach, aten.alias, aten.clone, aten._to_copy}
MAKES = {aten.new_zeros}


def quantize_weight(weight: Tensor, format: str) -> QuantizedWeight:
    """Quantize a weight [N, K] of a linear to one of FORMATS; its dtype stays that of the dequantized values.

    Raises:
        InputError: the format's name is unknown.
    """
    check_format(format)
    return QuantizedWeight(FORMATS[format].quantize(weight.detach()), weight.shape, weight.dtype)


def find_quantizable(model: Decoder) -> dict[str, nn.Linear]:
    """The linears to quantize, by path: those of the blocks; embedding and head stay as they are."""
    stem = model.family.blocks
    return {f"{stem}.{name}": m for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}


def quantize_model(model: Decoder, format: str) -> Decoder:
    """Quantize each linear of the blocks in place; returns the model. Load with `quantize=` for less memory.

    Raises:
        InputError: the format is unknown, the model holds an adapter, or weights are quantized already.
    """
    check_format(format)
    if model.adapter is not None or is_quantized(model):
        held = "an adapter" if model.adapter is not None else "quantized weights already"
        raise InputError(f"the model holds {held}", where="quantize")
    for layer in find_quantizable(model).values():
        layer.weight = nn.Parameter(quantize_weight(layer.weight, format), requires_grad=False)
    return model


def find_quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantized weights, by the path of the module that holds them."""
    held = {path: module._parameters.get("weight") for path, module in model.named_modules()}
    return {path: weight for path, weight in held.items() if isinstance(weight, QuantizedWeight)}


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the modules at these paths these weights; a quantized one is frozen."""
    for path, weight in weights.items():
        trained = not isinstance(weight, QuantizedWeight)
        model.get_submodule(path).weight = nn.Parameter(weight, requires_grad=trained and weight.requires_grad)


def dequantize_model(model: nn.Module) -> None:
    """Replace each quantized weight by its dequantized values, in its dtype; adapters stay."""
    for path, weight in find_quantized_weights(model).items():
        put_weights(model, {path: weight.dequantize().to(weight.dtype)})


def find_quantization(model: nn.Module) -> str | None:
    """The format of the model's quantized weights, or None."""
    for p in model.parameters():
        if isinstance(p, QuantizedWeight):
            return next(name for name, kind in FORMATS.items() if isinstance(p.parts, kind))
    return None


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight is quantized."""
    return find_quantization(model) is not None
