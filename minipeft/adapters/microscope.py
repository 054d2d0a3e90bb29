"""Measure an adapter: the spectrum of each update, its share of the weight, and which modules are dead or exploding.

    U = s B A          the update of a linear (of a variant the merged weight minus W); of virtual tokens, their table
    |U|                Frobenius norm: the root of the sum of its squared singular values
    energy rank        the fewest singular values whose squares sum to 90 % of |U|^2
    stable rank        |U|^2 / sigma_1^2

The singular values of B A come from two small QR decompositions: with B = Q_B R_B and A^T = Q_A R_A they are those of
R_B R_A^T, [r, r]. A full-tuned model is measured against its base: U = W_tuned - W.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from minipeft.adapters.lora import LoRALinear
from minipeft.adapters.patterns import match_values
from minipeft.adapters.peft_format import CONFIG, WEIGHTS, load_adapter, read_finite
from minipeft.errors import InputError, check_fields, option
from minipeft.files import read_object
from minipeft.models.checkpoint import load_model
from minipeft.tensor_files import read_header

ENERGY = 0.9  # share of |U|^2 that the energy rank covers
DEAD = 1e-3  # of the median norm of updates of one kind: below it a module has not learned
EXPLODING = 10.0  # times that median: above it one module dominates
OVERWRITTEN = 1.0  # share of |W| above which an update replaces the weight
ROOT = "base_model.model."
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class MicroscopeConfig:
    """Whether to draw a page, where it goes, and the base that norms are compared with."""

    html: bool = option(False, "measure each update and draw a page")
    out: str = option("inspect.html", "file of the page")
    model: str | None = option(None, "the base: folder, hub id or demo; for the norms of its weights and full tuning")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Update:
    """The update of one module: its path, shape, singular values (largest first), and the norm of W if W is known."""

    path: str
    shape: tuple[int, ...]
    singular: tuple[float, ...]
    base_norm: float | None = None

    @property
    def norm(self) -> float:
        return math.sqrt(sum(value**2 for value in self.singular))

    @property
    def share(self) -> float | None:
        """|U| / |W|"""
        return None if not self.base_norm else self.norm / self.base_norm

    @property
    def energy_rank(self) -> int:
        """How many singular values hold 90 % of the energy; 0 for an update of zeros."""
        total, held = self.norm**2, 0.0
        for number, value in enumerate(self.singular, 1):
            held += value**2
            if total and held >= ENERGY * total * (1 - 1e-9):
                return number
        return 0

    @property
    def stable_rank(self) -> float:
        return (self.norm / self.singular[0]) ** 2 if self.singular and self.singular[0] else 0.0

    @property
    def layer(self) -> int | None:
        """The number of its block."""
        found = LAYER.search(f".{self.path}.")
        return int(found[1]) if found else None

    @property
    def kind(self) -> str:
        """Its path without the block's number: modules of one kind are compared with one another."""
        return LAYER.sub(".*.", f".{self.path}.").strip(".").rpartition(".*.")[2]


@dataclass(frozen=True)
class Sample:
    """An adapter, or a full-tuned model, under the microscope."""

    name: str
    method: str
    updates: tuple[Update, ...]
    movement: Mapping[str, Any] = field(default_factory=dict)  # of the run that trained it, if its folder is known

    def find_faults(self) -> dict[str, str]:
        """The dead and exploding modules by path, with the reason."""
        found = {}
        for kind in dict.fromkeys(update.kind for update in self.updates):
            mine = [update for update in self.updates if update.kind == kind]
            usual = statistics.median(update.norm for update in mine)
            for update in mine:
                if reason := judge(update, usual):
                    found[update.path] = reason
        return found


