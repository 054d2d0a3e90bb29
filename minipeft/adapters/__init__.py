"""What PEFT is: each method changes the model in place, at one site, and leaves no trace when it is removed.

full      every parameter                          FullConfig      nothing is added
LoRA      linears: W -> W + (alpha/r) B A          LoRAConfig      lora.py
(IA)3     linears: y -> l * y                      IA3Config       ia3.py
prefix    attention: [prefix_k ; k], [prefix_v ; v]  PrefixConfig  prefix.py
prompt    embedding: [prompt ; x]                  PromptConfig    prompt.py
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from minipeft.adapters.ia3 import IA3Config, add_ia3, merge_ia3, remove_ia3
from minipeft.adapters.lora import LoRAConfig, add_lora, kernel_backend, merge_lora, remove_lora
from minipeft.adapters.prefix import Encoder, PrefixConfig, add_prefix, remove_prefix
from minipeft.adapters.prompt import PromptConfig, add_prompt, remove_prompt
from minipeft.adapters.surgery import MergeReport
from minipeft.errors import InputError
from minipeft.models import Decoder


@dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: train every parameter of the base."""


AdapterConfig = FullConfig | LoRAConfig | IA3Config | PrefixConfig | PromptConfig
METHODS: dict[str, type] = {
    "full": FullConfig,
    "lora": LoRAConfig,
    "ia3": IA3Config,
    "prefix": PrefixConfig,
    "prompt": PromptConfig,
}


@dataclass(frozen=True)
class AdapterReport:
    """What `add_adapter` did. `total` counts base and adapter, a tied tensor once; `modules` are paths."""

    method: str
    trainable: int
    total: int
    base_dtype: str
    adapter_dtype: str
    virtual_tokens: int  # columns that the adapter takes from the context
    modules: list[str] = field(repr=False)
    backend: str | None = None  # LoRA: the kernel's implementation
    notes: tuple[str, ...] = ()  # what a reader of the file should know

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in self.modules})
        where = f"{len(self.modules)} modules ({', '.join(kinds)})" if self.modules else "every parameter"
        rows = [
            ("method", self.method),
            ("trainable", f"{self.trainable:,} of {self.total:,} ({self.percent:.4g} %)"),
            ("at", where),
            ("dtype", f"base {self.base_dtype}, trained {self.adapter_dtype}, computed in {self.base_dtype}"),
        ]
        if self.virtual_tokens:
            rows.append(("virtual", f"{self.virtual_tokens} tokens of each row's context"))
        if self.backend is not None:
            rows.append(("backend", self.backend))
        rows += [("note", note) for note in self.notes]
        return "\n".join(f"{name:<10} {text}" for name, text in rows)


def add_adapter(
    model: Decoder, config: AdapterConfig, tokenizer: Encoder | None = None, *, seed: int = 0
) -> AdapterReport:
    """Freeze the base, put the adapter in, and say what was done. `seed` decides every random number of the start.

    Raises:
        InputError: the model holds an adapter already; a target matches nothing; text init without a tokenizer.
    """
    if not isinstance(config, AdapterConfig):
        raise InputError(
            f"{type(config).__name__} is not an adapter's config ({', '.join(c.__name__ for c in METHODS.values())})"
        )
    if (held := adapter_of(model)) is not None:
        raise InputError(
            f"the model holds {method_of(held)} already",
            where="add_adapter",
            hint="remove_adapter or merge_adapter first; many LoRA adapters at once are an AdapterBank",
        )
    generator = torch.Generator().manual_seed(seed)
    modules: list[str] = []
    backend = None
    if isinstance(config, LoRAConfig):
        backend = kernel_backend(model, config)
        modules = add_lora(model, config, generator)
    elif isinstance(config, IA3Config):
        modules = add_ia3(model, config)
    elif isinstance(config, PrefixConfig):
        modules = add_prefix(model, config, tokenizer, generator)
    elif isinstance(config, PromptConfig):
        modules = add_prompt(model, config, tokenizer, generator)
    model.adapter = config
    full = isinstance(config, FullConfig)
    added = {id(p) for name in modules for p in own_parameters(model, name)}
    for p in model.parameters():
        p.requires_grad_(full or id(p) in added)
    return report_on(model, modules, backend)


def own_parameters(model: Decoder, name: str) -> list[torch.nn.Parameter]:
    """The parameters that the adapter brought to the module at this path: a LoRALinear's W and b are the base's."""
    return [
        p
        for key, p in model.get_submodule(name).named_parameters()
        if key not in ("weight", "bias") or name == "prompt"
    ]


def report_on(model: Decoder, modules: list[str], backend: str | None = None) -> AdapterReport:
    """Count what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return AdapterReport(
        method=method_of(adapter_of(model)),
        trainable=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in model.parameters()),
        base_dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
        adapter_dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trained})),
        virtual_tokens=model.virtual_tokens,
        modules=modules,
        backend=backend,
    )


def adapter_of(model: Decoder) -> AdapterConfig | None:
    """The config of the adapter that the model holds."""
    return model.adapter


def method_of(config: AdapterConfig | None) -> str:
    """The name of a config's method, or what else the model may hold."""
    return next((name for name, kind in METHODS.items() if isinstance(config, kind)), "a bank of adapters")


def remove_adapter(model: Decoder) -> None:
    """Take the adapter out; the base is as it was before (after full tuning: as it is now), everything trainable.

    Raises:
        InputError: the model holds no adapter.
    """
    config = adapter_of(model)
    if config is None:
        raise InputError("the model holds no adapter", where="remove_adapter")
    if not isinstance(config, AdapterConfig):
        raise InputError("the model holds a bank of adapters", where="remove_adapter", hint="bank.close() removes it")
    if isinstance(config, LoRAConfig):
        remove_lora(model)
    elif isinstance(config, IA3Config):
        remove_ia3(model)
    elif isinstance(config, PrefixConfig):
        remove_prefix(model)
    elif isinstance(config, PromptConfig):
        remove_prompt(model)
    model.adapter = None
    for p in model.parameters():
        p.requires_grad_(True)


def merge_adapter(model: Decoder) -> MergeReport:
    """Fold LoRA or (IA)3 into the weights, in float32; afterwards a plain model again.

    Raises:
        InputError: another method (columns cannot be folded into weights), a tied target, or a result not finite.
    """
    config = adapter_of(model)
    if isinstance(config, LoRAConfig):
        report = merge_lora(model)
    elif isinstance(config, IA3Config):
        report = merge_ia3(model)
    else:
        held = "no adapter" if config is None else method_of(config)
        raise InputError(f"the model holds {held}; only LoRA and (IA)3 merge into weights", where="merge_adapter")
    model.adapter = None
    for p in model.parameters():
        p.requires_grad_(True)
    return report
