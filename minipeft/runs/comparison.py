"""Find the first tensor, forward and backward, in which two models part: the tool for whoever adds a family.

Both models read the same ids. Hooks record what each module returns, in the order of execution, and the gradient of the
loss at that tensor, in the order in which backward reaches it. Modules are matched by name, which are Hugging Face's in
both. For tensors a and b,

    difference = max |a - b|          relative = max |a - b| / max |a|

and the models part at the first module whose relative difference exceeds the tolerance. Before that, weights of one
name are compared: a weight that differs is often the whole answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapters.lora import find_backend, find_lora_layers
from minipeft.adapters.peft_format import load_adapter
from minipeft.data.tokens import load_tokenizer
from minipeft.errors import InputError, check_fields, option
from minipeft.models import Decoder
from minipeft.models.checkpoint import load_model
from minipeft.runs.config import DTYPES
from minipeft.runs.peer import load_peer

TEXT = "def add(first, second):\n    return first + second\n"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of a relative difference: far above rounding of many layers
STAGES = ("weight", "forward", "backward")
LOGITS = "logits"  # the name of the root module's output


@dataclass(frozen=True)
class CompareConfig:
    """Two models and how each is loaded; what is not given for the second is as for the first."""

    first: str = option(help="folder or hub id of a checkpoint, or demo", flag="model-a")
    second: str = option(help="the model to compare it with", flag="model-b")
    adapter: str | None = option(None, "folder or hub id of an adapter for both models")
    adapter_b: str | None = option(None, "another adapter for the second model")
    dtype: str | None = option(None, "dtype of both models, fp32 or bf16; default fp32", choices=DTYPES)
    dtype_b: str | None = option(None, "another dtype for the second model", choices=DTYPES)
    backend: str | None = option(None, "LoRA backend of the first model", choices=("reference", "hybrid", "fused"))
    backend_b: str | None = option(None, "LoRA backend of the second model", choices=("reference", "hybrid", "fused"))
    transformers: bool = option(False, "load the second model with transformers, which must be installed")
    text: str = option(TEXT, "text that both models read")
    ids: tuple[int, ...] = option((), "ids that both models read, in place of a text")
    tolerance: float | None = option(
        None, "relative difference from which two tensors differ; default 1e-4, in bf16 5e-2", above=0
    )
    device: str = option("cpu", "cpu, cuda, ...")
    every: bool = option(False, "print every tensor, not those around the first difference alone", flag="all")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.transformers and (self.adapter or self.adapter_b or self.backend_b):
            hint = "Merge the adapter first (minipeft merge), and compare the merged models"
            raise InputError("it cannot load an adapter or a backend", where="transformers", hint=hint)


@dataclass(frozen=True)
class Difference:
    """One tensor of both models: its stage, name, and the differences; `problem` where they cannot be subtracted."""

    stage: str
    name: str
    absolute: float | None
    relative: float | None
    problem: str | None = None

    def exceeds(self, tolerance: float) -> bool:
        return self.relative is None or self.relative > tolerance


@dataclass(frozen=True)
class Comparison:
    """All tensors that both models have, in the order of execution, and the names that only one has."""

    rows: tuple[Difference, ...]
    tolerance: float
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def first(self, stage: str) -> Difference | None:
        """The first tensor of a stage that differs beyond the tolerance."""
        return next((row for row in self.rows if row.stage == stage and row.exceeds(self.tolerance)), None)

    @property
    def equal(self) -> bool:
        return not any(self.first(stage) for stage in ("forward", "backward"))


@dataclass
class Record:
    """What a model computed: outputs by module name in execution order, and gradients as backward reached them."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def compare(config: CompareConfig) -> Comparison:
    """Load both models, run them on the same ids, and compare.

    Raises:
        InputError: a model or adapter cannot be loaded, the ids do not fit one of them, or the models share no module.
    """
    dtypes = [DTYPES[name or "fp32"] for name in (config.dtype, config.dtype_b or config.dtype)]
    first = load_one(config.first, dtypes[0], config.adapter, config.backend, config.device)
    if config.transformers:
        second = load_peer(config.second, dtypes[1]).to(config.device)
    else:
        adapter, backend = config.adapter_b or config.adapter, config.backend_b or config.backend
        second = load_one(config.second, dtypes[1], adapter, backend, config.device)
    given = list(config.ids) or load_tokenizer(config.first).encode(config.text)
    if len(given) < 2:
        raise InputError("needs at least two ids", where="ids" if config.ids else "text")
    ids = torch.tensor([given], device=config.device)  # [1, T]
    tolerance = config.tolerance or max(TOLERANCES[dtype] for dtype in dtypes)
    return compare_models(first, second, ids, tolerance)


def load_one(source: str, dtype: torch.dtype, adapter: str | None, backend: str | None, device: str) -> Decoder:
    """Load a model with its adapter, every LoRA layer on the given backend."""
    model = load_model(source, dtype=dtype, device=device)
    if adapter is not None:
        load_adapter(model, adapter, trainable=True)
    if backend is not None:
        layers = find_lora_layers(model)
        if not layers:
            raise InputError("chooses how LoRA is computed, but the model has none", where="backend")
        find_backend(model, replace(model.adapter, backend=backend))  # refused here, with the reason, if it cannot run
        for layer in layers.values():
            layer.backend = backend
            layer.bind()
    return model.eval()


