"""The numbers of the first stops: from text to tokens, to packed rows, and to who sees whom."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from minipeft.adapters import PrefixConfig, add_adapter
from minipeft.data.examples import encode_pairs
from minipeft.data.packing import Batch, Batches
from minipeft.data.templates import format_prompt
from minipeft.documents import IGNORED, PADDING, VIRTUAL, positions_in, visible
from minipeft.study.explorer import PackedRow, average_loss, draw_explorer, name_owner, show_tokens
from minipeft.tour.bench import LENGTH, Bench
from minipeft.tour.drawings import draw_matrix, draw_row, draw_tokens, sign_owner
from minipeft.tour.values import Drawing, Table, Value, claim

EXPLORED_PREFIX, EXPLORED_WINDOW = 4, 12  # virtual tokens, and the tokens of a window, in the explorer


def measure_tokens(bench: Bench) -> Mapping[str, Value]:
    """One training text as tokens, and back."""
    pair, tokenizer = bench.pairs[0], bench.tokenizer
    prompt = format_prompt(pair.intent)
    example = encode_pairs([pair], tokenizer)[0]
    pieces = [tokenizer.decode([token], skip_special=False) for token in example.ids]
    text = prompt + pair.snippet
    claim(tokenizer.decode(example.ids) == text, "decoding the ids gives the text back")
    claim(example.ids[-1] == tokenizer.eos, "the last id is the end of text")
    return {
        "vocabulary": tokenizer.size,
        "characters": len(text),
        "count": len(example.ids),
        "per_token": len(text) / (len(example.ids) - 1),
        "prompt_tokens": example.prompt_tokens,
        "drawn": draw_tokens(pieces, [int(place >= example.prompt_tokens) for place in range(len(pieces))],
                             "One training text as tokens: the prompt, then the response, which ends with EOS."),
    }  # fmt: skip


def measure_packed_row(bench: Bench) -> Mapping[str, Value]:
    """Rows of the demo's pairs: how full they are, and the border between two documents."""
    pairs = bench.pairs[:400]
    isolated, separate = bench.pack(pairs, shuffle=False), encode_pairs(pairs, bench.tokenizer)
    lengths = [len(example.ids) for example in separate]
    batch = find_row(isolated, 3)
    owners = batch.documents[0].tolist()
    start = owners.index(1)
    table = Table(
        ("column", "token", "document", "position", "label"),
        [
            (column, bench.tokenizer.decode([int(batch.ids[0, column])], skip_special=False).replace("\n", "↵"),
             owners[column], int(positions_in(batch.documents)[0, column]), int(batch.labels[0, column]))
            for column in range(start - 3, start + 3)
        ],
    )  # fmt: skip
    naive = sum(lengths) / (len(lengths) * max(lengths))
    claim(isolated.report.fill > naive, "packing fills rows better than padding")
    return {
        "length": LENGTH,
        "pairs": len(pairs),
        "tokens": isolated.report.tokens_in,
        "rows": isolated.report.rows,
        "fill": 100 * isolated.report.fill,
        "padded_fill": 100 * naive,
        "longest": max(lengths),
        "ignored": IGNORED,
        "drawn": draw_row(owners, "A packed row: documents 0, 1 and 2 side by side, and padding (.) at the end."),
        "table": table,
    }


def measure_visibility(bench: Bench) -> Mapping[str, Value]:
    """The rule's mask, and the loss of documents alone, packed by the rule, and packed without it."""
    owners = [VIRTUAL, VIRTUAL, 0, 0, 0, 1, 1, PADDING]
    documents = torch.tensor([owners])  # [1, S]
    seen = visible(documents, positions_in(documents), 8, None, False)[0, 0]  # [T, S]
    signs = [sign_owner(owner) for owner in owners]
    words = "Who sees whom: a query's row has a filled cell for each column it sees. V virtual, . padding."
    model, pairs = bench.model(), bench.pairs[: 10 if bench.quick else 24]
    packed = bench.pack(pairs, shuffle=False)
    alone = [bench.pack([pair], shuffle=False)[0] for pair in pairs]
    with torch.no_grad():
        losses = [average_loss(model, packed, isolated) for isolated in (True, False)]
        separate = average_loss(model, alone, True)
    difference, leak = abs(losses[0] - separate), abs(losses[1] - separate)
    claim(difference < 1e-4 < leak, "packed documents cost what they cost alone, and leak without the rule")
    return {
        "matrix": draw_matrix(seen.float().tolist(), signs, signs, [name_owner(owner) for owner in owners], words),
        "separate": separate,
        "packed": losses[0],
        "naive": losses[1],
        "difference": difference,
        "documents": len(pairs),
        "explorer": explore(bench),
    }


def explore(bench: Bench) -> Drawing:
    """Make the explorer of one packed row, with the losses of its documents in each setting."""
    found, config = {}, PrefixConfig(length=EXPLORED_PREFIX)
    batch = find_row(bench.pack(bench.pairs[:400], shuffle=False), 3)
    for prefix in ("none", "prefix"):
        model = bench.model()
        if prefix == "prefix":
            add_adapter(model, config, bench.tokenizer)
        with torch.no_grad():
            for packing in ("rule", "naive"):
                found[packing, prefix] = average_loss(model, [batch], packing == "rule")
    texts, owners = show_tokens(batch, 0, bench.tokenizer), batch.documents[0].tolist()
    return Drawing(*draw_explorer(PackedRow(texts, owners, EXPLORED_PREFIX, EXPLORED_WINDOW), found))


def find_row(batches: Batches, count: int) -> Batch:
    """The first row of `count` documents and padding."""
    return next(batch for batch in batches if len(set(batch.documents[0].tolist())) == count + 1)
