"""The presets of a study, and the cells (a model, a method, a seed) that each expands to.

preset    models                    pairs     purpose
demo      ours (minipeft/demo)      ours      compare four methods in minutes, without network or GPU
paper     the eight of the paper    CoNaLa    reproduce Männistö, Attieh and Tiedemann (2025), and add what it left out
prefix    ours                      ours      show why a prefix does or does not train (prefix_experiment.py)
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minipeft.adapters import get_method, list_method_names
from minipeft.data.templates import read_template
from minipeft.errors import InputError, check_fields, option
from minipeft.generation import GenerateConfig
from minipeft.metrics.execution import PROTECTION
from minipeft.runs.config import collect_settings, run_config
from minipeft.runs.process import ProcessConfig
from minipeft.study import prefix_experiment
from minipeft.study.cells import ZERO_SHOT, Cell
from minipeft.study.data import TRAINED
from minipeft.study.paper import MODELS


@dataclass(frozen=True)
class Preset:
    """A study by name: `settings` of every cell, `each` those of a method, by the names of run_config."""

    models: tuple[str, ...]
    data: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    new_tokens: int = 64
    seeds: int = 1


MLP = {"reparam_width": 512}  # the better recipe of a prefix: text init and reparameterization MLP
PRESETS = {
    "demo": Preset(("demo",), "demo", {"epochs": 2.0, "loss_mask": "response"}, {"prefix": MLP}, new_tokens=40),
    "paper": Preset(tuple(MODELS.values()), "conala", {"epochs": 5.0}, {"prefix": MLP}),
    "prefix": Preset(("demo",), "demo", seeds=3),
}
# The demo model is a thirtieth of the smallest that the recipes were made for, and needs larger learning rates.
DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 1e-2},
    "prefix": {"learning_rate": 3e-3},
    "prompt": {"learning_rate": 3e-2},
}


OWN = ("model", "data", "seed")  # settings of a training run that the study sets itself
OF_SOURCE = ("data_file", "data_revision")  # the study reads the source; its cells read the study's folder
COMPARED = ("full", "lora", "prefix", "prompt")  # the paper's methods


@dataclass(frozen=True)
class StudyConfig:
    """What to compare; None and () take the preset's."""

    preset: str = option("demo", "what to compare", choices=PRESETS)
    model: tuple[str, ...] = option((), "folders, hub ids or demo")
    method: tuple[str, ...] = option(COMPARED, "methods to compare", choices=list_method_names())
    data: str | None = option(
        None, "demo, conala, or data of any form that train takes; a fifth of its questions becomes the test set"
    )
    seeds: int | None = option(None, "training runs per method, each with its own seed", least=1)
    limit: int | None = option(None, "answer the first N questions only", least=1)
    workers: int = option(1, "cells that run at once, each with its share of the cores, or --threads", least=1)
    cell: str | None = option(
        None, "I/N: run the I-th of N shares of the cells (a scheduler's array); without it the command reports all"
    )
    execute: bool = option(False, f"run the answers to the demo's pairs: {PROTECTION}")
    settings: Mapping[str, Any] = option(factory=dict, flag="")  # of every training run, by the names of run_config
    process: ProcessConfig = field(default_factory=ProcessConfig)  # of each cell

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("model", "method"):
            given = getattr(self, name)
            if twice := [value for value in given if given.count(value) > 1]:
                raise InputError(f"{twice[0]!r} is given twice", where=name)
        if self.execute and (self.data or PRESETS[self.preset].data) != "demo":
            hint = "minipeft score FILE --execute TASKS runs answers against the tests of a file"
            raise InputError("only the demo's pairs have programs", where="execute", hint=hint)
        if self.cell is not None:
            read_share(self.cell)
        for name in self.settings:
            if name in OWN:
                raise InputError("is set by the study itself", where=name)
            if not any(has_setting(method, name) for method in self.method):
                raise InputError(f"has no effect with {', '.join(self.method)}", where=name)

    @property
    def threads(self) -> int | None:
        """The threads of each cell; None: as many as torch takes."""
        shared = max(1, (os.cpu_count() or 1) // self.workers) if self.workers > 1 else None
        return self.process.threads or shared

    @property
    def device(self) -> str:
        return str(self.settings.get("device", "cpu"))


def read_share(text: str) -> tuple[int, int]:
    """The I and N of I/N.

    Raises:
        InputError: not two integers with 1 <= I <= N.
    """
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"{text!r} must be I/N with 1 <= I <= N, such as 1/4", where="cell")
    return int(found[1]), int(found[2])


def has_setting(method: str, name: str) -> bool:
    """Whether this method's training run has a setting of this name."""
    return name.replace("_", "-") in collect_settings(method)


@dataclass(frozen=True)
class PlanConfig:
    """The models and methods of `minipeft plan`: each method on each model."""

    preset: str | None = option(None, "plan the models of a study", choices=PRESETS)
    method: tuple[str, ...] = option(COMPARED, f"methods to plan: {', '.join(list_method_names())}")
    named: tuple[str, ...] = option((), "models beside the preset's", flag="")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.method:
            get_method(name)  # refuses one that is not known
        if not self.models:
            raise InputError("give models, or --preset paper", where="plan")

    @property
    def models(self) -> tuple[str, ...]:
        return self.named + (() if self.preset is None else PRESETS[self.preset].models)


