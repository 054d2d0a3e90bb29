"""Who sees whom, the decode cache and the attention product: what every decoder family shares.

The letters of all shape comments in minipeft:

    B rows of a batch     T tokens of a row (queries)    S key columns (cache + learned + tokens)
    C model width         H query heads                  K key/value heads (K < H: grouped queries, Ainslie et al. 2023)
    D width of a head     P learned columns              V vocabulary      L layers      r rank

One rule, for training, packing, prefill, decoding and padding alike. Each key column has an owner in `documents`:
0, 1, 2, ... a document; PADDING nobody; SHARED a learned column (of a prefix or a prompt), which is everybody's:

    visible = column_k <= column_q  and  ( (document_k == document_q and within the window)  or  document_k == SHARED )

    a row with P = 2 learned columns,        keys  S S 0 0 0 1 1 .      (S = SHARED, . = PADDING)
    two documents and one pad, drawn   query 0     # # #
    as a matrix of who sees whom             0     # # # #
                                             0     # # # # #
                                             1     # #       #
                                             1     # #       # #
                                             .     # #           #      (padding sees itself: no softmax is empty)

Positions follow from the owners too, so nobody has to pass them: a document restarts at P, padding stands at 0.
A sliding window (Beltagy et al. 2020; Jiang et al. 2023) does not hide learned columns unless `windowed` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipeft.errors import InputError

PADDING = -1
VIRTUAL = -2


def positions_in(documents: Tensor) -> Tensor:
    """The position of each column: its place in its document's run, after the learned columns. [B, S] -> [B, S]"""
    slot = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)  # [B, S]
    opens = torch.ones_like(documents, dtype=torch.bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    place = slot - torch.where(opens, slot, 0).cummax(dim=1).values  # [B, S]
    shared = documents == VIRTUAL
    place = torch.where(shared, place, place + shared.sum(dim=1, keepdim=True))
    return torch.where(documents == PADDING, 0, place)  # [B, S]; else a long run of padding overruns GPT-2's table


def visible(documents: Tensor, positions: Tensor, queries: int, window: int | None, windowed: bool) -> Tensor:
    """The rule above as a mask, True where the last `queries` columns may look. [B, S], [B, S] -> [B, 1, T, S]"""
    columns = torch.arange(documents.shape[1], device=documents.device)
    causal = columns[-queries:, None] >= columns  # [T, S]; by column: a number used twice must not show the future
    own = documents[:, -queries:, None] == documents[:, None, :]  # [B, T, S]
    shared = (documents == VIRTUAL)[:, None, :].expand_as(own)
    if window is not None:
        near = positions[:, -queries:, None] - positions[:, None, :] < window  # [B, T, S]
        own, shared = own & near, (shared & near if windowed else shared)
    return (causal & (own | shared))[:, None]  # [B, 1, T, S]


def as_addend(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to the scores: 0 where one may look, else minus infinity. A bool mask stays one.

    Of a bool mask torch's product makes this itself, in every block, and keeps each for backward; here all share one.
    """
    return mask if dtype == torch.bool else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


@dataclass(frozen=True)
class Layout:
    """What one forward pass has to know of its rows; made once by `lay_out`, used by every block."""

    positions: Tensor  # [B, T] of the queries
    mask: Tensor | None  # [B, 1, T, S], as_addend; None: plainly causal, or given by runs
    runs: list[list[tuple[int, Tensor | None]]] | None  # per row, each run's length and mask; None: use mask
    virtual_tokens: int  # SHARED columns at the head of each row's keys
    prompted: bool  # those columns are queries too (a prompt)
    first: bool  # the row's first call: the one that brings in the learned columns


def lay_out(
    documents: Tensor | None,
    ids: Tensor,
    cache: Cache | None,
    *,
    virtual_tokens: int = 0,
    prompted: bool = False,
    window: int | None = None,
    windowed: bool = False,
    dtype: torch.dtype = torch.bool,
) -> Layout:
    """Work out positions and visibility for a forward pass over `ids` [B, T].

    `documents` [B, T] gives the owner of each token (None: one document a row). On the first call of a row, `learned`
    SHARED columns are put before them; with `prompted` they are queries too (a prompt), else only keys (a prefix).
    `dtype` is that of the scores, or bool.

    Raises:
        InputError: documents and ids differ in shape, or the cache has no room.
    """
    first = cache is None or cache.length == 0
    queries = ids.shape[1] + (virtual_tokens if prompted and first else 0)
    if documents is None and first and not virtual_tokens and cache is None and (window is None or queries <= window):
        positions = torch.arange(queries, device=ids.device).expand_as(ids)  # [B, T]
        return Layout(positions, None, None, 0, False, first)
    documents = torch.zeros_like(ids) if documents is None else documents
    if documents.shape != ids.shape:
        raise InputError(f"shape {list(documents.shape)}, but ids have {list(ids.shape)}", where="documents")
    if first:
        documents = F.pad(documents, (virtual_tokens, 0), value=VIRTUAL)  # [B, P + T]
    if cache is not None:
        documents = cache.open(documents)  # [B, S]
    positions = positions_in(documents)  # [B, S]
    if cache is None and documents.device.type == "cpu":
        runs = runs_in(documents, virtual_tokens, window, windowed, prompted, dtype)
        if runs is not None and sum(map(len, runs)) > len(runs) * (2 if prompted and virtual_tokens else 1):
            return Layout(positions[:, -queries:], None, runs, virtual_tokens, prompted, first)
    mask = as_addend(visible(documents, positions, queries, window, windowed), dtype)
    return Layout(positions[:, -queries:], mask, None, virtual_tokens, prompted, first)


def runs_in(
    documents: Tensor, virtual_tokens: int, window: int | None, windowed: bool, prompted: bool, dtype: torch.dtype
) -> list[list[tuple[int, Tensor | None]]] | None:
    """Each row's runs of one owner as (length, mask), the learned columns' own run only where they are queries.

    A mask is [n, P + n] over the learned columns and the run itself, or None where the run is plainly causal.
    None for all where one run sees another: a document's number comes back, or the caller has SHARED tokens himself.
    """
    masks: dict[tuple[int, int], Tensor | None] = {}

    def mask_of(length: int, shared: int) -> Tensor | None:
        if (length, shared) not in masks:
            alone = F.pad(torch.zeros(1, length, dtype=torch.long), (shared, 0), value=VIRTUAL)  # [1, P + n]
            plain = not shared and (window is None or length <= window)
            seen = None if plain else visible(alone, positions_in(alone), length, window, windowed)[0, 0]
            masks[length, shared] = None if seen is None else as_addend(seen, dtype)
        return masks[length, shared]

    rows = []
    for row in documents:
        owners, lengths = torch.unique_consecutive(row[virtual_tokens:], return_counts=True)
        real = [owner for owner in owners.tolist() if owner != PADDING]
        if VIRTUAL in real or len(set(real)) < len(real):
            return None
        row_lengths: list[int] = lengths.tolist()
        runs = [(n, mask_of(n, virtual_tokens)) for n in row_lengths]
        if virtual_tokens and prompted:
            alone = torch.full((1, virtual_tokens), VIRTUAL)
            among = visible(alone, positions_in(alone), virtual_tokens, window, windowed)[0, 0]  # [P, P]
            runs.insert(0, (virtual_tokens, as_addend(among, dtype)))
        rows.append(runs)
    return rows


class Cache:
    """Keys and values of the columns seen so far, preallocated; `documents` remembers their owners.

    Zeros, not `empty`: an unwritten column is masked, but 0 * NaN would still be NaN.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, length: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        self.keys = torch.zeros(layers, rows, heads, length, width, dtype=dtype, device=device)  # [L, B, K, S, D]
        self.values = torch.zeros_like(self.keys)  # [L, B, K, S, D]
        self.documents = torch.full((rows, length), PADDING, device=device)  # [B, S]
        self.start = 0  # where this call's columns begin
        self.length = 0  # columns in use

    def open(self, documents: Tensor) -> Tensor:
        """Claim columns for owners `documents` [B, n]; returns the owners of all columns in use [B, S]."""
        room = self.documents.shape[1]
        if documents.shape[0] != self.documents.shape[0] or self.length + documents.shape[1] > room:
            raise InputError(
                f"{documents.shape[0]} rows of {self.length} + {documents.shape[1]} columns do not fit in one of "
                f"{self.documents.shape[0]} rows and {room} columns",
                where="cache",
                hint="make it with model.new_cache(rows, length)",
            )
        self.start, self.length = self.length, self.length + documents.shape[1]
        self.documents[:, self.start : self.length] = documents
        return self.documents[:, : self.length]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write this call's keys and values [B, K, n, D]; returns views of all in use [B, K, S, D]."""
        self.keys[layer, :, :, self.start : self.length] = k
        self.values[layer, :, :, self.start : self.length] = v
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D) where visible) v (Vaswani et al. 2017, eq. 1), heads merged.

    q [B, H, T, D], k and v [B, K, S, D] -> [B, T, H * D]
    """
    if layout.runs is not None:
        return attend_by_run(q, k, v, layout, dropout, scale)
    causal = layout.mask is None
    y = product(q, k, v, layout.mask, causal, dropout, scale)  # [B, H, T, D]
    return y.transpose(1, 2).flatten(2)  # [B, T, H * D]


def product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float | None
) -> Tensor:
    """torch's fused attention product. q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D]"""
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and lacks_masked_groups(q):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))  # [B, H, S, D]
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def lacks_masked_groups(q: Tensor) -> bool:
    """Whether no fused kernel takes a mask and grouped heads together: on CUDA torch would form the [T, S] scores of
    each head in float32 (https://github.com/Comfy-Org/ComfyUI/pull/15135)."""
    return q.is_cuda


