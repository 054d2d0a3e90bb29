"""Disable an adapter temporarily, and switch between several adapters by name.

    with disabled(model):                    the base, to the bit: a DPO reference, a comparison
        reference = model(ids)

    adapters = AdapterSet(model)
    adapters.load("fr", "adapters/fr");  adapters.add("de", LoRAConfig())      the last one is active
    adapters.switch("fr");  adapters.switch(None)                              one of them, or the base
    adapters.combine("both", {"fr": 0.7, "de": 0.3}, "svd", rank=8)            returns the relative error
    adapters.close(keep="both")                                                that one alone, or with close() none

At most one adapter is in the model at any time, and `model.adapter` is its config: training, saving and generating see
one adapter. The others lie beside the model, float32, on the device where they were last used. Rows of one batch with
different adapters are an AdapterBank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minipeft.adapters import (
    LORA,
    METHODS,
    AdapterReport,
    add_adapter,
    check_empty,
    clear_adapter,
    describe_held,
    find_method,
)
from minipeft.adapters.combine import WAYS, Pair, Term, compute_squared_errors
from minipeft.adapters.lora import LoRAConfig, LoRALinear, find_all_layers, find_lora_layers
from minipeft.adapters.method import Encoder
from minipeft.adapters.peft_format import load_adapter
from minipeft.adapters.surgery import replace
from minipeft.errors import InputError, check_kind, check_value
from minipeft.models import Decoder


@dataclass(eq=False)
class Detached:
    """A detached adapter: its modules by path, and the model attributes that it sets."""

    config: Any
    modules: dict[str, nn.Module]
    virtual_tokens: int
    windowed: bool
    device: torch.device
    model_config: Any  # of the model with the adapter: its vocabulary may be resized


def detach(model: Decoder) -> Detached:
    """Detach the adapter from the model; requires_grad of no parameter changes."""
    config, virtual_tokens, windowed = model.adapter, model.virtual_tokens, model.windowed
    model_config = model.config
    before = dict(model.named_modules(remove_duplicate=False))
    find_method(config).remove(model)
    model.adapter = None
    after = dict(model.named_modules(remove_duplicate=False))
    changed = {path for path, module in before.items() if after.get(path) is not module}
    outermost = {path: before[path] for path in changed if path.rpartition(".")[0] not in changed}
    return Detached(config, outermost, virtual_tokens, windowed, model.embedding.weight.device, model_config)


def attach(model: Decoder, held: Detached) -> None:
    """Attach an adapter to the model's current weights, which may have been cast, moved or reloaded."""
    device = model.embedding.weight.device
    for path, module in held.modules.items():
        plain = model.get_submodule(path) if getattr(module, "adopted", ()) else None
        for name in getattr(module, "adopted", ()):
            setattr(module, name, getattr(plain, name))
        if device != held.device:
            module.to(device)
        replace(model, path, module.train(model.training))
    model.adapter, model.virtual_tokens, model.windowed = held.config, held.virtual_tokens, held.windowed
    model.config, held.device = held.model_config, device


@contextmanager
def disabled(model: Decoder) -> Iterator[None]:
    """Context manager: within it the model is the base, to the bit.

    Afterwards the same modules and parameters are attached again, and training can continue. With activation
    checkpointing, a loss of the adapted model must run its backward pass before.

    Raises:
        InputError: the model holds no adapter, or a bank, or is disabled already; it was tuned in full.
    """
    check_kind(model, Decoder, "model")
    check_enabled(model)
    held = METHODS.get(describe_held(model))
    if held is None:
        raise InputError(f"the model holds {describe_held(model)}", where="disabled")
    if held.trains_base:
        hint = "Load a second model for the base"
        raise InputError(f"{held.label} changes the base itself", where="disabled", hint=hint)
    adapter = detach(model)
    model.disabled = held.name
    try:
        yield
    finally:
        model.disabled = None
        attach(model, adapter)


