"""The record of a method, through which the rest of the library uses it (METHODS in adapters/__init__.py).

    add, remove, merge          the changes of the model
    recipe                      the default training settings, each number with its source
    peft                        the files in Hugging Face PEFT's format, both ways
    label                       the name in tables

`add_adapter`, `save_adapter`, `inspect`, `plan`, the runs, the study and the command line read the record. A new method
needs its file, its format and its record (CONTRIBUTING, "Add a method").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minipeft.models import Decoder
from minipeft.tensor_files import TensorInfo


class Encoder(Protocol):
    """The methods of a tokenizer that text init calls."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Recipe:
    """Default training settings of a method; all fields but `source` have the names of TrainConfig's fields."""

    learning_rate: float
    warmup: float = 0.06  # share of the steps; 5 % in Weyssow et al. 2023
    decay: str = "linear"
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0  # weight decay would pull a prefix or prompt away from its text init
    clip: float = 1.0
    source: str = ""

    def settings(self) -> dict[str, Any]:
        """The fields of TrainConfig: TrainConfig(steps=..., **recipe.settings())"""
        return {name: value for name, value in vars(self).items() if name != "source"}


@dataclass(frozen=True)
class PeftFormat:
    """A method's adapter_config.json and adapter_model.safetensors; `model` is a Decoder, `config` the method's own."""

    types: tuple[str, ...]  # the values of peft_type that it reads
    to_json: Callable[[Any, Decoder], dict[str, object]]
    from_json: Callable[[Mapping[str, Any]], Any]  # -> config
    shapes: Callable[[Decoder, Any], dict[str, tuple[int, ...]]]  # of the tensors that the file must hold
    tensors: Callable[[Decoder], dict[str, Tensor]]  # of the model's adapter, under PEFT's names
    fill: Callable[[Decoder, dict[str, Tensor], Path], None]  # copy loaded tensors into the model's adapter
    check: Callable[[Mapping[str, Any], Decoder], None] = lambda given, model: None  # keys that must fit the model
    bare: Callable[[Any], Any] = lambda config: config  # an init without tokenizer; loading overwrites it
    read_extra: Callable[[Any, Path, bool], Any] | None = None  # (config, folder, trainable) -> config: files of ours
    bake: Callable[[Any, dict[str, Tensor], Decoder], tuple[Any, dict[str, Tensor]]] | None = (
        None  # save_adapter(baked)
    )
    write_extra: Callable[[Decoder, Any, Path], None] | None = None  # beside PEFT's two
    fields: Mapping[str, str] = field(default_factory=dict)  # our field -> PEFT's key, for errors
    known: frozenset[str] = frozenset()  # PEFT's keys that are honoured, or that have no effect on a loaded adapter
    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict)  # unsupported keys -> values without effect
    noted: Mapping[str, tuple[object, ...] | None] = field(default_factory=dict)  # ... with a note; None: any value
    rename: Callable[[dict[str, TensorInfo], Decoder], dict[str, TensorInfo]] = lambda header, model: header
    fit: Callable[[Any, Mapping[str, Any], Decoder, Mapping[str, TensorInfo]], tuple[Any, list[str]]] = (
        lambda config, given, model, header: (config, [])
    )  # -> the config that the tensors show, and notes
    optional: Callable[[Decoder, Any, Mapping[str, Any], Mapping[str, TensorInfo]], dict[str, tuple[int, ...]]] = (
        lambda model, config, given, header: {}
    )  # names and shapes of tensors that the file may hold
    settle: Callable[[Mapping[str, Any], dict[str, Tensor], Decoder, Path], dict[str, Tensor]] = (
        lambda given, tensors, model, file: tensors
    )  # -> the tensors of `shapes` alone
    describe: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, object]] = lambda given, header: {}  # inspect


@dataclass(frozen=True)
class Method:
    """The record of a method."""

    name: str  # lora: in --method, run folders and results
    label: str  # LoRA: in tables and reports
    config: type  # LoRAConfig
    add: Callable[[Decoder, Any, Encoder | None, torch.Generator], list[str]]  # -> the paths of the modules
    remove: Callable[[Decoder], None]
    recipe: Callable[[Any, int, str], Recipe]  # (config, parameters of the base, family)
    merge: Callable[[Decoder], Any] | None = None  # None: it cannot be merged into weights
    peft: PeftFormat | None = None  # None: no adapter files (full tuning)
    backend: Callable[[Decoder, Any], str] | None = None  # which kernel computes it here
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # other names: {"dora": {"dora": True}}
    trains_base: bool = False  # full tuning: adds nothing, trains and saves the weights
