"""Which path a call takes: what can run here, then the rule that picks. Importing it imports no Triton."""

import importlib.util
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from . import reference
from .reference import Part

PATHS = ("reference", "hybrid", "fused", "decode")


class UnavailablePath(RuntimeError):
    """A path was asked for by name and cannot run here; the message says why."""


def choose_path(path: str, x: Tensor, parts: Sequence[Part], needs_grad: bool, grouped: bool = False) -> str:
    """Return the path that a call takes: `path` itself where it can run, or auto's choice.

    Raises: ValueError for a name that is no path, UnavailablePath with the reason where a named path cannot run.
    """
    if path == "auto":
        return "reference"
    if path == "reference":
        return path
    if path not in PATHS:
        raise ValueError(f"no path is named {path!r}; there are {('auto', *PATHS)}")
    raise UnavailablePath(f"path={path!r}: {why_not(path, x)}")


def why_not(path: str, x: Tensor) -> str:
    """Say why a Triton path cannot run on x."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install minipeft[kernels]`, or use path='auto'"
    return f"x is on {x.device}, Triton needs a CUDA device; use path='auto'"


def path_functions(path: str) -> ModuleType:
    """Return the module with a path's forward, backward and rows."""
    assert path == "reference"
    return reference