def judge(update: Update, usual: float) -> str:
    """Why an update is dead or exploding, beside the usual norm of its kind; "" if it is neither."""
    if not math.isfinite(update.norm):
        return "exploding: not finite"
    if update.norm == 0:
        return "dead: the update is zero"
    if update.norm < DEAD * usual:
        return f"dead: |U| {update.norm:.2g}, the median of its kind is {usual:.2g}"
    if update.norm > EXPLODING * usual:
        return f"exploding: |U| {update.norm:.2g}, the median of its kind is {usual:.2g}"
    if update.share is not None and update.share > OVERWRITTEN:
        return f"exploding: |U| is {update.share:.2g} times |W|"
    return ""


def examine(folder: str | Path, model: str | None = None) -> Sample:
    """Measure the adapter of a folder, or a full-tuned model's folder. `model`: the base; without it |W| is unknown.

    Raises:
        InputError: the folder holds neither, or a variant or a full-tuned model is given without its base.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        given = read_object(folder / CONFIG)
        method = str(given.get("peft_type", "?")).lower()
        updates = read_files(folder, given) if model is None else measure_model(folder, model)
    elif (folder / "config.json").exists():
        if model is None:
            raise InputError("is a model: its update is the change of a base", file=folder, hint="Give --model BASE")
        method, updates = "full", measure_full(folder, model)
    else:
        raise InputError(f"holds neither {CONFIG} nor config.json", file=folder)
    if not updates:
        raise InputError("no update of a linear and no virtual tokens to measure", file=folder)
    return Sample(shorten(folder), method, tuple(updates), read_movement(folder))


def shorten(folder: Path) -> str:
    """The last names of a path: runs/lora/adapter -> lora."""
    parts = [part for part in folder.parts if part not in ("adapter", "model")]
    return parts[-1] if parts else str(folder)


def read_movement(folder: Path) -> Mapping[str, Any]:
    """How far training moved the adapter, from the result.json of the run that holds the folder."""
    result = folder.parent / "result.json"
    return cast(Mapping[str, Any], read_object(result).get("adapter_movement", {})) if result.exists() else {}


def read_files(folder: Path, given: Mapping[str, Any]) -> list[Update]:
    """Measure an adapter from its two files alone: LoRA's pairs, and virtual tokens.

    Raises:
        InputError: a variant whose update needs W.
    """
    for key in ("use_dora", "lora_bias"):
        if given.get(key):
            raise InputError(f"{key} is on, and its update needs the base", file=folder, hint="Give --model BASE")
    header = read_header(folder / WEIGHTS)
    tensors = {name.removeprefix(ROOT): tensor for name, tensor in read_finite(folder / WEIGHTS, header).items()}
    paths = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    alphas = match_values(given.get("alpha_pattern") or {}, paths, "alpha_pattern")
    found = []
    for path in paths:
        A, B = tensors[f"{path}.lora_A.weight"], tensors.get(f"{path}.lora_B.weight")
        if B is None or B.shape[1] != len(A):
            raise InputError("has no lora_B of its rank", file=folder / WEIGHTS, where=path)
        rank = len(A)
        scale = float(alphas.get(path, given.get("lora_alpha", rank))) / (
            math.sqrt(rank) if given.get("use_rslora") else rank
        )
        found.append(Update(path, (len(B), A.shape[1]), compute_spectrum(A, B, scale)))
    if "prompt_embeddings" in tensors:
        found += list(split_virtual(tensors["prompt_embeddings"], given))
    return found


def split_virtual(table: Tensor, given: Mapping[str, Any]) -> Iterator[Update]:
    """The tables of virtual tokens: one of a prompt, keys and values of each layer of a prefix."""
    layers = given.get("num_layers")
    if given.get("peft_type") == "PREFIX_TUNING" and isinstance(layers, int) and table.shape[1] % (2 * layers) == 0:
        for number, part in enumerate(table.view(len(table), 2 * layers, -1).unbind(dim=1)):  # [P, K D] each
            name = "key" if number % 2 == 0 else "value"
            yield measure_matrix(f"layers.{number // 2}.{name}", part)
    else:
        yield measure_matrix("prompt", table)


def measure_model(folder: Path, source: str) -> list[Update]:
    """Measure an adapter on its base: each merged weight minus W, for every method that can be merged.

    Raises:
        InputError: the adapter does not fit the model.
    """
    model = load_model(source, dtype=torch.float32)
    load_adapter(model, folder)
    found = []
    for path, layer in cast(nn.Module, model).named_modules():
        if hasattr(layer, "merged") and hasattr(layer, "weight"):
            weight = layer.weight.detach().float()
            found.append(measure_linear(path, layer, weight))
    return found or read_files(folder, read_object(folder / CONFIG))


@torch.no_grad()
def measure_linear(path: str, layer: Any, weight: Tensor) -> Update:
    """Measure the update of an adapted linear; a plain LoRA's from its factors, without forming it."""
    norm = torch.linalg.vector_norm(weight).item()
    if type(layer) is LoRALinear:
        values = compute_spectrum(layer.lora_A.float(), layer.lora_B.float(), layer.scale)
    else:
        values = compute_values(layer.merged()[0] - weight)
    return Update(path, tuple(weight.shape), values, norm)


