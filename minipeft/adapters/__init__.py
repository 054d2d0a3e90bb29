"""The PEFT methods: each changes the model in place, and removing it restores the model.

full      every parameter                            FullConfig     full.py
LoRA      linears: W -> W + (alpha/r) B A            LoRAConfig     lora.py
(IA)3     linears: y -> l * y                        IA3Config      ia3.py
prefix    attention: [prefix_k ; k], [prefix_v ; v]  PrefixConfig   prefix.py
prompt    embedding: [prompt ; x]                    PromptConfig   prompt.py
VeRA      linears: W -> W + diag(b) B diag(d) A      VeRAConfig     vera.py
LN        norms: trained gains and biases            LNTuningConfig ln_tuning.py

`METHODS` holds one record for each; adding, removing, merging, saving, loading, planning and training read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minipeft.adapters.embedding import describe_untied
from minipeft.adapters.full import FullConfig, add_full, full_recipe, remove_full
from minipeft.adapters.ia3 import IA3Config, add_ia3, ia3_recipe, merge_ia3, remove_ia3
from minipeft.adapters.ln_tuning import (
    LNTuningConfig,
    add_ln_tuning,
    ln_tuning_recipe,
    merge_ln_tuning,
    remove_ln_tuning,
)
from minipeft.adapters.lora import LoRAConfig, find_backend, lora_recipe, merge_lora, remove_lora
from minipeft.adapters.lora_variants import add_lora
from minipeft.adapters.method import Encoder, Method
from minipeft.adapters.peft_ia3 import IA3_FORMAT
from minipeft.adapters.peft_ln_tuning import LN_TUNING_FORMAT
from minipeft.adapters.peft_lora import LORA_FORMAT
from minipeft.adapters.peft_vera import VERA_FORMAT
from minipeft.adapters.peft_virtual import PREFIX_FORMAT, PROMPT_FORMAT
from minipeft.adapters.prefix import PrefixConfig, add_prefix, prefix_recipe, remove_prefix
from minipeft.adapters.prompt import PromptConfig, add_prompt, prompt_recipe, remove_prompt
from minipeft.adapters.vera import VeRAConfig, add_vera, merge_vera, remove_vera, vera_recipe
from minipeft.adapters.verdict import Comparison, MergeReport, Prompter
from minipeft.errors import InputError, check_kind, check_value, format_value
from minipeft.models import Decoder
from minipeft.models.products import name_products
from minipeft.models.quantized import (
    QuantizedWeight,
    dequantize_model,
    find_quantization,
    find_quantized_weights,
    is_quantized,
    put_weights,
    quantize_weight,
)

FULL = Method("full", "full", FullConfig, add_full, remove_full, full_recipe, trains_base=True)
LORA = Method(
    "lora", "LoRA", LoRAConfig, add_lora, remove_lora, lora_recipe, merge_lora, LORA_FORMAT, find_backend,
    presets={"dora": {"dora": True}, "rslora": {"rslora": True}, "pissa": {"init": "pissa"}},
)  # fmt: skip
IA3 = Method("ia3", "(IA)3", IA3Config, add_ia3, remove_ia3, ia3_recipe, merge_ia3, IA3_FORMAT)
PREFIX = Method("prefix", "prefix-tuning", PrefixConfig, add_prefix, remove_prefix, prefix_recipe, peft=PREFIX_FORMAT)
PROMPT = Method("prompt", "prompt-tuning", PromptConfig, add_prompt, remove_prompt, prompt_recipe, peft=PROMPT_FORMAT)
VERA = Method("vera", "VeRA", VeRAConfig, add_vera, remove_vera, vera_recipe, merge_vera, VERA_FORMAT)
LN_TUNING = Method(
    "ln_tuning", "LN-tuning", LNTuningConfig, add_ln_tuning, remove_ln_tuning, ln_tuning_recipe, merge_ln_tuning,
    LN_TUNING_FORMAT,
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in (FULL, LORA, IA3, PREFIX, PROMPT, VERA, LN_TUNING)}
AdapterConfig = Any  # the config of one of METHODS


def find_method(config: AdapterConfig) -> Method:
    """Find the method that a config belongs to.

    Raises:
        InputError: no method has this config class.
    """
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    known = ", ".join(method.config.__name__ for method in METHODS.values())
    raise InputError(f"{type(config).__name__} is not an adapter's config ({known})")


def list_method_names() -> list[str]:
    """List the names of all methods, each followed by its presets."""
    return [name for method in METHODS.values() for name in (method.name, *method.presets)]


def get_method(name: str) -> tuple[Method, Mapping[str, Any]]:
    """Find a method by name, with the fields that the name sets: "dora" is LoRA with {"dora": True}.

    Raises:
        InputError: the name is unknown.
    """
    for method in METHODS.values() if isinstance(name, str) else ():
        if name == method.name:
            return method, {}
        if name in method.presets:
            return method, method.presets[name]
    raise InputError(f"{format_value(name)} is not known ({', '.join(list_method_names())})", where="method")


def make_adapter_config(name: str, **chosen: Any) -> AdapterConfig:
    """Make the config of the method of this name, with the given fields.

    Raises:
        InputError: the name is not known; the method has no such field; a field contradicts the name.
    """
    method, preset = get_method(name)
    fields = [field.name for field in dataclasses.fields(method.config)]
    for key, value in chosen.items():
        if key not in fields:
            has = ", ".join(fields) or "none"
            raise InputError(f"method {name} has no such setting (it has: {has})", where=key)
        if key in preset and value != preset[key]:
            raise InputError(f"{format_value(value)} contradicts method {name}", where=key)
    return method.config(**{**preset, **chosen})


@dataclass(frozen=True)
class AdapterReport:
    """What `add_adapter` did. `total` counts base and adapter, a tied tensor once; `modules` are module paths."""

    method: str
    trainable: int
    total: int
    base_dtype: str
    adapter_dtype: str
    virtual_tokens: int  # positions that the adapter takes from each row's context
    modules: list[str] = field(repr=False)
    backend: str | None = None  # the kernel, if the method has several
    notes: tuple[str, ...] = ()  # remarks on the adapter and its file
    quantized: str | None = None  # the format of the base's linears: nf4, int8
    products: str = "torch"  # what multiplies float32 matrices in training, evaluation and prefill: torch or onednn

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in self.modules})
        base = self.quantized or self.base_dtype
        where = f"{len(self.modules)} modules ({', '.join(kinds)})" if self.modules else "every parameter"
        rows = [
            ("method", self.method),
            ("trainable", f"{self.trainable:,} of {self.total:,} ({self.percent:.4g} %)"),
            ("at", where),
            ("dtype", f"base {base}, trained {self.adapter_dtype}, computed in {self.base_dtype}"),
        ]
        if self.virtual_tokens:
            rows.append(("virtual", f"{self.virtual_tokens} tokens of each row's context"))
        if self.backend is not None:
            rows.append(("backend", self.backend))
        if self.products == "onednn":
            rows.append(("products", "float32 by oneDNN, with AVX-512 (--no-onednn turns it off)"))
        rows += [("note", note) for note in self.notes]
        return "\n".join(f"{name:<10} {text}" for name, text in rows)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def add_adapter(
    model: Decoder, config: AdapterConfig, tokenizer: Encoder | None = None, *, seed: int = 0
) -> AdapterReport:
    """Freeze the base, add the adapter and return a report. `seed` determines every random initial value.

    Raises:
        InputError: the model holds an adapter already; a target matches nothing; text init without a tokenizer; the
            adapter would not fit in this machine's memory.
    """
    method = find_method(config)
    check_kind(model, Decoder, "model")
    check_value(seed, int, {"least": 0, "below": 2**63}, "seed")
    check_empty(model)
    if method.trains_base and is_quantized(model):
        problem = f"{method.label} trains the weights themselves, and they are quantized"
        raise InputError(problem, where="quantize", hint="dequantize_model(model), or load without quantize")
    backend = None if method.backend is None else method.backend(model, config)
    modules = method.add(model, config, tokenizer, torch.Generator().manual_seed(seed))
    model.adapter = config
    added = {id(p) for name in modules for p in find_added_parameters(model, name)}
    for p in model.parameters():
        p.requires_grad_(method.trains_base or id(p) in added)
    return report_on(model, modules, backend)


def check_empty(model: Decoder) -> None:
    """Check that the model holds no adapter.

    Raises:
        InputError: it holds one, or a bank, or a set of adapters; or one is disabled.
    """
    if model.adapter is not None:
        raise InputError(
            f"the model holds {describe_held(model)} already",
            where="add_adapter",
            hint="remove_adapter or merge_adapter first; many LoRA adapters at once are an AdapterBank",
        )
    check_single(model, "add_adapter")


def check_single(model: Decoder, where: str) -> None:
    """Check that the model has no second adapter: others of a set, or one that `disabled` detached.

    Raises:
        InputError: there is a set, or an adapter is disabled.
    """
    if model.disabled is not None:
        raise InputError(f"the model's {model.disabled} is disabled", where=where, hint="Leave `with disabled` first")
    if model.adapters is not None:
        hint = "add, load and delete are the set's; close(keep=NAME) leaves one adapter"
        raise InputError(f"the model's adapters are a set ({model.adapters})", where=where, hint=hint)


def describe_held(model: Decoder) -> str:
    """Name the model's adapter for errors: the method's name, "no adapter" or "a bank of adapters"."""
    if model.adapter is None:
        return "no adapter"
    names = (method.name for method in METHODS.values() if type(model.adapter) is method.config)
    return next(names, "a bank of adapters")


def find_added_parameters(model: Decoder, path: str) -> list[torch.nn.Parameter]:
    """Find the parameters that the adapter added at this path; a LoRALinear's W and b belong to the base."""
    module = model.get_submodule(path)
    base = getattr(module, "adopted", ())
    return [p for name, p in module.named_parameters() if name not in base]


