"""Predict parameters, memory and FLOPs of a training step from config.json alone.

    forward        2 FLOPs per weight of a linear and token, and 4 * n * C per token and layer for attention over n keys
    backward       as much again for the gradient of the activations, and again for that of the weights, if trained

    peak memory    the weights, AdamW's two moments of the trained parameters, and the peak of activations, gradients
                   and buffers during the step

The last is measured, since a formula would have to follow every change of the models: a step runs on torch's "meta"
device, whose tensors have shapes but no data, and every allocation is counted until it is freed. Seconds are estimated
from a short matrix product on this machine.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minipeft.adapters import AdapterReport, add_adapter, find_method
from minipeft.errors import InputError
from minipeft.models import FAMILIES, Decoder
from minipeft.models.products import fast_products
from minipeft.models.quantized import QuantizedWeight, quantize_model
from minipeft.training.gradients import released, wide_gradients
from minipeft.training.loop import trained

PROBE = (256, 1024, 1024)  # a product of the size of those in training
PROBE_SECONDS = 0.15
SMALL_PROBE = (128, 256, 256)  # a product of a small model: threads wait for each other after each
MOST_LAYERS = 512  # more than any known model has
EFFICIENCY = 0.6  # speed of training steps / speed of the probe: 135M Llama, LoRA, one core, fp32 and bf16


@dataclass(frozen=True)
class Plan:
    """The cost of a training step; memory in bytes."""

    method: str
    rows: int
    length: int  # tokens of a row
    dtype: str  # of the base
    quantized: str | None  # the format of its linears
    trainable: int  # parameters
    total: int
    packed: int  # `total` if each byte of codes counts as a parameter, a common miscount of 4-bit models
    weights: int  # bytes of base and adapter
    moments: int  # bytes of AdamW's two moments
    step: int  # bytes of activations, gradients and buffers at the step's peak
    flops: float  # per step

    @property
    def peak(self) -> int:
        """Peak bytes in use, without the allocator's rounding and the process itself."""
        return self.weights + self.moments + self.step

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100 * self.trainable / self.total


def plan(
    config: Any,
    adapter: Any,
    *,
    rows: int = 1,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    optimizer_in_backward: bool = False,
    passes: int = 1,
    quantize: str | None = None,
) -> Plan:
    """Predict the cost of training `adapter` on a model of this config.json, in steps of `rows` x `length` tokens.

    `length` None is 1024, or the context that the virtual tokens leave. `dtype` is that of the base, `quantize` the
    format of its linears. `passes`: how often a step runs forward and backward (TrainConfig). Each row counts as one
    document, attention as a fused kernel, and the LoRA linear as the reference backend: on a GPU the fused backend
    takes less.

    Raises:
        InputError: the adapter does not fit the model, the rows do not fit its context, or the model has more layers
            than any known one.
    """
    model, report = adapt_on_meta(config, adapter, dtype, quantize)
    room = config.context - model.virtual_tokens
    length = min(1024, room) if length is None else length
    if length > room:
        raise InputError(f"{length} exceeds the {room} tokens that the model has room for", where="length")
    model.train()
    model.activation_checkpointing = activation_checkpointing
    weights = count_bytes([*model.parameters(), *model.buffers()])
    moments = 8 * report.trainable  # float32
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")  # [B, T]
    parameters = trained(model) if optimizer_in_backward else {}
    with released(parameters, lambda name, p: None):
        step = count_step_bytes(model, ids)
    full = find_method(adapter).trains_base
    flops = passes * count_train_flops(
        config, rows * length, length, full=full, activation_checkpointing=activation_checkpointing
    )
    packed = sum(p.parts.codes.numel() if isinstance(p, QuantizedWeight) else p.numel() for p in model.parameters())
    return Plan(
        report.method, rows, length, report.base_dtype, report.quantized,
        report.trainable, report.total, packed, weights, moments, step, flops,
    )  # fmt: skip


def adapt_on_meta(
    config: Any, adapter: Any, dtype: torch.dtype, quantize: str | None = None
) -> tuple[Decoder, AdapterReport]:
    """Build a model of this config.json with the adapter on the meta device.

    Raises:
        InputError: the adapter does not fit the model, or the model has more layers than any known one.
    """
    model = build_on_meta(config).to(dtype)
    if quantize is not None:
        quantize_model(model, quantize)
    report = add_adapter(model, adapter)
    return model, report


def count_step_bytes(model: Decoder, ids: Tensor) -> int:
    """Count the peak bytes beside the weights while a step's gradients are computed. ids [B, T]"""
    with wide_gradients(trained(model).values()), Memory(model) as memory:
        model.loss(ids, ids).backward()
    model.zero_grad(set_to_none=True)
    return memory.most


