"""Find the linears that `targets` and `layers` of a config name in a model.

"all-linear"                every linear of the blocks, never the head
("embed_tokens", "lm_head") an embedding, and the head, for the methods that can adapt them (LoRA)
"default"                   HF PEFT's choice for the family and the method
("q_proj", "attn.c_proj")   the linears whose path is this name, or ends in "." + this name
r".*\\.[02]\\.mlp\\..*"     any other text: a regular expression over the whole path
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from minipeft.adapters.patterns import match_paths
from minipeft.errors import InputError
from minipeft.models import Decoder

Targets = str | tuple[str, ...]
NAMES = re.compile(r"[\w.,-]+")  # on the command line: a list of names; other text is a regular expression


def parse_targets(text: str) -> Targets:
    """Parse targets from the command line.

    "all-linear" and "default" stay; letters, digits, "_", "-", "." and commas alone are a list of names
    ("q_proj,attn.c_proj"); any other text is a regular expression over the whole path.

    Raises:
        InputError: there is no name.
    """
    if text in ("all-linear", "default"):
        return text
    if text and not NAMES.fullmatch(text):
        return text
    names = tuple(name for name in text.split(",") if name)
    if not names:
        raise InputError(f"{text!r} names no linear layer", where="targets")
    return names


def check_targets(config: Any) -> None:
    """Check a config's `targets`, and its `layers` if it has that field.

    Raises:
        InputError: `targets` is empty, or `layers` is combined with a regular expression.
    """
    targets, layers = config.targets, getattr(config, "layers", None)
    if not targets or (isinstance(targets, tuple) and not all(targets)):
        raise InputError(f"{targets!r} names no linear layer", where="targets")
    if layers is None:
        return
    if not layers:
        raise InputError(f"{layers!r} must be a list of block numbers", where="layers")
    if isinstance(targets, str) and targets not in ("all-linear", "default"):
        raise InputError("cannot be combined with a regular expression, which names the layers itself", where="layers")


def list_linears(model: nn.Module) -> list[str]:
    """List the paths of the linears that can be adapted or are adapted, in the model's order."""
    is_linear = lambda m: isinstance(m, nn.Linear) or getattr(m, "adopts_linear", False)
    return [name for name, m in model.named_modules() if is_linear(m) and name != "lm_head"]


def list_embeddings(model: nn.Module) -> list[str]:
    """The paths of the plain embeddings."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]


def find_targets(
    model: Decoder,
    targets: Targets,
    default: tuple[str, ...],
    layers: tuple[int, ...] | None = None,
    *,
    tables: bool = False,
) -> list[str]:
    """The paths that `targets` names, in the model's order; with `layers`, only those in these blocks. With `tables`
    an embedding and the head may be named.

    Raises:
        InputError: a name, the pattern or a layer matches nothing (with what would), or names a table and must not.
    """
    paths = list_linears(model)
    if targets == "default":
        targets = default
    if targets == "all-linear":
        chosen = set(paths)
    else:
        found = [*list_embeddings(model), "lm_head"]
        paths, refused = (found + paths, []) if tables else (paths, found)
        if isinstance(targets, str):
            chosen = find_by_pattern(model, targets, paths, refused)
        else:
            chosen = {path for name in targets for path in find_by_name(model, name, paths, refused)}
    if layers is not None:
        check_layers(layers, len(model.blocks))
        if outside := [path for path in chosen if not path.startswith(model.family.blocks + ".")]:
            raise InputError(f"cannot be combined with the target {outside[0]!r}, which is in no block", where="layers")
        chosen = {path for path in chosen if find_block(path) in layers}
    return [path for path, _ in model.named_modules() if path in chosen]


def find_by_pattern(model: Decoder, pattern: str, paths: list[str], refused: list[str]) -> set[str]:
    """The paths that the regular expression matches whole."""
    found = match_paths(pattern, paths + refused, "targets")
    if not found:
        hint = "A text is a regular expression over the whole path; give plain names as a list"
        raise InputError(
            f"{pattern!r} matches no linear layer, such as {list_linears(model)[0]!r}", where="targets", hint=hint
        )
    for name in refused:
        if name in found:
            refuse(model, name)
    return set(found)


def find_by_name(model: Decoder, name: str, paths: list[str], refused: list[str]) -> list[str]:
    """The paths that are `name` or end in it."""
    named = lambda paths: [path for path in paths if is_named(path, name)]
    found = named(paths)
    if not found:
        for path in named(refused):
            refuse(model, path)
        known = sorted({path.rsplit(".", 1)[-1] for path in list_linears(model)})
        raise InputError(f"no linear layer is named {name!r}; this model has {known}", where="targets")
    return found


def is_named(path: str, name: str) -> bool:
    """Whether a path is this name, or ends in it."""
    return path == name or path.endswith("." + name)


def refuse(model: Decoder, path: str) -> None:
    """Refuse an embedding or the head as a target, with the reason."""
    if path == "lm_head":
        raise InputError("'lm_head' is not a linear layer of the blocks: LoRA alone adapts the head", where="targets")
    kind = type(model.get_submodule(path)).__name__
    raise InputError(f"{path!r} is an {kind.lower()}: a table that is looked up, not a linear layer", where="targets")


def check_layers(layers: tuple[int, ...], count: int) -> None:
    """Refuse a block that the model does not have."""
    for layer in layers:
        if not 0 <= layer < count:
            raise InputError(f"no layer {layer}: this model has 0 to {count - 1}", where="layers")


def find_block(path: str) -> int:
    """Find the block number in a path: its first numeric part."""
    return next(int(part) for part in path.split(".") if part.isdigit())