def report_on(model: Decoder, modules: list[str], backend: str | None = None) -> AdapterReport:
    """Count the parameters and make the report."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return AdapterReport(
        method=find_method(model.adapter).name,
        trainable=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in model.parameters()),
        base_dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
        adapter_dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trained})),
        virtual_tokens=model.virtual_tokens,
        modules=modules,
        backend=backend,
        quantized=find_quantization(model),
        products=name_products(str(model.embedding.weight.device)),
        notes=tuple(describe_untied(model)),
    )


def remove_adapter(model: Decoder) -> None:
    """Remove the adapter and restore the base (after full tuning the trained base stays), everything trainable.

    Raises:
        InputError: the model holds no adapter, or a bank.
    """
    check_kind(model, Decoder, "model")
    if describe_held(model) not in METHODS:
        hint = None if model.adapter is None else "bank.close() removes it"
        raise InputError(f"the model holds {describe_held(model)}", where="remove_adapter", hint=hint)
    check_single(model, "remove_adapter")
    find_method(model.adapter).remove(model)
    clear_adapter(model)


def merge_adapter(
    model: Decoder,
    *,
    check: Sequence[str] | None = None,
    tokenizer: Prompter | None = None,
    new_tokens: int = 32,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
) -> MergeReport:
    """Merge the adapter into the weights, in float32; the result is a plain model.

    `check`: prompts on which the merged model is compared with the unmerged one; the report gives KL, changed top-1
    tokens and changed greedy answers of at most `new_tokens` tokens. `dtype`, float32 or bfloat16, is the merged
    model's, by default the base's; the comparison includes the cast, the report's `relative_error` does not.
    `dequantize` dequantizes a quantized base first; with prompts, the report then also gives the KL of quantizing the
    result again.

    Raises:
        InputError: a method without merge (virtual tokens cannot be folded into weights), a tied target, a result
            that is not finite, or prompts that cannot be answered; the model is unchanged.
    """
    merge = find_merge(model, dtype, dequantize)
    comparison = None if check is None else Comparison(model, check, tokenizer, new_tokens)
    packed, format = find_quantized_weights(model), find_quantization(model)
    own = model.embedding.weight.dtype
    dequantize_model(model)
    model.to(torch.promote_types(own, dtype or own))  # the wider dtype: the sum is rounded to the narrower one
    try:
        report = merge(model)
    except InputError:
        model.to(own)
        put_weights(model, packed)
        raise
    clear_adapter(model)
    model.to(dtype or own)
    if comparison is None:
        return report
    report = dataclasses.replace(report, **comparison.measure(model))  # type: ignore[arg-type]
    return report if format is None else dataclasses.replace(report, **measure_again(model, packed, format, comparison))


def find_merge(model: Decoder, dtype: torch.dtype | None, dequantize: bool) -> Callable[[Decoder], MergeReport]:
    """Find the merge function of the model's method, and check that it applies.

    Raises:
        InputError: a method without merge, another adapter beside it, quantized weights without `dequantize`, or a
            dtype that is not for merging.
    """
    check_kind(model, Decoder, "model")
    held = METHODS.get(describe_held(model))
    if held is None or held.merge is None:
        labels = " and ".join(method.label for method in METHODS.values() if method.merge is not None)
        problem = f"the model holds {describe_held(model)}; only {labels} merge into weights"
        raise InputError(problem, where="merge_adapter")
    check_single(model, "merge_adapter")
    if find_quantized_weights(model) and not dequantize:
        problem = "the weights are quantized, and a merged weight would be quantized again, with another error"
        raise InputError(problem, where="merge_adapter", hint="dequantize=True makes the model plain")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise InputError(f"{dtype} is not a dtype to merge into (float32, bfloat16)", where="dtype")
    merge: Callable[[Decoder], MergeReport] = held.merge
    return merge


def measure_again(
    model: Decoder, packed: Mapping[str, QuantizedWeight], format: str, comparison: Comparison
) -> dict[str, Any]:
    """Compare the merged model, quantized again, with the unmerged one: fields of MergeReport. Restores the model."""
    merged = {path: model.get_parameter(f"{path}.weight") for path in packed}
    put_weights(model, {path: quantize_weight(weight, format) for path, weight in merged.items()})
    again = comparison.measure(model)
    put_weights(model, merged)
    return {"format": format, "requantized_kl": again["mean_kl"], "requantized_tokens": again["changed_tokens"]}


def clear_adapter(model: Decoder) -> None:
    """Mark the model as one without an adapter, all parameters trainable."""
    model.adapter = None
    for p in model.parameters():
        p.requires_grad_(not isinstance(p, QuantizedWeight))
