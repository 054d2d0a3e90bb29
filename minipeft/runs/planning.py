"""What a run will take, worked out before it starts: parameters, memory and FLOPs from config.json alone.

    forward        2 FLOPs per weight of a linear and token, and 4 * n * C per token and layer for attention over n keys
    backward       as much again for the gradient of the activations, and again for that of the weights, if trained

    peak memory    the weights, AdamW's two moments of what is trained, and the most that stands beside them in a step

The last is not a formula that would have to be kept in step with the models: a step is done with tensors on torch's
"meta" device, which have shapes and no data, and every memory that it asks for is counted while it is alive. Seconds
come from a probe of this machine.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minipeft.errors import InputError
from minipeft.models import FAMILIES, Decoder, attention
from minipeft.models.loss import LinearCrossEntropy

if TYPE_CHECKING:
    from minipeft.adapters import AdapterConfig

PROBE = (256, 1024, 1024)  # a product of the size that training has
PROBE_SECONDS = 0.15
MOST_LAYERS = 512  # of known models
EFFICIENCY = 0.6  # of the probe's speed that whole steps reach: 135M Llama, LoRA, one core, fp32 and bf16


@dataclass(frozen=True)
class Plan:
    """What training takes; memory in bytes."""

    method: str
    rows: int
    length: int  # tokens of a row
    trainable: int  # numbers
    total: int
    weights: int  # of the model, the adapter's included
    moments: int  # AdamW's two
    step: int  # the most that stands beside them in a step: activations, gradients, what is worked on
    flops: float  # a step

    @property
    def peak(self) -> int:
        """The bytes that are in use at the worst moment. An allocator's rounding and the process come on top."""
        return self.weights + self.moments + self.step

    @property
    def percent(self) -> float:
        """Trained numbers among all, in percent."""
        return 100 * self.trainable / self.total


def plan(
    config: Any,
    adapter: AdapterConfig,
    *,
    rows: int = 1,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
) -> Plan:
    """What it takes to train `adapter` on a model of this config.json, in steps of `rows` x `length` tokens.

    `length` None is 1024, or what the model has room for. `dtype` is that of the base (full tuning: float32). Each row
    is counted as one document, with attention by a fused kernel, which keeps its inputs, its output and a number for
    each head and query; the reference path of the LoRA linear is counted, and on a GPU the fused one takes less.

    Raises:
        InputError: the adapter does not fit the model, the rows do not fit its context, or no model has so many layers.
    """
    from minipeft.adapters import FullConfig, add_adapter

    room = config.context - getattr(adapter, "length", 0)
    length = min(1024, room) if length is None else length
    if length > room:
        raise InputError(f"{length} exceeds the {room} columns that the model has room for", where="length")
    full = isinstance(adapter, FullConfig)
    model = without_data(config)
    report = add_adapter(model.to(torch.float32 if full else dtype), adapter)
    model.train()
    model.activation_checkpointing = activation_checkpointing
    weights = bytes_of([*model.parameters(), *model.buffers()])
    moments = 2 * bytes_of([p for p in model.parameters() if p.requires_grad])
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    flops = train_flops(config, rows * length, length, full=full, activation_checkpointing=activation_checkpointing)
    return Plan(
        report.method, rows, length, report.trainable, report.total, weights, moments, step_bytes(model, ids), flops
    )


