"""The record of a decoder family: whatever differs between families outside the module itself.

A family is a file (gpt2.py, llama.py, ...) that ends with one record; `FAMILIES` in models/__init__.py lists the
records. Code that depends on the family reads the record; none compares `model_type`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Family:
    """A family's config class, its decoder, and the names of its parts: dotted paths in the module and in the files."""

    name: str  # model_type in config.json
    config: type[Any]
    decoder: type[Any]
    default_targets: Mapping[str, tuple[str, ...]]  # method -> linears, as in HF PEFT: lora, ia3, ia3_feedforward
    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"  # the last one, before the head
    layers_field: str = "num_hidden_layers"  # of config.json
    tuned_norms: tuple[str, ...] = ()  # LN-tuning's default, where HF PEFT trains not all norms of the residual stream
    transposed: tuple[str, ...] = ()  # suffixes of weights stored as [in, out]
    optional_prefix: str = ""  # prefix of every name but the head's, which some files omit
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)  # suffixes of tensors in old files that are not parameters
    renamed: Mapping[str, str] = field(default_factory=dict)  # names in some files -> ours

    def build_empty(self, config: Any) -> Any:
        """The decoder on the meta device: names and shapes, no data."""
        with torch.device("meta"), SkipInitialization():
            return self.decoder(config)


class SkipInitialization(TorchFunctionMode):
    """Leave parameters as they are allocated: torch would import its compiler to draw values on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