def attend_by_run(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float, scale: float | None) -> Tensor:
    """The same product, one document at a time: a packed row costs its documents, sum n^2, instead of T^2.

    Rows are cut by `split`, whose backward is one `cat`; slices would write a row of zeros each. On a GPT-2 layer,
    4 rows of 1024 tokens with 27 documents each, this took 53 ms against 496 ms for the dense mask (one CPU thread).
    """
    assert layout.runs is not None
    pieces = []
    for row, runs in enumerate(layout.runs):
        lengths = [n for n, _ in runs]
        ahead = 1 if layout.virtual_tokens and not layout.prompted else 0  # a prefix: a piece of keys without queries
        of_keys = [layout.virtual_tokens] * ahead + lengths
        qs = q[row].transpose(0, 1).split(lengths)  # each [n, H, D]
        ks, vs = k[row].transpose(0, 1).split(of_keys), v[row].transpose(0, 1).split(of_keys)  # each [n, K, D]
        for i, (_, mask) in enumerate(runs):
            k_run, v_run = ks[i + ahead], vs[i + ahead]
            if layout.virtual_tokens and i + ahead > 0:
                k_run, v_run = torch.cat([ks[0], k_run]), torch.cat([vs[0], v_run])  # [P + n, K, D]
            y = product(heads_first(qs[i]), heads_first(k_run), heads_first(v_run), mask, mask is None, dropout, scale)
            pieces.append(y[0].transpose(0, 1).flatten(1))  # [n, H * D]
    return torch.cat(pieces).view(q.shape[0], q.shape[2], -1)  # [B, T, H * D]


def heads_first(piece: Tensor) -> Tensor:
    """[n, H, D] -> [1, H, n, D]"""
    return piece.transpose(0, 1)[None]


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Each linear of the same x; a first linear that knows how to do them `together`, sharing passes, does so."""
    together: Callable[..., tuple[Tensor, ...]] | None = getattr(linears[0], "together", None)
    return tuple(linear(x) for linear in linears) if together is None else together(x, linears)


def run_block(block: nn.Module, activation_checkpointing: bool, *arguments: object) -> Tensor:
    """Apply a decoder block; with `recompute` keep only its input and run it again in backward (Chen et al. 2016)."""
    return checkpoint(block, *arguments, use_reentrant=False) if activation_checkpointing else block(*arguments)