def compare_models(first: nn.Module, second: nn.Module, ids: Tensor, tolerance: float) -> Comparison:
    """Compare two models on ids [B, T]: weights, outputs of modules, gradients at these outputs.

    Raises:
        InputError: they share no module.
    """
    a, b = record(first, ids), record(second, ids)
    shared = [name for name in a.outputs if name in b.outputs]
    if len(shared) < 2:
        raise InputError("the models have no module of one name in common", where="compare")
    weights = dict(second.named_parameters())
    rows = [
        measure("weight", name, p.detach(), weights[name].detach())
        for name, p in first.named_parameters()
        if name in weights
    ]
    rows += [measure("forward", name, a.outputs[name], b.outputs[name]) for name in shared]
    rows += [measure("backward", n, g, b.gradients[n]) for n, g in a.gradients.items() if n in b.gradients]
    only = [tuple(n for n in mine.outputs if n not in theirs.outputs) for mine, theirs in ((a, b), (b, a))]
    return Comparison(tuple(rows), tolerance, *only)


def record(model: nn.Module, ids: Tensor) -> Record:
    """Run forward and backward of the mean next-token loss, and record every module's first result."""
    found = Record()
    with watching(model, found), torch.enable_grad():
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
        result = model(ids)
        logits: Tensor = result if isinstance(result, Tensor) else result.logits  # [B, T, V]
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    model.zero_grad(set_to_none=True)
    return found


@contextmanager
def watching(model: nn.Module, found: Record) -> Iterator[None]:
    """Context manager: hooks on all modules, removed at the end."""

    def make_hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, given: Any, result: Any) -> None:
            tensor = find_tensor(result)
            if tensor is not None and name not in found.outputs:
                found.outputs[name] = tensor.detach().float().cpu()
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: keep(found.gradients, name, gradient))

        return note

    hooks = [module.register_forward_hook(make_hook(name or LOGITS)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def keep(gradients: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    """Keep a gradient in the order in which backward reaches it."""
    gradients.setdefault(name, gradient.detach().float().cpu())


def find_tensor(result: Any) -> Tensor | None:
    """The first floating-point tensor of what a module returns: itself, of a tuple, or a model output's logits."""
    if isinstance(result, Tensor):
        return result if result.is_floating_point() else None
    if hasattr(result, "logits"):
        return find_tensor(result.logits)
    if isinstance(result, tuple | list):
        return next((found for part in result if (found := find_tensor(part)) is not None), None)
    return find_tensor(result[0]) if hasattr(result, "last_hidden_state") else None


def measure(stage: str, name: str, a: Tensor, b: Tensor) -> Difference:
    """Measure the difference of two tensors of one name; GPT-2's Conv1D holds its weight transposed."""
    a, b = a.float().cpu(), b.float().cpu()
    if stage == "weight" and a.dim() == 2 and a.shape == b.t().shape:
        b = min((b, b.t()), key=lambda other: (a - other).abs().max().item() if a.shape == other.shape else math.inf)
    if a.shape != b.shape:
        return Difference(stage, name, None, None, f"shapes {list(a.shape)} and {list(b.shape)}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return Difference(stage, name, None, None, "not finite")
    absolute, size = (a - b).abs().max().item(), a.abs().max().item()
    return Difference(stage, name, absolute, absolute / size if size else absolute)


def as_text(found: Comparison, every: bool = False) -> str:
    """Format a verdict and a table: from each stage the tensors around the first difference, or every one."""
    lines = [describe(found)]
    for stage in STAGES:
        rows = [row for row in found.rows if row.stage == stage]
        shown = rows if every else choose_rows(rows, found.first(stage))
        if shown:
            width = max(len(row.name) for row in shown)
            lines += ["", f"{stage:<{width}}  max |a-b|  relative"]
            lines += [f"{row.name:<{width}}  {format_row(row, found.tolerance)}" for row in shown]
            if len(shown) < len(rows):
                lines.append(f"... {len(rows) - len(shown)} more (--all)")
    for whose, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines += ["", f"only the {whose} model calls {', '.join(names[:3])}{more}"]
    return "\n".join(lines)


def choose_rows(rows: Sequence[Difference], first: Difference | None, around: int = 2) -> Sequence[Difference]:
    """The rows around the first difference; without one, the largest differences."""
    if first is None:
        return sorted(rows, key=lambda row: -(row.relative or 0.0))[: 2 * around + 1]
    at = rows.index(first)
    return rows[max(0, at - around) : at + around + 1]


def format_row(row: Difference, tolerance: float) -> str:
    """Format the numbers of a row; an arrow marks what differs."""
    mark = "  <-" if row.exceeds(tolerance) else ""
    return f"{row.problem}{mark}" if row.problem else f"{row.absolute:9.2e}  {row.relative:8.1e}{mark}"


def describe(found: Comparison) -> str:
    """Say where the models part, in one line for each stage."""
    counts = {stage: sum(row.stage == stage for row in found.rows) for stage in STAGES}
    if found.equal:
        worst = max(row.relative or 0.0 for row in found.rows if row.stage != "weight")
        return (
            f"equal within {found.tolerance:g}: {counts['forward']} outputs and {counts['backward']} gradients; "
            f"largest relative difference {worst:.1e}"
        )
    lines = []
    for stage in STAGES:
        if row := found.first(stage):
            size = row.problem or f"by {row.absolute:.3g} ({row.relative:.1e} relative)"
            lines.append(f"first difference, {stage}: {row.name}, {size}")
    return "\n".join(lines)
