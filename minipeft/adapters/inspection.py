"""Describe the folder of an adapter or a model from its JSON and safetensors headers; no tensor is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from minipeft.adapters import METHODS
from minipeft.adapters.peft_format import CONFIG, WEIGHTS
from minipeft.adapters.peft_virtual import STATE
from minipeft.errors import InputError
from minipeft.files import check_plain, read_object
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import find_tensors, read_config, rename_tensors
from minipeft.tensor_files import TensorInfo, read_header


def describe(folder: str | Path) -> dict[str, object]:
    """Describe an adapter or model folder as entries by name; `as_table` formats them.

    Raises:
        InputError: the folder holds neither, or a file in it is damaged.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        return describe_adapter(folder)
    if (folder / "config.json").exists():
        return describe_model(folder)
    if not folder.is_dir():
        problem = "is a file; the folder that holds it is wanted" if folder.exists() else "no such folder"
        raise InputError(problem, file=folder)
    inner = [name for name in ("adapter", "model") if (folder / name).is_dir()]
    held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    hint = f"Look into {folder / inner[0]}" if inner else None
    raise InputError(f"holds neither {CONFIG} nor config.json (it holds: {held})", file=folder, hint=hint)


def describe_adapter(folder: Path) -> dict[str, object]:
    """Describe an adapter: method, size, base, and the method's own entries (rank and targets, or virtual tokens)."""
    given, header = read_object(folder / CONFIG), read_header(folder / WEIGHTS)
    kind = given.get("peft_type")
    found: dict[str, object] = {"kind": "adapter", "method": None, "base": given.get("base_model_name_or_path")}
    for method in METHODS.values():
        if method.peft is not None and kind in method.peft.types:
            found |= {"method": method.name, **method.peft.describe(given, header)}
    if found["method"] is None:
        found["method"] = f"{kind} (not supported here)" if isinstance(kind, str) else repr(kind)
    if (folder / STATE).exists():
        found["training state"] = True
    return found | measure_tensors(header.values(), [folder / CONFIG, folder / WEIGHTS])


def describe_model(folder: Path) -> dict[str, object]:
    """Describe a model: family, shape and size. With a pytorch_model.bin only the config is read."""
    config = read_config(folder / "config.json")
    found: dict[str, object] = {
        "kind": "model",
        "family": config.model_type,
        "layers": config.layers,
        "width": config.width,
        "heads": config.heads,
        "key/value heads": config.kv_heads,
        "vocabulary": config.vocab_size,
        "context": config.context,
        "tied head": config.tie_word_embeddings,
    }
    if any(folder.glob("*.safetensors")):
        tensors = rename_tensors(find_tensors(folder, folder, None), FAMILIES[config.model_type])
        return found | measure_tensors(tensors.values(), sorted({info.file for info in tensors.values()}))
    check_plain(folder / "pytorch_model.bin")
    return found | {"bytes": (folder / "pytorch_model.bin").stat().st_size, "files": ["pytorch_model.bin"]}


def measure_tensors(infos: Iterable[TensorInfo], files: list[Path]) -> dict[str, object]:
    """Count tensors, parameters, bytes and files."""
    infos = list(infos)
    return {
        "tensors": len(infos),
        "parameters": sum(math.prod(info.shape) for info in infos),
        "dtype": ", ".join(sorted({info.dtype for info in infos})),
        "bytes": sum(file.stat().st_size for file in files),
        "files": [file.name for file in files],
    }


def as_table(description: Mapping[str, object]) -> str:
    """Format one line for each entry that is not empty."""
    rows = {name: value for name, value in description.items() if value not in (None, [], False)}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {as_text(value)}" for name, value in rows.items())


def as_text(value: object) -> str:
    """Format a value for the table."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "yes" if value is True else f"{value:,}" if isinstance(value, int) else str(value)