@dataclass(frozen=True)
class Base:
    """A model that can be read: its source, size, family and context, and the number of rows of an epoch."""

    source: str  # folder or hub id
    parameters: int = 0
    family: str = ""
    rows: int = 1
    context: int = 1024


def label_models(models: Sequence[str]) -> dict[str, str]:
    """Label each model for tables, label -> model: a folder by its last part, unless two share it."""
    short = [Path(model).resolve().name if is_folder(model) else model for model in models]
    return {name if short.count(name) == 1 else model: model for name, model in zip(short, models)}


def is_folder(model: str) -> bool:
    """Whether a model is named by a path; "demo" never is, even if such a folder exists."""
    return model != "demo" and (Path(model).is_dir() or model.startswith((".", "/", "~")))


def make_cells(config: StudyConfig, bases: Mapping[str, Base | None], held_out: int) -> list[Cell]:
    """Make the cells of a study, model by model; `bases` maps a label to None if its model cannot be read."""
    seeds = config.seeds or PRESETS[config.preset].seeds
    cells: dict[str, Cell] = {}
    for label, base in bases.items():
        if config.preset == "prefix":
            drafts = [draft_untrained(config, label, 0), *draft_experiment(config, label, seeds)]
        else:
            drafts = [draft_untrained(config, label, seed) for seed in range(seeds)]
            drafts += [draft_tuned(config, label, method, seed) for method in config.method for seed in range(seeds)]
        found = [settle(draft, config, base, held_out) for draft in drafts]
        cells |= {cell.name: cell for cell in found}
    return list(cells.values())


@dataclass(frozen=True)
class Draft:
    """A cell before its model is known: `settings` are its own, by the names of run_config."""

    cell: Cell
    settings: Mapping[str, Any]


def draft_untrained(config: StudyConfig, model: str, seed: int) -> Draft:
    """The baseline of its model's other cells; its held-out loss is measured on the same tokens as theirs."""
    mask = {name: value for name, value in PRESETS[config.preset].settings.items() if name == "loss_mask"}
    return Draft(Cell(model, ZERO_SHOT, seed, generate=make_generate_config(config, seed)), mask)


def draft_tuned(config: StudyConfig, model: str, method: str, seed: int) -> Draft:
    """A tuned cell: the preset's settings, then the method's, then those of the caller."""
    preset = PRESETS[config.preset]
    chosen = {**preset.settings, **preset.each.get(method, {})}
    if model == "demo":
        chosen |= DEMO_SETTINGS.get(method, {})
    return Draft(Cell(model, method, seed, generate=make_generate_config(config, seed)), chosen)


def draft_experiment(config: StudyConfig, model: str, seeds: int) -> list[Draft]:
    """The two parts of the prefix experiment: the grid, for its held-out loss alone; then longer runs, of which the
    first seed also answers."""
    trials = [*prefix_experiment.list_grid(), *prefix_experiment.list_long_runs(seeds=seeds)]
    answering = set(prefix_experiment.list_long_runs(seeds=1))
    found = []
    for trial in trials:
        if trial.method in config.method:
            generate = make_generate_config(config, trial.seed) if trial in answering else None
            trial = replace(trial, steps=config.settings.get("steps", trial.steps))
            cell = Cell(model, trial.method, trial.seed, generate=generate, variant=trial.variant)
            found.append(Draft(cell, trial.settings()))
    return found


def settle(draft: Draft, config: StudyConfig, base: Base | None, held_out: int) -> Cell:
    """The cell with its training run, for a model that can be read. Every method gets the same number of steps.

    The untrained model has only the settings that do not concern training.
    """
    cell = draft.cell
    if base is None:
        return cell
    method, known = "lora", collect_settings("lora")
    chosen = {"held_out": held_out, **draft.settings}
    settings = {name: value for name, value in config.settings.items() if name not in OF_SOURCE}
    if settings.get("template") is not None:
        settings["template"] = read_template(settings["template"]).text  # a cell runs in another folder
    if cell.model == "demo" and config.device == "cpu":
        chosen["dtype"] = "fp32"  # its bf16 is slow on most CPUs
    if base.source in (MODELS["CodeGPT-small"], MODELS["CodeGPT-adapted"]):
        chosen["legacy_bin"] = True
    if cell.method == ZERO_SHOT:
        mine = {name: value for name, value in settings.items() if has_setting(method, name)}
        chosen |= {n: v for n, v in mine.items() if known[n.replace("_", "-")].section in ("model", "data", "packing")}
    else:
        method = cell.method
        chosen |= {name: value for name, value in settings.items() if has_setting(method, name)}
        if "steps" not in chosen and "epochs" in chosen:
            chosen["steps"] = max(1, round(chosen["epochs"] * base.rows))
        if get_method(method)[0].trains_base and "dtype" in settings:
            chosen["dtype"] = "fp32"  # --dtype is that of the frozen base; here its weights are trained
    size = (base.parameters, base.family)
    run = run_config(method, base=size, model=base.source, data=TRAINED, seed=cell.seed, **chosen)
    return replace(cell, run=run)


def make_generate_config(config: StudyConfig, seed: int) -> GenerateConfig:
    """Make the generation settings of a cell."""
    return GenerateConfig(max_new_tokens=PRESETS[config.preset].new_tokens, seed=seed)
