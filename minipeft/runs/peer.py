"""The one place that imports transformers, and only where a user asks for a comparison with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.hub import NAMED


def load_peer(source: str, dtype: torch.dtype) -> nn.Module:
    """Load a folder as transformers does, with attention in plain torch operators.

    Raises:
        InputError: transformers is not installed or cannot load the folder, or the source is not a folder.
    """
    folder = NAMED.get(source, Path(source))
    if not folder.is_dir():
        raise InputError("no such folder; transformers is compared on a local folder", file=source)
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise InputError("is not installed", where="transformers", hint="pip install transformers") from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, attn_implementation="eager"
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"transformers cannot load it: {error}".splitlines()[0], file=folder) from error
    loaded: nn.Module = model.eval()
    return loaded
