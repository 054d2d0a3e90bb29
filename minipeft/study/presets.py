"""The presets of a study, its recipes, and StudyConfig, which takes one of each.

preset    models                    pairs     purpose
demo      ours (minipeft/demo)      ours      compare four methods in minutes, without network or GPU
paper     the eight of the paper    CoNaLa    reproduce Männistö, Attieh and Tiedemann (2025), and add what it left out
prefix    ours                      ours      show why a prefix does or does not train (prefix_experiment.py)
rates     ours                      ours      compare methods each at its own best learning rate (rates_experiment.py)

recipe    settings of the training runs
best      the methods' own recipes (adapters/method.py); a prefix with text init and reparameterization MLP
paper     as printed in the paper, and the defaults of the libraries of its time where it prints nothing
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minipeft.adapters import get_method, list_method_names
from minipeft.errors import InputError, check_fields, option
from minipeft.metrics.execution import PROTECTION
from minipeft.runs.config import collect_settings
from minipeft.runs.gpus import GPUS
from minipeft.runs.process import ProcessConfig
from minipeft.study import prefix_experiment, rates_experiment
from minipeft.study.paper import MODELS, RECIPE
from minipeft.study.trials import Trial, Wanted

COMPARED = ("full", "lora", "prefix", "prompt")  # the paper's methods


@dataclass(frozen=True)
class StudyRecipe:
    """Settings of training runs by name: `settings` of all, `each` of a method alone, by the names of run_config."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


RECIPES = {"best": StudyRecipe(each={"prefix": {"reparam_width": 512}}), "paper": StudyRecipe(*RECIPE)}


@dataclass(frozen=True)
class Preset:
    """A study by name. `settings` of every cell come before those of the recipe.

    `list_trials`: of an experiment; None: each method, as many seeds. Settings in `own` are the experiment's.
    `searches`: later trials depend on the held-out losses of earlier ones, which are no rows of the tables.
    """

    models: tuple[str, ...]
    data: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = COMPARED
    new_tokens: int = 64
    seeds: int = 1
    list_trials: Callable[[Wanted], Sequence[Trial]] | None = None
    own: tuple[str, ...] = ()
    searches: bool = False


TAUGHT = {"epochs": 2.0, "loss_mask": "response"}  # the demo's
PRESETS = {
    "demo": Preset(("demo",), "demo", TAUGHT, new_tokens=40),
    "paper": Preset(tuple(MODELS.values()), "conala", {"epochs": 5.0}),
    "prefix": Preset(("demo",), "demo", seeds=3, list_trials=prefix_experiment.list_trials,
                     own=("learning_rate", "init", "reparam_width")),
    "rates": Preset(("demo",), "demo", TAUGHT, rates_experiment.METHODS, 40, 5, rates_experiment.list_trials,
                    ("learning_rate", "lr_multiplier"), searches=True),
}  # fmt: skip
# The demo model has a thirtieth of the parameters of the smallest model that the recipes were made for, so it needs
# larger learning rates. `minipeft study --preset rates` chose these on held-out pairs (results/rates-demo).
DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 3e-3},
    "prefix": {"learning_rate": 3e-3},
    "prompt": {"learning_rate": 1e-1},
}


OWN = ("model", "data", "seed")  # settings of a training run that the study sets itself
OF_SOURCE = ("data_file", "data_revision")  # the study reads the source; its cells read the study's folder


@dataclass(frozen=True)
class StudyConfig:
    """What to compare; None and () take the preset's."""

    preset: str = option("demo", "what to compare", choices=PRESETS)
    recipe: str = option("best", "settings of the training runs: best, or paper, as printed there", choices=RECIPES)
    model: tuple[str, ...] = option((), "folders, hub ids or demo")
    method: tuple[str, ...] = option((), "methods to compare; default the preset's", choices=list_method_names())
    data: str | None = option(
        None, "demo, conala, or data of any form that train takes; a fifth of its questions becomes the test set"
    )
    seeds: int | None = option(None, "training runs per method, each with its own seed", least=1)
    limit: int | None = option(None, "answer the first N questions only", least=1)
    workers: int = option(1, "cells that run at once, each with its share of the cores, or --threads", least=1)
    cell: str | None = option(
        None, "I/N: run the I-th of N shares of the cells (a scheduler's array); without it the command reports all"
    )
    gpu: str | None = option(None, "a GPU by name; a cell that does not fit its memory is refused", choices=GPUS)
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
            if PRESETS[self.preset].searches:
                problem = f"the runs of --preset {self.preset} depend on its search"
                raise InputError(problem, where="cell", hint="--workers runs several at once")
        for name in self.settings:
            if name in OWN:
                raise InputError("is set by the study itself", where=name)
            if name in PRESETS[self.preset].own:
                raise InputError(f"is what --preset {self.preset} compares", where=name)
            if not any(has_setting(method, name) for method in self.methods):
                raise InputError(f"has no effect with {', '.join(self.methods)}", where=name)

    @property
    def methods(self) -> tuple[str, ...]:
        return self.method or PRESETS[self.preset].methods

    @property
    def threads(self) -> int | None:
        """The threads of each cell; None: as many as torch takes."""
        shared = max(1, (os.cpu_count() or 1) // self.workers) if self.workers > 1 else None
        return self.process.threads or shared

    @property
    def cell_process(self) -> ProcessConfig:
        """The process settings of each cell."""
        return replace(self.process, threads=self.threads)

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
