"""The layout of a forward pass: positions and attention masks, computed once for all blocks.

Each distinct window has one `View` and each distinct rotary setting one table; a block looks up its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.documents import IGNORED, PADDING, VIRTUAL, positions_in, visible
from minipeft.errors import InputError, format_value
from minipeft.models.cache import Cache, RaggedCache

Rotary = tuple[Tensor, Tensor]  # cosine and sine of each position's angles
Runs = list[list[tuple[int, Tensor | None]]]  # of each row, each run's length and mask
Spans = list[list[tuple[int, int]]]  # of each row, the key columns that its one query sees, as [first, end)


@dataclass(frozen=True)
class View:
    """Which keys a query attends to within one window: a mask, runs, spans, or plain causal attention."""

    mask: Tensor | None = None  # [B, 1, T, S], make_additive_mask
    runs: Runs | None = None
    spans: Spans | None = None


@dataclass(frozen=True)
class Layout:
    """Positions and views of a forward pass; made once by `lay_out`, used by every block."""

    positions: Tensor  # [B, T] of the queries
    columns: int  # S, key columns: cached ones and virtual tokens included
    views: Mapping[int | None, View]  # by window
    virtual_tokens: int  # VIRTUAL columns at the head of each row's keys
    prompted: bool  # the virtual tokens are queries too (a prompt)
    first: bool  # the row's first call, which adds the virtual tokens
    rotations: Mapping[str, Rotary] = field(default_factory=dict)  # by the setting's name


def lay_out(
    documents: Tensor | None,
    ids: Tensor,
    cache: Cache | None,
    *,
    virtual_tokens: int = 0,
    prompted: bool = False,
    windows: Sequence[int | None] = (None,),
    windowed: bool = False,
    dtype: torch.dtype = torch.bool,
) -> Layout:
    """Compute positions and masks for a forward pass over `ids` [B, T].

    `documents` [B, T] gives the document of each token (None: one document a row). On the first call of a row,
    `virtual_tokens` VIRTUAL columns are put before them; with `prompted` they are queries too (a prompt), else only
    keys (a prefix). `windows`: the distinct windows of the blocks. `dtype`: the dtype of the scores, or bool.

    Raises:
        InputError: documents and ids differ in shape, or the cache has no room.
    """
    if isinstance(cache, RaggedCache):
        return lay_out_ragged(cache, ids, virtual_tokens, windows, windowed)
    first = cache is None or cache.length == 0
    queries = ids.shape[1] + (virtual_tokens if prompted and first else 0)
    plain = documents is None and cache is None and not virtual_tokens
    views = {w: View() for w in windows if plain and (w is None or queries <= w)}
    if len(views) == len(windows):
        positions = torch.arange(queries, device=ids.device).expand_as(ids)  # [B, T]
        return Layout(positions, queries, views, 0, False, first)
    documents = torch.zeros_like(ids) if documents is None else documents
    if documents.shape != ids.shape:
        raise InputError(f"shape {list(documents.shape)}, but ids have {list(ids.shape)}", where="documents")
    if first:
        documents = F.pad(documents, (virtual_tokens, 0), value=VIRTUAL)  # [B, P + T]
    if cache is not None:
        documents = cache.open(documents)  # [B, S]
    positions = positions_in(documents)  # [B, S]
    for window in windows:
        runs = None
        if cache is None and documents.device.type == "cpu" and not torch.compiler.is_compiling():
            runs = find_runs(documents, virtual_tokens, window, windowed, prompted, dtype)
        if runs is not None and all(len(row) == 1 and row[0][1] is None for row in runs):
            views[window] = View()  # one document a row: plain causal attention, which needs no [T, T] mask
        elif runs is not None and sum(map(len, runs)) > len(runs) * (2 if prompted and virtual_tokens else 1):
            views[window] = View(runs=runs)
        elif window not in views:
            views[window] = View(make_additive_mask(visible(documents, positions, queries, window, windowed), dtype))
    return Layout(positions[:, -queries:], documents.shape[1], views, virtual_tokens, prompted, first)


def lay_out_ragged(
    cache: RaggedCache, ids: Tensor, virtual_tokens: int, windows: Sequence[int | None], windowed: bool
) -> Layout:
    """The layout of one more token in each row of a ragged cache: row b's query is its last column, n - 1.

    It sees columns n - window ... n - 1, and the virtual tokens 0 ... P - 1 even where these are further back.

    Raises:
        InputError: ids are not one token a row, or a row is full.
    """
    rows = len(cache.lengths)
    if ids.shape != (rows, 1):
        problem = f"shape {list(ids.shape)}, but a ragged cache takes one token of each of its {rows} rows"
        raise InputError(problem, where="ids")
    lengths = cache.advance()

    def find_spans(n: int, window: int | None) -> list[tuple[int, int]]:
        first = 0 if window is None else max(0, n - window)
        if windowed or first <= virtual_tokens:
            return [(first if windowed else 0, n)]
        return [(0, virtual_tokens), (first, n)] if virtual_tokens else [(first, n)]

    views = {window: View(spans=[find_spans(n, window) for n in lengths]) for window in windows}
    positions = cache.lengths[:, None] - 1  # [B, 1]
    return Layout(positions, cache.length, views, virtual_tokens, False, False)


def check_rows(vocab_size: int, ids: object, labels: object = None, documents: object = None) -> None:
    """Check that rows are integers [B, T] of one shape and, on the CPU, that ids and labels are in the vocabulary.

    Raises:
        InputError: names the tensor and its content.
    """
    for name, given in (("ids", ids), ("labels", labels), ("documents", documents)):
        if given is None and name != "ids":
            continue
        if not isinstance(given, Tensor):
            raise InputError(f"{format_value(given)} must be a tensor of integers [rows, tokens]", where=name)
        if given.dtype not in (torch.int64, torch.int32):
            raise InputError(f"are {given.dtype}, want torch.int64", where=name)
        if given.dim() != 2 or 0 in given.shape:
            raise InputError(f"have shape {list(given.shape)}, want [rows, tokens]", where=name)
        if given.shape != ids.shape:  # type: ignore[attr-defined]
            raise InputError(f"shape {list(given.shape)}, but ids have {list(ids.shape)}", where=name)  # type: ignore[attr-defined]
        if name != "documents" and given.device.type == "cpu":
            values = given if name == "ids" else torch.where(given == IGNORED, 0, given)
            for value in (int(value) for value in torch.aminmax(values)):
                if not 0 <= value < vocab_size:
                    raise InputError(f"hold {value}, but the model has {vocab_size} tokens", where=name)


def make_additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask to an additive one: 0 where a query attends, else minus infinity; dtype bool leaves it as it is.

    torch's fused attention converts a bool mask in every block and saves each copy for backward; here all share one.
    """
    return mask if dtype == torch.bool else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def find_runs(
    documents: Tensor, virtual_tokens: int, window: int | None, windowed: bool, prompted: bool, dtype: torch.dtype
) -> Runs | None:
    """Cut each row into runs of one document, as (length, mask); virtual tokens are a run only if they are queries.

    A mask is [n, P + n] over the virtual tokens and the run itself, or None for plain causal attention. Returns None
    if one run sees another: a document id occurs in two runs, or the caller passed VIRTUAL tokens.
    """
    masks: dict[tuple[int, int], Tensor | None] = {}

    def mask_of(length: int, virtual: int) -> Tensor | None:
        if (length, virtual) not in masks:
            alone = F.pad(torch.zeros(1, length, dtype=torch.long), (virtual, 0), value=VIRTUAL)  # [1, P + n]
            plain = not virtual and (window is None or length <= window)
            seen = None if plain else visible(alone, positions_in(alone), length, window, windowed)[0, 0]
            masks[length, virtual] = None if seen is None else make_additive_mask(seen, dtype)
        return masks[length, virtual]

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
            runs.insert(0, (virtual_tokens, make_additive_mask(among, dtype)))
        rows.append(runs)
    return rows
