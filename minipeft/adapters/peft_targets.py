"""Shared by the formats that adapt linears: the prefix of tensor names, and PEFT's keys for targets and layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from minipeft.adapters.patterns import match_paths
from minipeft.adapters.targets import Targets, is_named
from minipeft.errors import InputError
from minipeft.models import Decoder

ROOT = "base_model.model."  # of a tensor's name, before the path of the linear


def make_targets_json(targets: Targets, default: tuple[str, ...], paths: list[str]) -> str | list[str]:
    """Make target_modules: sorted names; "all-linear" as the names that it matched."""
    if targets == "all-linear":
        return sorted({path.rsplit(".", 1)[-1] for path in paths})
    if isinstance(targets, str) and targets != "default":
        return targets
    return sorted(default if targets == "default" else targets)


def read_targets(targets: Any, where: str) -> Targets:
    """Read target_modules or feedforward_modules; null is PEFT's choice for the family."""
    if targets is None:
        return "default"
    if isinstance(targets, str):
        return "all-linear" if targets.lower() == "all-linear" else targets
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise InputError(f"{targets!r} must be a list of names, a regular expression or 'all-linear'", where=where)
    return tuple(targets)


def read_layers(given: Mapping[str, Any]) -> Any:
    """Read layers_to_transform: a list of blocks, one block, or null for all.

    Raises:
        InputError: layers_pattern is given without it.
    """
    layers = given.get("layers_to_transform")
    if given.get("layers_pattern") and layers is None:
        raise InputError("has no meaning without layers_to_transform", where="layers_pattern")
    return ([layers] if isinstance(layers, int) else layers) or None


def fit_targets(
    config: Any,
    given: Mapping[str, Any],
    model: Decoder,
    find: Callable[[Decoder, Targets], list[str]],
    kind: str = "linear layer",
) -> tuple[Any, list[str]]:
    """Read target_modules as PEFT does, where the tensors say what is adapted: a name that matches nothing counts for
    nothing, if another one matches, and the modules of exclude_modules are taken away. Returns notes on the first.
    `find` finds the paths that targets name, modules of this `kind`.

    Raises:
        InputError: exclude_modules is malformed, or leaves no target.
    """
    notes, targets = [], config.targets
    if isinstance(targets, tuple):
        paths = [name for name, _ in model.named_modules()]
        unmatched = [name for name in targets if not any(is_named(path, name) for path in paths)]
        if unmatched and len(unmatched) < len(targets):
            targets = tuple(name for name in targets if name not in unmatched)
            notes.append(f"target_modules: {', '.join(map(repr, unmatched))} matches nothing in this model")
    if excluded := given.get("exclude_modules"):
        paths = find(model, targets)
        out = read_excluded(paths, excluded)
        targets = tuple(path for path in paths if path not in out)
        if not targets:
            raise InputError(f"{excluded!r} leaves no {kind}", where="exclude_modules")
    return dataclasses.replace(config, targets=targets), notes


def read_excluded(paths: list[str], excluded: Any) -> set[str]:
    """Read the paths that exclude_modules names: a list of names, or a regular expression over the whole path.

    Raises:
        InputError: it is neither.
    """
    if isinstance(excluded, str):
        return set(match_paths(excluded, paths, "exclude_modules"))
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        raise InputError(f"{excluded!r} must be a list of names or a regular expression", where="exclude_modules")
    return {path for path in paths if any(is_named(path, name) for name in excluded)}


def check_blocks(given: Mapping[str, Any], model: Decoder) -> None:
    """Check that layers_pattern names this model's list of blocks, the only one.

    Raises:
        InputError: it names another.
    """
    blocks = model.family.blocks.rsplit(".", 1)[-1]
    if given.get("layers_pattern") not in (None, "", [], blocks, [blocks]):
        problem = f"{given['layers_pattern']!r} is not supported (this model's blocks are {blocks!r})"
        raise InputError(problem, where="layers_pattern")
