"""What the checks of the exercises assert with: each difference is told in words, with the first place that differs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def require(claim: bool, text: str) -> None:
    """Assert a claim; `text` says what is wrong where it does not hold."""
    if not claim:
        raise AssertionError(text)


def require_equal(mine: Any, expected: Any, what: str) -> None:
    """Assert that a value equals the expected one."""
    require_given(mine, what)
    if isinstance(expected, Tensor):
        require_close(mine, expected, what, tolerance=0)
        return
    require(mine == expected, f"{what}: yours {mine!r}, expected {expected!r}")


def require_close(mine: Any, expected: Tensor | float, what: str, tolerance: float) -> None:
    """Assert that a tensor (or number) has the expected shape, and differs by at most `tolerance` times the largest
    expected entry (at least 1e-30)."""
    require_given(mine, what)
    require(isinstance(mine, Tensor | float | int), f"{what}: {describe(mine)}; it should be {describe(expected)}")
    got, want = (torch.as_tensor(value).detach() for value in (mine, expected))
    require(got.shape == want.shape, f"{what}: the shape is {list(got.shape)}; it should be {list(want.shape)}")
    if not want.is_floating_point():
        require(not got.is_floating_point(), f"{what}: {got.dtype}; it should be {want.dtype}")
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    apart = torch.where(same, 0.0, (got - want).abs())
    apart = torch.where(apart.isnan(), float("inf"), apart)
    finite = want[want.isfinite()]
    allowed = tolerance * max(float(finite.abs().max()) if finite.numel() else 0.0, 1e-30)
    if not apart.numel() or float(apart.max()) <= allowed:
        return
    wrong = (apart > allowed).nonzero().tolist()
    at = tuple(wrong[0])
    values = f"yours {float(got[at]):.6g}, expected {float(want[at]):.6g}"
    where = f" at {list(at)}" if at else ""
    others = f"; {len(wrong)} of {apart.numel()} entries differ" if at else ""
    raise AssertionError(f"{what}: wrong{where}: {values} (allowed difference {allowed:.2g}{others})")


def require_dtype(mine: Tensor, dtype: torch.dtype, what: str) -> None:
    """Assert a tensor's dtype."""
    require_given(mine, what)
    require(mine.dtype == dtype, f"{what}: {mine.dtype}; it should be {dtype}")


def require_given(mine: Any, what: str) -> None:
    """Assert that there is a value."""
    require(mine is not None, f"{what}: None; does your function return it?")


def describe(value: Any) -> str:
    """The kind of a value, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{value!r:.60} ({type(value).__name__})"