def measure_full(folder: Path, source: str) -> list[Update]:
    """Measure a full-tuned model against its base: every matrix of its blocks.

    Raises:
        InputError: the models have no matrix of one name and shape in common.
    """
    base, tuned = (load_model(name, dtype=torch.float32) for name in (source, folder))
    mine = dict(tuned.blocks.named_parameters())
    prefix = base.family.blocks
    found = [
        measure_change(f"{prefix}.{name}".removesuffix(".weight"), p.detach(), mine[name].detach())
        for name, p in base.blocks.named_parameters()
        if p.dim() == 2 and name in mine and mine[name].shape == p.shape
    ]
    if not found:
        raise InputError(f"has no matrix in common with {source!r}", file=folder)
    return found


def measure_change(path: str, weight: Tensor, tuned: Tensor) -> Update:
    """Measure the change of a weight. [out, in], twice"""
    norm = torch.linalg.vector_norm(weight).item()
    return Update(path, tuple(weight.shape), compute_values(tuned - weight), norm)


def measure_matrix(path: str, matrix: Tensor) -> Update:
    """Measure a table as a matrix. [P, n]"""
    return Update(path, tuple(matrix.shape), compute_values(matrix))


def compute_spectrum(A: Tensor, B: Tensor, scale: float) -> tuple[float, ...]:
    """The singular values of s B A from its factors. A [r, in], B [out, r] -> r of them, or fewer"""
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        return (math.inf,)
    R_B, R_A = torch.linalg.qr(B.double(), mode="r").R, torch.linalg.qr(A.double().t(), mode="r").R  # [k, r], [l, r]
    return compute_values(scale * (R_B @ R_A.t()))


def compute_values(matrix: Tensor) -> tuple[float, ...]:
    """The singular values of a matrix; one that is infinite where an entry is not finite."""
    if not torch.isfinite(matrix).all():
        return (math.inf,)
    return tuple(torch.linalg.svdvals(matrix).tolist())


def describe_samples(samples: Sequence[Sample]) -> list[str]:
    """Say what was found, in a sentence for each sample, then each fault."""
    lines = []
    for sample in samples:
        ranks = [update.energy_rank for update in sample.updates]
        stored = max(len(update.singular) for update in sample.updates)
        shares = [update.share for update in sample.updates if update.share is not None]
        share = f", median |U| / |W| {100 * statistics.median(shares):.2g} %" if shares else ""
        faults = sample.find_faults()
        lines.append(
            f"{sample.name} ({sample.method}): {len(ranks)} updates, median rank for 90 % of the energy "
            f"{statistics.median(ranks):g} of at most {stored}{share}; "
            f"{len(faults) or 'no'} dead or exploding module{'s' if len(faults) != 1 else ''}"
        )
        lines += [f"{sample.name}: {path}: {reason}" for path, reason in faults.items()]
    return lines