def step_bytes(model: Any, ids: Tensor) -> int:
    """The most bytes that stand beside the weights while a step's gradients are found. ids [B, T]"""
    with Memory(model) as memory, fused_attention():
        hidden = model.hidden(ids)[:, :-1].flatten(0, 1)  # [B * (T - 1), C]
        loss = LinearCrossEntropy.apply(hidden, model.lm_head.weight, ids[:, 1:].flatten())
        loss.backward()
    model.zero_grad(set_to_none=True)
    return memory.most


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """The bytes of some tensors, each memory once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make while it is on, from their making to their end."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.most = 0
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, call: Any, types: Any, given: Sequence[Any] = (), named: Any = None) -> Any:
        made = call(*given, **(named or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a memory that was not seen yet, until it is freed."""
        place, size = storage._cdata, storage.nbytes()
        if place in self.known:
            return
        self.known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, place, size)

    def forget(self, place: int, size: int) -> None:
        """A memory was freed."""
        self.known.discard(place)
        self.now -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within: attention on the meta device keeps what a fused kernel keeps; torch would take the unfused product there.

    Not by a TorchFunctionMode: backward is not under it, and a checkpointed block is recomputed in backward.
    """
    real = attention.product

    def product(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
        return KeptByAttention.apply(q, k, v) if q.is_meta else real(q, k, v, *others)

    attention.product = product  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.product = real


class KeptByAttention(torch.autograd.Function):
    """The shapes of fused attention without its numbers. q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D]"""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q.contiguous())  # [B, H, T, D]
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))  # the last: log-sum-exp
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def without_data(config: Any) -> Decoder:
    """A model of this config.json on the meta device: shapes alone.

    Raises:
        InputError: more layers than any known model has, each of which would be built.
    """
    if config.layers > MOST_LAYERS:
        raise InputError(f"{config.layers} are more than the {MOST_LAYERS} that any known model has", where="layers")
    with torch.device("meta"):
        return FAMILIES[config.model_type][1](config)


def linear_weights(config: Any) -> int:
    """The weights that every token is multiplied with: all linears of the blocks, and the head."""
    model = without_data(config)
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    return blocks + config.vocab_size * config.width


def forward_flops(config: Any, tokens: float, document: int) -> float:
    """FLOPs of one forward pass over `tokens` tokens in documents of about `document` tokens."""
    return tokens * (2 * linear_weights(config) + 4 * document * config.heads * config.head_width * config.layers)


def train_flops(
    config: Any, tokens: float, document: int, *, full: bool, activation_checkpointing: bool = False
) -> float:
    """FLOPs of training on them: forward, backward through the activations, and what is trained or recomputed."""
    return forward_flops(config, tokens, document) * (1 + 1 + full + activation_checkpointing)


def probe_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of this machine for a matrix product of the given kind, measured in about PROBE_SECONDS."""
    m, k, n = PROBE
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    torch.nn.functional.linear(a, b)
    start, products = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < PROBE_SECONDS:
        torch.nn.functional.linear(a, b).sum().item()
        products += 1
    return 2.0 * m * k * n * products / seconds


def in_words(seconds: float, fine: bool = False) -> str:
    """A duration as a person says it; `fine`: with a decimal below ten seconds."""
    if seconds < 90:
        return f"{seconds:.2g} s" if fine and seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Plans as a table, one a line; memory in GB (10^9 bytes)."""
    heads = ("model", "method", "rows", "base", "trained", "%", "weights", "AdamW", "step", "peak GB", "TFLOP", "here")
    cells = [heads] + [
        (
            row["model"],
            row["method"],
            f"{row['rows']} x {row['length']}",
            row["dtype"],
            f"{row['trainable']:,}",
            f"{row['percent']:.3g}",
            *(f"{row[name] / 1e9:.2f}" for name in ("weights", "moments", "step", "peak")),
            f"{row['flops'] / 1e12:.3g}",
            in_words(row["seconds"], fine=True),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = ("<",) * 4 + (">",) * (len(heads) - 4)
    lines = ["  ".join(f"{c:{side}{w}}" for c, side, w in zip(line, sides, widths)).rstrip() for line in cells]
    said = (
        "peak = weights + AdamW's moments + the most that stands beside them in a step (activations, gradients), in GB "
        "of\n10^9 bytes; the process and what an operator takes within itself come on top. TFLOP, seconds: of a step."
    )
    return "\n".join([*lines, "", said])
