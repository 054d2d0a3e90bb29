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
    require(type(mine) is type(expected) or mine == expected, f"{what} is {describe(mine)}, not {describe(expected)}")
    require(mine == expected, f"{what} is {mine!r}; it should be {expected!r}")


def require_close(mine: Any, expected: Tensor | float, what: str, tolerance: float) -> None:
    """Assert that a tensor (or number) has the expected shape, and differs by at most `tolerance` times the largest
    expected entry (at least 1e-30)."""
    require_given(mine, what)
    require(isinstance(mine, Tensor | float | int), f"{what} is {describe(mine)}, not {describe(expected)}")
    got, want = (torch.as_tensor(value).detach() for value in (mine, expected))
    require(got.shape == want.shape, f"{what} has the shape {list(got.shape)}; it should be {list(want.shape)}")
    if not want.is_floating_point():
        require(not got.is_floating_point(), f"{what} is {got.dtype}; it should be {want.dtype}")
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    apart = torch.where(same, 0.0, (got - want).abs())
    apart = torch.where(apart.isnan(), float("inf"), apart)
    finite = want[want.isfinite()]
    allowed = tolerance * max(float(finite.abs().max()) if finite.numel() else 0.0, 1e-30)
    if not apart.numel() or float(apart.max()) <= allowed:
        return
    place = int(apart.flatten().argmax())
    at = [int(part) for part in torch.unravel_index(torch.tensor(place), apart.shape)]
    values = f"yours {float(got.flatten()[place]):.6g}, expected {float(want.flatten()[place]):.6g}"
    count = int((apart > allowed).sum())
    where = f" at {at} ({count} of {apart.numel()} entries differ)" if at else ""
    raise AssertionError(f"{what} is wrong{where}: {values} (allowed difference {allowed:.2g})")


def require_dtype(mine: Tensor, dtype: torch.dtype, what: str) -> None:
    """Assert a tensor's dtype."""
    require_given(mine, what)
    require(mine.dtype == dtype, f"{what} is {mine.dtype}; it should be {dtype}")


def require_given(mine: Any, what: str) -> None:
    """Assert that there is a value."""
    require(mine is not None, f"{what} is None: does your function return it?")


def describe(value: Any) -> str:
    """The kind of a value, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{value!r:.60} ({type(value).__name__})"
