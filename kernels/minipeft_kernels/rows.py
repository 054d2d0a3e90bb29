"""One adapter per row on a CPU: rows with the same adapter are grouped and computed in one batched product.

    owners   fr  -  de  fr         groups [n, c]    fr: rows 0, 3
                                                    de: row 2, padding

A linear then takes three products for any number of adapters. A loop over adapters takes three for each, and a gather
of A and B for each row copies r (K + N) entries a row. The groups depend on the owners alone: they are made once for a
batch and shared by all linears of the model (minipeft's adapters/bank.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowGroups(NamedTuple):
    """The adapter of each row of a batch (-1: none), and the rows grouped by adapter."""

    owner: Tensor  # [B]
    present: tuple[int, ...]  # the n adapters in use, ascending
    places: Tensor  # [n * c] rows, adapter by adapter, each group padded with row 0
    slots: Tensor  # [m] indices into places that are not padding
    targets: Tensor  # [m] the rows at these indices
    in_order: bool  # places are the rows 0, 1, ...: no gather is needed


def group_rows(owner: Sequence[int], device: torch.device | str = "cpu") -> RowGroups:
    """Group the rows: row b has adapter owner[b]."""
    members: dict[int, list[int]] = {j: [] for j in sorted(set(owner) - {-1})}
    for row, mine in enumerate(owner):
        if mine != -1:
            members[mine].append(row)
    count = max(map(len, members.values()), default=0)
    places, slots = [], []
    for group in members.values():
        slots += range(len(places), len(places) + len(group))
        places += group + [0] * (count - len(group))
    to = lambda numbers: torch.tensor(numbers, dtype=torch.int64, device=device)
    targets = [places[slot] for slot in slots]
    return RowGroups(to(owner), tuple(members), to(places), to(slots), to(targets), places == list(range(len(owner))))


def get_owner(rows: Tensor | RowGroups) -> Tensor:
    """Return the adapter of each row. -> [B]"""
    return rows.owner if isinstance(rows, RowGroups) else rows


def add_grouped(y: Tensor, x: Tensor, A: Tensor, B: Tensor, groups: RowGroups, scales: Tensor | None) -> Tensor:
    """y[b] += scales[j] (x[b] A[j]^T) B[j]^T in place, j the adapter of row b. y [B, T, N], x [B, T, K].

    Raises: ValueError for an owner outside -1 .. adapters - 1.
    """
    present = groups.present
    if not present:
        return y
    if present[0] < -1 or present[-1] >= len(A):
        wrong = present[0] if present[0] < -1 else present[-1]
        raise ValueError(f"rows names adapter {wrong}, and there are {len(A)}; -1 means none")
    if len(present) < len(A):
        A, B, scales = (None if t is None else t[list(present)] for t in (A, B, scales))  # type: ignore[assignment]
    n, A, B = len(present), A.to(x.dtype), B.to(x.dtype)
    grouped = x if groups.in_order else x[groups.places]  # [n * c, T, K]
    s = torch.bmm(grouped.reshape(n, -1, x.shape[2]), A.mT)  # [n, c * T, r]
    if scales is not None:
        s *= scales.to(x.dtype)[:, None, None]
    if groups.in_order:
        y.view(n, -1, y.shape[2]).baddbmm_(s, B.mT)
        return y
    added = torch.bmm(s, B.mT).view(-1, *y.shape[1:])  # [n * c, T, N]
    return y.index_add_(0, groups.targets, added if len(groups.slots) == len(added) else added[groups.slots])
