"""Document ids, visibility and positions: the attention rule that data, models and generation share.

Each key column has an owner in `documents` (int64): 0, 1, 2, ... a document; PADDING nobody; VIRTUAL a virtual token
(of a prefix or a prompt), which every document sees:

    visible = column_k <= column_q  and  ( (document_k == document_q and within the window)  or  document_k == VIRTUAL )

    a row with P = 2 virtual tokens,         keys  V V 0 0 0 1 1 .      (V = VIRTUAL, . = PADDING)
    two documents and one pad, drawn   query 0     # # #
    as a matrix of who sees whom             0     # # # #
                                             0     # # # # #
                                             1     # #       #
                                             1     # #       # #
                                             .     # #           #      (padding sees itself: no softmax is empty)

Positions are derived from the owners, so that no caller passes them: each document begins at P, padding has position 0.
A sliding window (Beltagy et al. 2020; Jiang et al. 2023) does not hide virtual tokens unless `windowed` says so.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

PADDING = -1
VIRTUAL = -2
IGNORED = -100  # label excluded from the loss, as in torch's cross_entropy


def positions_in(documents: Tensor) -> Tensor:
    """The position of each column: its place in its document's run, after the virtual tokens. [B, S] -> [B, S]"""
    slot = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)  # [B, S]
    opens = torch.ones_like(documents, dtype=torch.bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    place = slot - torch.where(opens, slot, 0).cummax(dim=1).values  # [B, S]
    virtual = documents == VIRTUAL
    place = torch.where(virtual, place, place + virtual.sum(dim=1, keepdim=True))
    return torch.where(documents == PADDING, 0, place)  # [B, S]; else a long run of padding overruns GPT-2's table


def visible(documents: Tensor, positions: Tensor, queries: int, window: int | None, windowed: bool) -> Tensor:
    """The rule above as a mask, True where the last `queries` columns may look. [B, S], [B, S] -> [B, 1, T, S]"""
    columns = torch.arange(documents.shape[1], device=documents.device)
    causal = columns[-queries:, None] >= columns  # [T, S]; by column: a number used twice must not show the future
    own = documents[:, -queries:, None] == documents[:, None, :]  # [B, T, S]
    virtual = (documents == VIRTUAL)[:, None, :].expand_as(own)
    if window is not None:
        near = positions[:, -queries:, None] - positions[:, None, :] < window  # [B, T, S]
        own, virtual = own & near, (virtual & near if windowed else virtual)
    return (causal & (own | virtual))[:, None]  # [B, 1, T, S]


def derive_seed(*parts: int | str) -> int:
    """Derive a seed below 2**63 from the run's seed and the name of its use; the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
