"""What the formats of adapted linears share: the start of a tensor's name, and PEFT's keys for targets and layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minipeft.adapters.targets import Targets
from minipeft.errors import InputError
from minipeft.models import Decoder

ROOT = "base_model.model."  # of a tensor's name, before the path of the linear


def targets_json(targets: Targets, default: tuple[str, ...], paths: list[str]) -> str | list[str]:
    """target_modules: names, sorted; "all-linear" as the names that it found."""
    if targets == "all-linear":
        return sorted({path.rsplit(".", 1)[-1] for path in paths})
    if isinstance(targets, str) and targets != "default":
        return targets
    return sorted(default if targets == "default" else targets)


def targets_from(targets: Any, where: str) -> Targets:
    """target_modules or feedforward_modules; null is PEFT's choice for the family."""
    if targets is None:
        return "default"
    if isinstance(targets, str):
        return "all-linear" if targets.lower() == "all-linear" else targets
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise InputError(f"{targets!r} must be a list of names, a regular expression or 'all-linear'", where=where)
    return tuple(targets)


def layers_from(given: Mapping[str, Any]) -> Any:
    """layers_to_transform: a list of blocks, one block, or null for all.

    Raises:
        InputError: layers_pattern is given without it.
    """
    layers = given.get("layers_to_transform")
    if given.get("layers_pattern") and layers is None:
        raise InputError("has no meaning without layers_to_transform", where="layers_pattern")
    return ([layers] if isinstance(layers, int) else layers) or None


def check_blocks(given: Mapping[str, Any], model: Decoder) -> None:
    """Check that layers_pattern names this model's list of blocks, the only one.

    Raises:
        InputError: it names another.
    """
    blocks = model.family.blocks.rsplit(".", 1)[-1]
    if given.get("layers_pattern") not in (None, "", [], blocks, [blocks]):
        problem = f"{given['layers_pattern']!r} is not supported (this model's blocks are {blocks!r})"
        raise InputError(problem, where="layers_pattern")
