"""What a study runs: its presets, and the cells (a model, a way of tuning it, a seed) that they stand for.

preset    models                    pairs     what it is for
demo      ours (minipeft/demo)      ours      four ways of tuning compared in minutes, without network or GPU
paper     the eight of the paper    CoNaLa    Männistö, Attieh and Tiedemann (2025) again, with what it left out
prefix    ours                      ours      why a prefix does or does not train (prefix_experiment.py)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.study import prefix_experiment

METHODS = ("full", "lora", "prefix", "prompt")
ZERO_SHOT, FIRST_LINE = "zero-shot", "zero-shot, first line"  # the second is the first's answers, cut at a newline
MODELS = {  # the paper's: name there -> hub id
    "GPT-2": "openai-community/gpt2",
    "GPT2-M": "openai-community/gpt2-medium",
    "GPT2-L": "openai-community/gpt2-large",
    "GPT2-XL": "openai-community/gpt2-xl",
    "CodeGPT-small": "microsoft/CodeGPT-small-py",
    "CodeGPT-adapted": "microsoft/CodeGPT-small-py-adaptedGPT2",
    "CodeLlama-7B": "codellama/CodeLlama-7b-hf",
    "Mistral-7B": "mistralai/Mistral-7B-v0.1",
}
# What the paper prints, as far as its text was at hand: BLEU and CodeBLEU (Table 2), percent trained and the GPU column
# in GB (Table 3). That column leaves out the weights of GPT-2; a CodeBLEU of 0.25 is what the codebleu package gives
# to empty answers; Mistral's prefix was never run.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "GPT-2": {
        "full": {"bleu": 0.060, "memory": 7.15},
        "lora": {"percent": 0.47, "memory": 6.91},
        "prefix": {"bleu": 0.00035, "codebleu": 0.25, "percent": 0.30, "memory": 5.85},
        "prompt": {"percent": 0.01, "memory": 6.17},
    },
    "GPT2-M": {
        "full": {"memory": 17.19},
        "lora": {"percent": 2.99, "memory": 16.49},
        "prefix": {"percent": 0.28, "memory": 13.59},
        "prompt": {"bleu": 0.0, "codebleu": 0.25, "percent": 0.01, "memory": 14.37},
    },
    "GPT2-L": {
        "full": {"memory": 31.56},
        "lora": {"percent": 1.50, "memory": 29.82},
        "prefix": {"percent": 0.003, "memory": 24.33},
        "prompt": {"percent": 1.50, "memory": 25.83},
    },
    "GPT2-XL": {
        "full": {"memory": 52.85},
        "lora": {"percent": 1.25, "memory": 48.94},
        "prefix": {"percent": 0.20, "memory": 39.72},
        "prompt": {"percent": 0.002, "memory": 42.19},
    },
    "CodeGPT-small": {"full": {"bleu": 0.122}, "prefix": {"bleu": 0.0009, "codebleu": 0.133}},
    "CodeGPT-adapted": {"full": {"bleu": 0.202}},
    "CodeLlama-7B": {
        "full": {"memory": 50.23},
        "lora": {"percent": 0.59, "memory": 37.33},
        "prefix": {"percent": 0.08, "memory": 22.91},
        "prompt": {"percent": 0.001, "memory": 23.39},
    },
    "Mistral-7B": {
        "full": {"bleu": 0.00019, "codebleu": 0.25132, "memory": 54.98},
        "lora": {"percent": 0.58, "memory": 41.80},
        "prefix": {"bleu": 0.0, "codebleu": 0.0},
        "prompt": {"percent": 0.0011, "memory": 26.52},
    },
}


@dataclass(frozen=True)
class Preset:
    """A study by name. `settings` are fields of TuneConfig for every cell, `each` those of a method."""

    models: tuple[str, ...]
    data: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    new_tokens: int = 64
    seeds: int = 1


NETWORK = {"reparam": 512}  # the prefix's better recipe: text start and MLP (training/recipes.py)
PRESETS = {
    "demo": Preset(("demo",), "demo", {"epochs": 3.0, "loss_mask": "response"}, {"prefix": NETWORK}),
    "paper": Preset(tuple(MODELS.values()), "conala", {"epochs": 5.0}, {"prefix": NETWORK}),
    "prefix": Preset(("demo",), "demo", seeds=3),
}
# The demo model is a thirtieth of the smallest that the recipes were made for, and takes larger rates. Held-out nats
# per token of the answer after 150 steps: full 1.58 at 5e-4, 1.54 at 1e-3, 1.68 at 2e-3; LoRA 1.73 at 3e-3, 1.64 at
# 1e-2, 4.82 at 2e-2; prefix with MLP 2.05 at 1e-3, 2.06 at 3e-3; prompt 2.43 at 3e-2, 2.37 at 1e-1.
DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 1e-2},
    "prefix": {"learning_rate": 3e-3},
    "prompt": {"learning_rate": 3e-2},
}


@dataclass(frozen=True)
class StudyConfig:
    """What was asked for; None and () take the preset's."""

    preset: str = "demo"
    model: tuple[str, ...] = ()
    method: tuple[str, ...] = METHODS
    data: str | None = None  # demo, conala, or a file of pairs
    seeds: int | None = None
    steps: int | None = None  # optimizer steps of each tuned cell
    limit: int | None = None  # questions
    device: str = "cpu"
    dtype: str | None = None  # of the frozen base
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise InputError(f"{self.preset!r} is not known ({', '.join(PRESETS)})", where="preset")
        unknown = [method for method in self.method if method not in METHODS]
        if unknown:
            raise InputError(f"{unknown[0]!r} is not known ({', '.join(METHODS)})", where="method")
        for name in ("model", "method"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError("names one thing twice", where=name)
        for name in ("seeds", "steps", "limit", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{value} must be >= 1", where=name)


@dataclass(frozen=True)
class Cell:
    """One row of the table. `tune` are fields of TuneConfig, `generate` of GenerateConfig (none: nothing is asked)."""

    model: str  # its label; "" for a baseline
    method: str
    seed: int = 0
    tune: Mapping[str, Any] = field(default_factory=dict)
    generate: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""  # what tells it from another cell of its method

    @property
    def name(self) -> str:
        """The cell's folder."""
        parts = [re.sub(r"[^\w.]+", "-", part).strip("-") for part in (self.model, self.method, self.variant) if part]
        return "--".join([*parts, f"seed{self.seed}"] if self.model else parts)


def labels(models: Sequence[str]) -> dict[str, str]:
    """What each model is called in tables, label -> model: a folder by its last part, where no other has the same."""
    short = [Path(model).resolve().name if is_folder(model) else model for model in models]
    return {name if short.count(name) == 1 else model: model for name, model in zip(short, models)}


def is_folder(model: str) -> bool:
    """Whether a model is named by a path; "demo" is not, whatever folders there are."""
    return model != "demo" and (Path(model).is_dir() or model.startswith((".", "/", "~")))


def cells_of(config: StudyConfig, sources: Mapping[str, str], held_out: int) -> list[Cell]:
    """The cells of a study, model by model; `sources` maps a model's label to the folder or hub id that is loaded."""
    seeds = config.seeds or PRESETS[config.preset].seeds
    cells: dict[str, Cell] = {}
    for model, source in sources.items():
        quick = "fp32" if model == "demo" and config.device == "cpu" else None  # its bf16 is slow on most CPUs
        shared = {
            "model": source,
            "data": "data/train.jsonl",
            "held_out": held_out,
            "device": config.device,
            "dtype": config.dtype or quick,
        }
        if source in (MODELS["CodeGPT-small"], MODELS["CodeGPT-adapted"]):
            shared["legacy_bin"] = True
        if config.preset == "prefix":
            found = [untrained(config, model, shared, 0), *experiment(config, model, shared, seeds)]
        else:
            found = [untrained(config, model, shared, seed) for seed in range(seeds)]
            found += [tuned(config, model, shared, method, seed) for method in config.method for seed in range(seeds)]
        cells |= {cell.name: cell for cell in found}
    return list(cells.values())


def untrained(config: StudyConfig, model: str, shared: Mapping[str, Any], seed: int) -> Cell:
    """The cell that all others of its model are compared with."""
    settings = PRESETS[config.preset].settings
    loss = (
        {"loss_mask": settings["loss_mask"]} if "loss_mask" in settings else {}
    )  # its held-out loss is of the same tokens
    return Cell(model, ZERO_SHOT, seed, {**shared, **loss, "seed": seed}, asked(config, seed))


def tuned(config: StudyConfig, model: str, shared: Mapping[str, Any], method: str, seed: int) -> Cell:
    """A tuned cell: the preset's settings, then the method's, then what the caller chose."""
    preset = PRESETS[config.preset]
    tune: dict[str, Any] = {**shared, "seed": seed, "method": method, **preset.settings, **preset.each.get(method, {})}
    if model == "demo":
        tune |= DEMO_SETTINGS[method]
    if method == "full" and config.dtype is not None:
        tune["dtype"] = "fp32"  # its weights are trained
    if config.steps is not None:
        tune["steps"] = config.steps
    return Cell(model, method, seed, tune, asked(config, seed))


def experiment(config: StudyConfig, model: str, shared: Mapping[str, Any], seeds: int) -> list[Cell]:
    """The prefix experiment's two parts: the grid, by its held-out loss alone; then longer runs, whose first seed
    answers."""
    trials = [*prefix_experiment.grid(), *prefix_experiment.long_runs(seeds=seeds)]
    answering = set(prefix_experiment.long_runs(seeds=1))
    found = []
    for trial in trials:
        if trial.method not in config.method:
            continue
        answers = asked(config, trial.seed) if trial in answering else {}
        if config.steps is not None:
            trial = replace(trial, steps=config.steps)
        found.append(Cell(model, trial.method, trial.seed, {**shared, **trial.tuning()}, answers, trial.variant))
    return found


def asked(config: StudyConfig, seed: int) -> dict[str, Any]:
    """How a cell answers."""
    return {"max_new_tokens": PRESETS[config.preset].new_tokens, "seed": seed}


def printed(model: str, method: str) -> dict[str, float]:
    """The paper's numbers for a cell, as far as they are known; empty for what it has not."""
    names = {hub_id: name for name, hub_id in MODELS.items()}
    return PAPER.get(names.get(model, ""), {}).get(method, {})