def count_bytes(tensors: Sequence[Tensor]) -> int:
    """Count the bytes of these tensors, each storage once."""
    storages = [t.untyped_storage() for t in list_held_tensors(tensors)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def list_held_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that hold data: the codes and scales of a quantized one."""
    return [part for t in tensors for part in (t.parts if isinstance(t, QuantizedWeight) else (t,))]


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that operators return while it is active, until they are freed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.most = 0
        held = list_held_tensors([*model.parameters(), *model.buffers()])
        self.known = {t.untyped_storage()._cdata for t in held}

    def __torch_dispatch__(self, call: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, QuantizedWeight):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a new storage until it is freed."""
        place, size = storage._cdata, storage.nbytes()
        if place in self.known:
            return
        self.known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, place, size)

    def free(self, place: int, size: int) -> None:
        """Subtract a freed storage."""
        self.known.discard(place)
        self.now -= size


def build_on_meta(config: Any) -> Decoder:
    """Build a model of this config.json on the meta device.

    Raises:
        InputError: more layers than any known model has.
    """
    if config.layers > MOST_LAYERS:
        raise InputError(f"{config.layers} are more than the {MOST_LAYERS} that any known model has", where="layers")
    model: Decoder = FAMILIES[config.model_type].build_empty(config)
    return model


def count_linear_weights(config: Any) -> int:
    """Count the weights that multiply every token: all linears of the blocks, and the head."""
    model = build_on_meta(config)
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    return blocks + config.vocab_size * config.width


def count_forward_flops(config: Any, tokens: float, document: int) -> float:
    """FLOPs of one forward pass over `tokens` tokens in documents of about `document` tokens each."""
    return tokens * (2 * count_linear_weights(config) + 4 * document * config.heads * config.head_width * config.layers)


def count_train_flops(
    config: Any, tokens: float, document: int, *, full: bool, activation_checkpointing: bool = False
) -> float:
    """FLOPs of training on them: forward, backward through the activations, and trained weights or recomputation."""
    return count_forward_flops(config, tokens, document) * (1 + 1 + full + activation_checkpointing)


def probe_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Measure this machine's FLOP/s for a matrix product in this dtype, in about PROBE_SECONDS."""
    m, k, n = PROBE
    return 2.0 * m * k * n * count_products(PROBE, dtype, device)


def probe_threads(number: int) -> float:
    """Measure how many small products so many CPU threads make in a second, in about PROBE_SECONDS."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return count_products(SMALL_PROBE, torch.float32, torch.device("cpu"))
    finally:
        torch.set_num_threads(before)


def count_products(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Measure how many products [m, k] [k, n] this machine makes in a second."""
    m, k, n = shape
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    with fast_products():
        torch.nn.functional.linear(a, b)
        start, products, seconds = time.perf_counter(), 0, 0.0
        while seconds < PROBE_SECONDS:  # at least one: a busy machine may spend the time elsewhere
            torch.nn.functional.linear(a, b).sum().item()  # wait for a GPU
            products, seconds = products + 1, time.perf_counter() - start
        return products / seconds


def format_seconds(seconds: float, fine: bool = False) -> str:
    """Format a duration: 45 s, 12 min, 1.5 h; `fine`: with a decimal below ten seconds."""
    if seconds < 90:
        return f"{seconds:.2g} s" if fine and seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format plans as a table, one per line; memory in GB (10^9 bytes)."""
    heads = ("model", "method", "rows", "base", "trained", "%", "weights", "AdamW", "step", "peak GB", "TFLOP", "here")
    cells = [heads] + [
        (
            row["model"],
            row["method"],
            f"{row['rows']} x {row['length']}",
            row["quantized"] or row["dtype"],
            f"{row['trainable']:,}",
            f"{row['percent']:.3g}",
            *(f"{row[name] / 1e9:.2f}" for name in ("weights", "moments", "step", "peak")),
            f"{row['flops'] / 1e12:.3g}",
            format_seconds(row["seconds"], fine=True),
        )
        for row in rows
    ]
    lines = align(cells, left=4)
    legend = (
        "peak = weights + AdamW's moments + the most that a step adds (activations, gradients), in GB of 10^9 bytes;\n"
        "the process itself comes on top. TFLOP and seconds are those of one step."
    )
    counts = []
    for row in rows:
        if row["packed"] != row["total"]:
            share = f"{100 * row['trainable'] / row['packed']:.3g} %"
            counts.append(
                f"{row['model']}, {row['method']}: {share} are trained, if a byte of codes counts as a parameter"
            )
    return "\n".join([*lines, "", legend, *counts])


def align(cells: Sequence[Sequence[str]], left: int) -> list[str]:
    """Format the rows of a table as lines; the first `left` columns are flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = ("<",) * left + (">",) * (len(widths) - left)
    return ["  ".join(f"{c:{side}{w}}" for c, side, w in zip(line, sides, widths)).rstrip() for line in cells]
