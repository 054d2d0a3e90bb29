"""The report's explorer: the first rows that one cell was trained on, packed again from the study's own data.

    model of config.json on the meta device, tokenizer, data/train.jsonl -> the training's batches -> the first rows

A cell with virtual tokens comes first. The losses are measured on the CPU, of a model with at most MOST_MEASURED
parameters: a second or two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from minipeft.adapters.peft_format import load_adapter
from minipeft.data.packing import Batch, Batches
from minipeft.data.tokens import Tokenizer
from minipeft.documents import PADDING
from minipeft.errors import InputError
from minipeft.files import read_object
from minipeft.hub import fetch
from minipeft.models import Decoder
from minipeft.models.checkpoint import read_config
from minipeft.runs.config import RunConfig
from minipeft.runs.planning import adapt_on_meta
from minipeft.runs.preparation import load_given, pack_data, prepare
from minipeft.study.cells import CELL, Cell
from minipeft.study.charts import escape
from minipeft.study.explorer import PackedRow, average_loss, draw_explorer, show_tokens
from minipeft.study.rows import Results

MOST_ROWS, MOST_COLUMNS = 3, 1200  # of the page, the columns of all rows together; one row is shown in any case
MOST_PAIRS = 20_000  # of the training set: more would take longer to encode than the rest of the report
MOST_MEASURED = 20_000_000  # parameters of a model whose losses are measured


@dataclass(frozen=True)
class Trained:
    """A cell with its training run."""

    name: str
    run: RunConfig
    folder: Path


def draw_packed_rows(results: Results, out: Path, called: dict[str, str]) -> tuple[str, str]:
    """Draw the rows; returns HTML and a caption, both "" where there is nothing to show.

    `called`: the name of each cell.
    """
    cell = choose_cell(results, out, called)
    if cell is None or read_object(out / "study.json")["train"] > MOST_PAIRS:
        return "", ""
    try:
        batches, model, tokenizer = pack_again(cell.run, out)
        rows = list(take_rows(batches))
        losses = measure_losses(cell, model, rows)
    except InputError as error:  # the model was moved or changed since
        return f"<p>{escape(f'The rows cannot be packed again: {error}')}</p>", "What each token of a row sees."
    drawn = [draw_explorer(describe_row(row, model, tokenizer), found)[0] for row, found in zip(rows, losses)]
    return "".join(drawn), write_caption(cell, len(rows), any(losses), model.virtual_tokens)


def choose_cell(results: Results, out: Path, called: dict[str, str]) -> Trained | None:
    """Choose the first trained cell, one with virtual tokens before the others."""
    trained = [row for row in results.cells if row.error is None and row.training.steps and row.cell in called]
    trained = [row for row in trained if (out / "cells" / row.cell / CELL).exists()]
    if not trained:
        return None
    row = next((row for row in trained if row.training.init is not None), trained[0])
    folder = out / "cells" / row.cell
    run = Cell.from_json(read_object(folder / CELL)).run
    assert run is not None
    return Trained(called[row.cell], run, folder)


def pack_again(run: RunConfig, out: Path) -> tuple[Batches, Decoder, Tokenizer]:
    """The batches of a cell's training, its model without values, and its tokenizer."""
    given = run.model
    config = read_config(fetch(given.source, ["config.json"], revision=given.revision) / "config.json")
    model, _ = adapt_on_meta(config, run.adapter, torch.float32)
    prepared = prepare(given, replace(run.data, source=str(out / run.data.source), token_cache=None))
    return pack_data(run, model, prepared, lambda line: None)[0], model, prepared.tokenizer


def take_rows(batches: Batches) -> Iterator[Batch]:
    """The first rows, each as a batch of its own."""
    most = max(1, min(MOST_ROWS, MOST_COLUMNS // batches.width))
    every = (batch for number in range(len(batches)) for batch in split_batch(batches[number]))
    return islice(every, most)


def split_batch(batch: Batch) -> Iterator[Batch]:
    """Each row of a batch."""
    for row in range(len(batch.ids)):
        yield Batch(*(tensor[row : row + 1] for tensor in (batch.ids, batch.labels, batch.documents)))


def describe_row(row: Batch, model: Decoder, tokenizer: Tokenizer) -> PackedRow:
    """What the explorer shows of a row; a window as long as the row hides nothing."""
    owners = row.documents[0].tolist()
    window = min((size for size in model.windows if size is not None and size < len(owners)), default=None)
    return PackedRow(show_tokens(row, 0, tokenizer), owners, model.virtual_tokens, window, model.windowed)


@torch.no_grad()
def measure_losses(cell: Trained, model: Decoder, rows: list[Batch]) -> list[dict[tuple[str, str], float]]:
    """Of each row the loss of the untrained model and, of a cell with virtual tokens, of the tuned one; with the
    documents isolated and, where there are several, without. {} for a large or quantized model."""
    if cell.run.model.quantize is not None or sum(p.numel() for p in model.parameters()) > MOST_MEASURED:
        return [{} for _ in rows]
    found: list[dict[tuple[str, str], float]] = [{} for _ in rows]
    loaded = load_given(replace(cell.run.model, device="cpu", dtype=None), torch.float32).eval()
    for prefix in ("none", "prefix"):
        if prefix == "prefix":
            if not model.virtual_tokens:
                break
            load_adapter(loaded, cell.folder / "run" / "adapter")
        for row, losses in zip(rows, found):
            several = len(set(row.documents[0].tolist()) - {PADDING}) > 1
            for packing in ("rule", "naive") if several else ("rule",):
                losses[packing, prefix] = average_loss(loaded, [row], packing == "rule")
    return found


def write_caption(cell: Trained, rows: int, measured: bool, virtual_tokens: int) -> str:
    """Say whose rows these are, and which losses."""
    said = "the first row" if rows == 1 else f"the first {rows} rows"
    parts = [f"{cell.name}: {said} of its training, as packed. Choose a token to see the tokens it attends to."]
    if not cell.run.packing.isolate:
        parts.append("This study joins documents without isolating them.")
    if measured:
        tuned = " and, with virtual tokens, of the tuned one" if virtual_tokens else ""
        parts.append(f"Losses of the untrained model{tuned}, in nats per supervised token.")
    return " ".join(parts)
