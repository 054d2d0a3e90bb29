"""RunConfig, the settings of a training run: the configs of model, data, adapter, packing and training, nested.

No field is declared twice. `collect_settings(method)` lists every field of every nested config under the name of its
flag. Python (`run_config("lora", rank=8)`), JSON (`as_json`) and the command line (cli/flags.py) read that table.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from minipeft.adapters import METHODS, find_method, get_method, make_adapter_config
from minipeft.adapters.method import Method
from minipeft.data.packing import PackConfig
from minipeft.errors import InputError, check_fields, check_value, option
from minipeft.hub import fetch
from minipeft.models.checkpoint import read_config
from minipeft.models.quantize import FORMATS
from minipeft.runs.planning import MOST_LAYERS, build_on_meta
from minipeft.training.loop import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelConfig:
    """The model and how to load it."""

    source: str = option(help="folder or hub id of a checkpoint, or demo", flag="model")
    revision: str | None = option(None, "commit, tag or branch on the hub")
    dtype: str | None = option(
        None,
        "dtype of the base, fp32 or bf16; default its own, for full tuning fp32 (bf16: with stochastic rounding)",
        choices=DTYPES,
    )
    device: str = option("cpu", "cpu, cuda, ...")
    quantize: str | None = option(None, "quantize the linears of the base to 4 or 8 bits", choices=FORMATS)
    legacy_bin: bool = option(False, "read pytorch_model.bin if there are no safetensors")
    eos_token: str | None = option(None, "end-of-sequence token, if the tokenizer declares none")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class DataConfig:
    """The data set, how a row becomes text, and the number of held-out rows."""

    source: str = option(
        help="conala, demo, a file (JSON, JSON lines, gzip, Parquet), a folder of them, or a data set on the hub with "
        "--data-file; of messages, intent and snippet, prompt and completion, or text",
        flag="data",
    )
    template: str | None = option(
        None,
        "format string, or a file of one, for other fields: '{question}\\n{answer}'; the last field is the response",
    )
    file: str | None = option(None, "file of the data set on the hub", flag="data-file")
    revision: str | None = option(None, "commit of the data set on the hub", flag="data-revision")
    token_cache: str | None = option(
        None, "folder that keeps the encoded data; a later run of the same data and tokenizer reads it"
    )
    held_out: int = option(100, "rows held out for evaluation; rows of one question stay together", least=0)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class RunConfig:
    """A training run. If `train.steps` is None, `epochs` determines it."""

    model: ModelConfig
    data: DataConfig
    adapter: Any  # the config of a method: LoRAConfig, PrefixConfig, ...
    packing: PackConfig
    train: TrainConfig
    epochs: float = option(3.0, "passes over the data, unless --steps is given", above=0)
    evaluate_every: int | None = option(None, "steps between evaluations; default once an epoch", least=1)
    save_every: int = option(50, "steps between checkpoints", least=1)
    deterministic: bool = option(False, "bit-identical results on CUDA, slower; on a CPU they always are")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model.quantize is not None and self.method.trains_base:
            raise InputError(
                "full tuning trains the weights themselves, and quantized weights cannot be trained", where="quantize"
            )
        if self.train.batch_invariant and not self.packing.isolate:
            problem = "has no meaning with --no-isolate, where each document sees those before it in its row"
            raise InputError(problem, where="batch_invariant")

    @property
    def method(self) -> Method:
        """The record of the adapter's method."""
        return find_method(self.adapter)

    def as_json(self) -> dict[str, Any]:
        """The method and every setting under its flag's name, as JSON values; a tuple becomes a list."""
        values = {
            name: getattr(find_part(self, setting), setting.field)
            for name, setting in index_settings(self.method.name).items()
        }
        return {"method": self.method.name, **{name: to_json(value) for name, value in values.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunConfig:
        """Read the object that `as_json` wrote.

        Raises:
            InputError: a setting is missing, unknown or out of its range.
        """
        if not isinstance(value, Mapping) or "method" not in value:
            raise InputError("must be an object with a method", where="run config")
        given = {name: setting for name, setting in value.items() if name != "method"}
        table = index_settings(str(value["method"]))
        if absent := [name for name in table if name not in given]:
            raise InputError(f"missing settings: {', '.join(absent)}", where="run config")
        return assemble(str(value["method"]), given)

    def change(self, **chosen: Any) -> RunConfig:
        """Copy the config with other settings, named like their flags."""
        return RunConfig.from_json({**self.as_json(), **chosen})


SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "packing": PackConfig, "train": TrainConfig}


@dataclass(frozen=True)
class Setting:
    """One field of a nested config, under the name of its flag."""

    name: str  # virtual-tokens
    section: str  # model, data, adapter, packing, train; run: RunConfig's own
    field: str  # length
    hint: Any  # the annotation
    default: Any  # dataclasses.MISSING: required
    metadata: Mapping[str, Any]  # of errors.option: help, choices, limits, aliases


def collect_settings(method: str = "lora") -> dict[str, Setting]:
    """Collect every setting of a run with this method, by flag: {"rank": Setting(...), "learning-rate": ...}"""
    kinds = {"model": ModelConfig, "data": DataConfig, "adapter": get_method(method)[0].config,
             "packing": PackConfig, "train": TrainConfig, "run": RunConfig}  # fmt: skip
    found = [setting for section, kind in kinds.items() for setting in list_settings(kind, section)]
    table = {setting.name: setting for setting in found}
    assert len(table) == len(found), f"two settings of {method} have one flag"
    return table


@cache
def list_settings(kind: type, section: str) -> tuple[Setting, ...]:
    """List the fields of a config that have a flag; of RunConfig those that are not configs themselves."""
    hints, found = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        flag = field.metadata.get("flag")
        if not field.metadata or flag == "":
            continue
        name = flag or field.name.replace("_", "-")
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        found.append(Setting(name, section, field.name, hints[field.name], made, field.metadata))
    return tuple(found)


def is_required(setting: Setting) -> bool:
    """Whether a setting has no default."""
    return setting.default is dataclasses.MISSING


def find_methods(name: str) -> list[str]:
    """Find the methods that have the setting of this flag."""
    return [method for method in METHODS if name in collect_settings(method)]


def run_config(method: str = "lora", *, base: tuple[int, str] | None = None, **chosen: Any) -> RunConfig:
    """Build a run's config from flat settings, named like their flags: run_config("lora", model="demo", rank=2, ...)

    Training settings that are not given come from the method's recipe, which depends on the base's parameter count and
    family; these are read from config.json, unless `base` gives them.

    Raises:
        InputError: a setting is unknown, out of range, or has no effect with the method; config.json cannot be read.
    """
    given = {name: value for name, value in chosen.items() if value is not None}
    config = assemble(method, given)
    parameters, family = measure_base(config.model) if base is None else base
    recipe = config.method.recipe(config.adapter, parameters, family).settings()
    fields = {
        setting.field
        for name, setting in index_settings(method).items()
        if name in given and setting.section == "train"
    }
    return replace(config, train=replace(config.train, **{k: v for k, v in recipe.items() if k not in fields}))


def assemble(method: str, given: Mapping[str, Any]) -> RunConfig:
    """Build the nested configs from flat settings; the others take their defaults.

    Raises:
        InputError: as `run_config`.
    """
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    table, parts = index_settings(method), {section: {} for section in ("adapter", "run", *SECTIONS)}  # type: ignore[var-annotated]
    for name, value in given.items():
        if name not in table:
            refuse(name, method)
        parts[table[name].section][table[name].field] = value
    for name, setting in table.items():
        if is_required(setting) and setting.field not in parts[setting.section]:
            raise InputError("must be given", where=name)
        if setting.field in parts[setting.section]:  # so that an error names the flag instead of the field
            check_value(given[name], setting.hint, setting.metadata, name)
    nested = {section: kind(**parts[section]) for section, kind in SECTIONS.items()}
    return RunConfig(**nested, adapter=make_adapter_config(method, **parts["adapter"]), **parts["run"])


def refuse(name: str, method: str) -> typing.NoReturn:
    """Raise an InputError that names the methods with this setting, or a setting of a similar name."""
    flag = name.replace("_", "-")
    if having := find_methods(flag):
        verb = "has" if len(having) == 1 else "have"
        raise InputError(f"has no effect with {method} ({', '.join(having)} {verb} it)", where=name)
    known = sorted({setting for other in METHODS for setting in index_settings(other)})
    near = difflib.get_close_matches(name, known, 1, 0.5)
    raise InputError(f"is not a setting of {method}", where=name, hint=f"Did you mean {near[0]}?" if near else None)


def share_settings(methods: Sequence[str], chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Select for each method the chosen settings that it has, by flag names with _ for -.

    Raises:
        InputError: a setting that none of the methods has.
    """
    for name in chosen:
        if not any(name in index_settings(method) for method in methods):
            refuse(name, ", ".join(methods))
    return {method: {n: value for n, value in chosen.items() if n in index_settings(method)} for method in methods}


def make_method_config(method: str, chosen: Mapping[str, Any]) -> Any:
    """Build a method's config from settings by flag name: make_method_config("prefix", {"virtual_tokens": 5})"""
    table = index_settings(method)
    return make_adapter_config(method, **{table[name].field: value for name, value in chosen.items()})


def index_settings(method: str) -> dict[str, Setting]:
    """Index the settings by their names in Python and JSON."""
    return {flag.replace("-", "_"): setting for flag, setting in collect_settings(method).items()}


def find_part(config: RunConfig, setting: Setting) -> Any:
    """Find the nested config that holds a setting."""
    return config if setting.section == "run" else getattr(config, setting.section)


def to_json(value: Any) -> Any:
    """Convert a setting to a JSON value."""
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def measure_base(model: ModelConfig) -> tuple[int, str]:
    """Read the base's parameter count and family from config.json; (0, family) for a model of more than MOST_LAYERS
    layers, which loading refuses.

    Raises:
        InputError: config.json is missing or invalid.
    """
    config = read_config(fetch(model.source, ["config.json"], revision=model.revision) / "config.json")
    if config.layers > MOST_LAYERS:
        return 0, config.model_type
    return sum(p.numel() for p in build_on_meta(config).parameters()), config.model_type
