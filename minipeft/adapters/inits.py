"""Inits of LoRA that need more than the weight: data (EVA), or the weight before it was quantized (LoftQ).

Both follow add_adapter, and change A and B alone.

    EVA     X = U S V^T of a linear's inputs X [N, in];  A = V_r^T, B = 0         (Paischer et al. 2024, section 3)
            of all A of rank r, this one keeps most of the inputs' energy: ||X A^T A - X|| is smallest
    LoftQ   W ~ Q + s B A:  s B A is the best approximation of W - Q of rank r    (Li et al. 2023, eq. 6-8)
            with Q the quantized weight; one step of their alternation, so that the base stays what
            load_model(quantize=) gives, and the adapter's file is all there is
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from minipeft.adapters.lora import LoRALinear, find_lora_layers
from minipeft.adapters.pissa import RESIDUAL, ResidualLinear, compute_principal
from minipeft.adapters.verdict import evaluating
from minipeft.documents import PADDING
from minipeft.errors import InputError, check_kind, check_memory
from minipeft.models import Decoder
from minipeft.models.quantized import is_quantized


class Rows(Protocol):
    """The fields of a batch that EVA reads."""

    ids: Tensor  # [B, T]
    documents: Tensor  # [B, T]


def initialize_eva(model: Decoder, batches: Iterable[Rows]) -> None:
    """Set each A to the principal directions of the linear's inputs over these batches, without padding; B to 0.

    The second moments X^T X of every adapted linear, in^2 float32 each, are in memory at once.

    Raises:
        InputError: the model holds no plain LoRA; no batches; fewer tokens than a rank; no memory for the moments.
    """
    layers = find_plain_layers(model, "initialize_eva")
    check_memory(sum(4 * layer.weight.shape[1] ** 2 for layer in layers.values()), "initialize_eva")
    moments = {path: layer.zeros(*layer.weight.shape[1:] * 2) for path, layer in layers.items()}  # [in, in]
    tokens = 0
    with evaluating(model):
        for batch in batches:
            real = batch.documents != PADDING  # [B, T]
            with listening(layers, moments, real):
                model.hidden(batch.ids, batch.documents)
            tokens += int(real.sum())
    most = max(layer.rank for layer in layers.values())
    if tokens < most:
        raise InputError(f"{tokens} tokens have no {most} principal directions", where="batches")
    with torch.no_grad():
        for path, layer in layers.items():
            _, V = torch.linalg.eigh(moments.pop(path))  # ascending: X^T X = V S^2 V^T
            layer.lora_A.copy_(V.flip(1)[:, : layer.rank].t())
            layer.lora_B.zero_()


@contextmanager
def listening(layers: dict[str, LoRALinear], moments: dict[str, Tensor], real: Tensor) -> Iterator[None]:
    """Context manager: accumulate X^T X of the inputs of each linear in its moment; X are the rows at `real` [B, T]."""

    def add(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0][real].float()  # [N, in]
        moments[path].addmm_(rows.t(), rows)

    handles = [layer.register_forward_pre_hook(partial(add, path)) for path, layer in layers.items()]
    for layer in layers.values():
        layer.together = None  # type: ignore[assignment]  # one by one, so that the hook of each is called
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            del layer.together  # the class's own again


def initialize_loftq(model: Decoder, plain: Decoder) -> float:
    """Set each A and B to the best approximation of the quantization error; returns the share of it,
    ||W - Q - s B A|| / ||W - Q|| over all linears, that is still missing. `plain` is the same checkpoint, unquantized.

    Raises:
        InputError: the base is not quantized, or `plain` is; the model holds no plain LoRA; another model.
    """
    check_kind(plain, Decoder, "plain")
    layers = find_plain_layers(model, "initialize_loftq")
    if not is_quantized(model) or is_quantized(plain):
        raise InputError("needs a quantized model and the plain weights beside it", where="initialize_loftq")
    left = whole = 0.0
    with torch.no_grad():
        for path, layer in layers.items():
            weight = dict(plain.named_parameters()).get(f"{path}.weight")
            if weight is None or weight.shape != layer.weight.shape:
                raise InputError(f"has no weight like that of {path!r}", where="plain")
            error = weight.float().to(layer.weight.device) - layer.weight.dequantize()  # W - Q [out, in]
            A, B = compute_principal(error, layer.rank, layer.scale)
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
            left += float((error - layer.scale * B @ A).square().sum())
            whole += float(error.square().sum())
    return (left / whole) ** 0.5 if whole else 0.0


def find_plain_layers(model: Decoder, where: str) -> dict[str, LoRALinear]:
    """Find the model's LoRALinears by path.

    Raises:
        InputError: there are none, or they start from a part of the weight.
    """
    check_kind(model, Decoder, "model")
    layers = find_lora_layers(model)
    if not layers or any(isinstance(layer, ResidualLinear) for layer in layers.values()):
        hint = f"add_adapter(model, LoRAConfig(...)) first, without init {' or '.join(RESIDUAL)}"
        raise InputError("the model holds no plain LoRA", where=where, hint=hint)
    return layers