def check_enabled(model: Decoder) -> None:
    """Check that the model is not inside `disabled`.

    Raises:
        InputError: it is.
    """
    if model.disabled is not None:
        raise InputError(f"the model's {model.disabled} is disabled already", where="disabled")


class AdapterSet:
    """Adapters by name on one base, of which at most one is active; until `close` the set adds and removes them."""

    def __init__(self, model: Decoder):
        """Start an empty set; the base is frozen.

        Raises:
            InputError: the model holds an adapter, or has a set.
        """
        check_kind(model, Decoder, "model")
        check_empty(model)
        self.model = model
        self.active: str | None = None
        self.held: dict[str, Detached | None] = {}  # None: the active one, which is attached to the model
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        for p in model.parameters():
            p.requires_grad_(False)
        model.adapters = self

    def __repr__(self) -> str:
        return ", ".join(f"{name} (active)" if name == self.active else name for name in self.held) or "none"

    @property
    def names(self) -> list[str]:
        """The names, in the order of adding."""
        return list(self.held)

    def add(
        self, name: str, config: Any, tokenizer: Encoder | None = None, *, trainable: bool = True, seed: int = 0
    ) -> AdapterReport:
        """Add a fresh adapter and make it the active one.

        Raises:
            InputError: the name is taken; what `add_adapter` refuses; full tuning, which changes the base of all.
        """
        if find_method(config).trains_base:
            raise InputError(f"{find_method(config).label} changes the base of all adapters", where="AdapterSet")
        return self.enter(name, lambda: add_adapter(self.model, config, tokenizer, seed=seed), trainable)

    def load(
        self, name: str, source: str | Path, *, trainable: bool = False, revision: str | None = None
    ) -> AdapterReport:
        """Load an adapter as `load_adapter` and make it the active one.

        Raises:
            InputError: the name is taken; what `load_adapter` refuses.
        """
        read = lambda: load_adapter(self.model, source, trainable=trainable, revision=revision)
        return self.enter(name, read, trainable)

    def enter(self, name: str, put: Any, trainable: bool) -> AdapterReport:
        """Add an adapter under a name and make it active; after an error the previous one is active again."""
        check_kind(name, str, "name")
        check_value(trainable, bool, {}, "trainable")
        if name in self.held:
            hint = f"adapters.delete({name!r}) first"
            raise InputError(f"the set holds {name!r} already", where="AdapterSet", hint=hint)
        former = self.active
        self.switch(None)
        self.model.adapters = None  # `put` needs a plain model
        try:
            report: AdapterReport = put()
        except InputError:
            self.model.adapters = self
            self.switch(former)
            raise
        self.model.adapters = self
        if not trainable:
            for p in self.model.parameters():
                p.requires_grad_(False)
        self.held[name], self.active = None, name
        return report

    def switch(self, name: str | None) -> None:
        """Make another adapter the active one, or none: then the model is the base.

        Raises:
            InputError: the set does not hold the name; the adapter is disabled; the set is closed.
        """
        self.check(name)
        if name == self.active:
            return
        if self.active is not None:
            self.held[self.active] = detach(self.model)
        self.active = name
        if name is not None:
            attach(self.model, self.get(name))
            self.held[name] = None

    def get(self, name: str) -> Detached:
        """Get an adapter that is not active."""
        held = self.held[name]
        assert held is not None
        return held

    def delete(self, name: str) -> None:
        """Remove an adapter and free its memory; if it was active, none is afterwards."""
        self.check(name)
        if name == self.active:
            self.switch(None)
        del self.held[name]

    def combine(self, name: str, weights: Mapping[str, float], how: str = "cat", rank: int | None = None) -> float:
        """Add the weighted sum of LoRA adapters under a name, active and frozen, as one LoRA (combine.py).

        `how`: "cat", "svd" or "linear"; `rank` is svd's, by default the largest of the adapters'. Returns
        ||B A - U|| / ||U|| over all linears, with U the exact sum.

        Raises:
            InputError: an adapter is not there, or not plain LoRA; `how` is unknown; "linear" with different ranks.
        """
        check_value(how, str, {"choices": WAYS}, "how")
        check_value(rank, int | None, {"least": 1}, "rank")
        check_value(weights, Mapping[str, float], {}, "weights")
        if rank is not None and how != "svd":
            raise InputError(f"has no meaning for {how!r}", where="rank", hint='how="svd" takes a rank')
        terms = self.terms(weights)
        pairs = {path: WAYS[how](parts, rank) for path, parts in terms.items()}
        self.enter(name, lambda: put_pairs(self.model, pairs), trainable=False)
        missed, whole = map(sum, zip(*(compute_squared_errors(terms[path], pair) for path, pair in pairs.items())))
        return math.sqrt(missed / whole) if whole else 0.0

    @torch.no_grad()
    def terms(self, weights: Mapping[str, float]) -> dict[str, list[Term]]:
        """List the update of each adapter in each linear, in the model's order.

        Raises:
            InputError: there is none; an adapter is not in the set, or not plain LoRA.
        """
        if not weights:
            raise InputError("names no adapter", where="weights")
        found: dict[str, list[Term]] = {}
        for name, weight in weights.items():
            self.check(name)
            layers = find_all_layers(self.model) if name == self.active else self.get(name).modules
            config = self.model.adapter if name == self.active else self.get(name).config
            if find_method(config) is not LORA or not config.is_plain or not all_linear(layers.values()):
                raise InputError(f"{name!r} is not plain LoRA, and is not combined", where="weights")
            for path, layer in layers.items():
                assert isinstance(layer, LoRALinear)
                _, _, A, B, scale = layer.part()
                found.setdefault(path, []).append(Term(weight * scale, A, B))
        return {path: found[path] for path, _ in self.model.named_modules() if path in found}

    def check(self, name: str | None) -> None:
        """Check that the set is open, its active adapter in the model, and the name known.

        Raises:
            InputError: one of these does not hold.
        """
        if name is not None:
            check_kind(name, str, "name")
        if self.model.adapters is not self:
            raise InputError("is closed", where="AdapterSet")
        check_enabled(self.model)
        if name is not None and name not in self.held:
            raise InputError(f"holds no {name!r} (it holds: {self})", where="AdapterSet")

    def close(self, keep: str | None = None) -> None:
        """Close the set: the model keeps the adapter `keep`, or is plain and trainable as before.

        Raises:
            InputError: the set does not hold the name.
        """
        self.switch(keep)
        self.held, self.active, self.model.adapters = {}, None, None
        if keep is None:
            clear_adapter(self.model)
            for name, p in self.model.named_parameters():
                p.requires_grad_(name in self.trained)


def all_linear(layers: Iterable[nn.Module]) -> bool:
    """Whether these are LoRALinears, and no LoRA of an embedding."""
    return all(isinstance(layer, LoRALinear) for layer in layers)


def put_pairs(model: Decoder, pairs: Mapping[str, Pair]) -> AdapterReport:
    """Add LoRA of scale 1 with these matrices, by path; a path's own rank stands in rank_pattern."""
    ranks = {path: len(A) for path, (A, _) in pairs.items()}
    most = max(ranks.values())
    own = {f"^{path}": rank for path, rank in ranks.items() if rank != most}
    alphas = {pattern: float(rank) for pattern, rank in own.items()}
    report = add_adapter(
        model, LoRAConfig(most, float(most), targets=tuple(pairs), rank_pattern=own, alpha_pattern=alphas)
    )
    with torch.no_grad():
        for path, layer in find_lora_layers(model).items():
            layer.lora_A.copy_(pairs[path][0])
            layer.lora_B.copy_(pairs[path][1])
    return report
