"""The settings of a run: TuneConfig, which `minipeft train` fills from its flags (cli/flags.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minipeft.adapters import FullConfig, LoRAConfig, PrefixConfig, PromptConfig
from minipeft.errors import InputError
from minipeft.training.loop import TrainConfig
from minipeft.training.recipes import recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TuneConfig:
    """What to train, on what, and how; None takes the method's own default (recipes.py)."""

    model: str  # folder or hub id
    data: str  # conala, demo, or a file of pairs
    method: str = "lora"  # full, lora, prefix, prompt
    steps: int | None = None  # optimizer steps; else epochs decide
    epochs: float = 3.0
    batch: int = 1  # rows of `length` tokens
    accumulate: int = 1  # batches a step
    length: int | None = None  # tokens of a row; None: 1024, or the model's context
    learning_rate: float | None = None
    loss_mask: str = "all"  # which tokens are supervised: all, response
    isolate: bool = True  # documents of a row do not see each other
    held_out: int = 100  # pairs kept for evaluation, by question
    evaluate_every: int | None = None  # steps; None: each epoch
    save_every: int = 50  # steps
    seed: int = 0
    dtype: str | None = None  # of the base: fp32, bf16; None: its own (fp32 where it is trained)
    device: str = "cpu"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "all-linear"  # or default, or names with commas between
    columns: int = 20  # of a prefix or prompt
    init: str = "text"
    text: str | None = None  # what a prefix or prompt starts as
    reparam: int | None = None  # width of the network that makes a prefix or prompt; None: a plain table
    activation_checkpointing: bool = False  # recompute activations: less memory, more time
    legacy_bin: bool = False
    eos_token: str | None = None
    revision: str | None = None
    deterministic: bool = False  # on CUDA: the same bits each time, slower; a CPU does so anyway

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "save_every", "batch", "accumulate", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{value} must be >= 1", where=name)
        if not 0 < self.epochs < float("inf"):
            raise InputError(f"{self.epochs} must be finite and > 0", where="epochs")
        if self.held_out < 0:
            raise InputError(f"{self.held_out} must be >= 0", where="held_out")
        if self.dtype not in (None, *DTYPES):
            raise InputError(f"{self.dtype!r} is not known ({', '.join(DTYPES)})", where="dtype")
        if self.dtype == "bf16" and self.method == "full":
            raise InputError("full tuning trains the weights themselves, in fp32", where="dtype")
        self.adapter()
        TrainConfig(steps=1, seed=self.seed, learning_rate=self.learning_rate or recipe(self.method).learning_rate)
        if self.learning_rate == 0:
            raise InputError("0 must be > 0", where="learning_rate")

    def adapter(self) -> FullConfig | LoRAConfig | PrefixConfig | PromptConfig:
        """The adapter's own config."""
        started: dict[str, Any] = {"length": self.columns, "init": self.init, "reparam": self.reparam}
        if self.text is not None:
            started["text"] = self.text
        if self.method == "prefix":
            return PrefixConfig(**started)
        if self.method == "prompt":
            return PromptConfig(**started)
        named = self.targets if self.targets in ("all-linear", "default") else tuple(self.targets.split(","))
        return FullConfig() if self.method == "full" else LoRAConfig(self.rank, self.alpha, self.dropout, named)
