"""From a StudyConfig to its cells: each model's untrained cell, and each method or trial with its settings.

The settings of a cell, from the weakest to the strongest: the preset's, the recipe's, the demo model's learning rate,
the trial's, the caller's. `settle` turns them into the RunConfig that trains, and that a plan is made of (plans.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minipeft.adapters import get_method
from minipeft.data.templates import read_template
from minipeft.generation import GenerateConfig
from minipeft.runs.config import collect_settings, run_config
from minipeft.study.cells import ZERO_SHOT, Cell
from minipeft.study.data import TRAINED
from minipeft.study.paper import MODELS
from minipeft.study.presets import DEMO_SETTINGS, OF_SOURCE, PRESETS, RECIPES, StudyConfig, has_setting
from minipeft.study.trials import Losses, Trial, Wanted

COMPARABLE = ("loss_mask", "isolate", "dtype")  # settings of the untrained model: its loss is compared with the others'


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


def make_cells(
    config: StudyConfig, bases: Mapping[str, Base | None], held_out: int, losses: Mapping[str, Losses] | None = None
) -> list[Cell]:
    """Make the cells of a study, model by model; `bases` maps a label to None if its model cannot be read.

    `losses`: by model, of the trials that are over, on which later trials depend; None: all cells that are expected.
    """
    preset = PRESETS[config.preset]
    cells: dict[str, Cell] = {}
    seeds = config.seeds or preset.seeds
    for label, base in bases.items():
        if preset.list_trials is None:
            drafts = [draft_untrained(config, label, seed) for seed in range(seeds)]
            drafts += [draft_tuned(config, label, method, seed) for method in config.methods for seed in range(seeds)]
        else:

            def start(method: str, label: str = label, base: Base | None = base) -> float:
                run = settle(draft_tuned(config, label, method, 0), config, base, held_out).run
                return run.train.learning_rate if run else 1e-3  # without a model there is no run

            known = None if losses is None else losses.get(label, {})
            wanted = Wanted(config.methods, seeds, config.settings, start, known)
            drafts = [draft_untrained(config, label, 0)]
            drafts += [draft_trial(config, label, trial) for trial in preset.list_trials(wanted)]
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
    settings = {**PRESETS[config.preset].settings, **RECIPES[config.recipe].settings}
    mask = {name: value for name, value in settings.items() if name in COMPARABLE}
    return Draft(Cell(model, ZERO_SHOT, seed, generate=make_generate_config(config, seed)), mask)


def draft_tuned(config: StudyConfig, model: str, method: str, seed: int) -> Draft:
    """A cell of a method: the settings of preset and recipe, and the learning rate of the demo model."""
    preset, recipe = PRESETS[config.preset], RECIPES[config.recipe]
    chosen = {**preset.settings, **recipe.settings, **recipe.each.get(method, {})}
    if model == "demo" and config.recipe == "best":
        chosen |= DEMO_SETTINGS.get(method, {})
    return Draft(Cell(model, method, seed, generate=make_generate_config(config, seed)), chosen)


def draft_trial(config: StudyConfig, model: str, trial: Trial) -> Draft:
    """A cell of an experiment: its method's, with the settings of the trial."""
    draft = draft_tuned(config, model, trial.method, trial.seed)
    generate = draft.cell.generate if trial.answers else None
    cell = replace(draft.cell, generate=generate, variant=trial.variant)
    return Draft(cell, {**draft.settings, **trial.settings()})


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
            rows = chosen.get("batch", 1) * chosen.get("accumulate", 1)  # of a step
            chosen["steps"] = max(1, round(chosen["epochs"] * base.rows / rows))
        if get_method(method)[0].trains_base and "dtype" in settings:
            chosen["dtype"] = "fp32"  # --dtype is that of the frozen base; here its weights are trained
    size = (base.parameters, base.family)
    run = run_config(method, base=size, model=base.source, data=TRAINED, seed=cell.seed, **chosen)
    return replace(cell, run=run)


def make_generate_config(config: StudyConfig, seed: int) -> GenerateConfig:
    """Make the generation settings of a cell; --batch-invariant is for its answers too."""
    invariant = bool(config.settings.get("batch_invariant", False))
    return GenerateConfig(max_new_tokens=PRESETS[config.preset].new_tokens, seed=seed, batch_invariant=invariant)
