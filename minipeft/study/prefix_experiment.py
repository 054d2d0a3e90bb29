"""Why the paper's prefix-tuning did not train: start x learning rate x network, against LoRA and prompt tuning.

    cell                     = one short training run on one seed -> one row of results.json
    grid (part 1)            = start {N(0,1), normal, text} x rate {2e-4, 1e-3, 5e-3, 3e-2} x network {none, MLP}
    comparison (part 1)      = LoRA at its two rates, a text prompt at its own, as many steps

A step sees few examples (4, about 200 tokens) so that 60 steps are a run of minutes on one core; they stand side by
side in one row, isolated, which is the same as four rows without their padding. Each finished cell is a file: a run
that is stopped goes on with the next cell.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minipeft.adapters import AdapterConfig, LoRAConfig, PrefixConfig, PromptConfig, add_adapter, remove_adapter
from minipeft.adapters.own import columns_of
from minipeft.data.packing import Batch, Batches, ordered, pack, rows_of_one
from minipeft.data.pairs import Pairs, encode_pairs, split_by_question
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError
from minipeft.files import read_object, write_json
from minipeft.models import Decoder
from minipeft.training.loop import TrainConfig, train
from minipeft.training.loss import count_targets, cross_entropy
from minipeft.training.movement import Movement

RATES = (2e-4, 1e-3, 5e-3, 3e-2)
WIDTH = 512  # of the network, as Li & Liang's
BASE = "base.json"
HELD_OUT = 100  # pairs of the training file, by question, for the development loss


@dataclass(frozen=True)
class Cell:
    """One run: what is trained, how it starts, and how."""

    method: str
    learning_rate: float
    init: str | None = None  # of a prefix or prompt
    reparam: int | None = None
    steps: int = 60
    seed: int = 0
    examples: int = 4  # a step

    @property
    def name(self) -> str:
        parts = (self.method, self.init, "mlp" if self.reparam else None, f"{self.learning_rate:g}")
        return "-".join([*(part for part in parts if part), f"{self.steps}x{self.examples}", f"seed{self.seed}"])

    def adapter(self) -> AdapterConfig:
        """The config of what is trained."""
        if self.method == "lora":
            return LoRAConfig(rank=16, alpha=32)
        if self.method == "prompt":
            return PromptConfig(init=self.init or "text", reparam=self.reparam)
        if self.method == "prefix":
            return PrefixConfig(init=self.init or "text", reparam=self.reparam)
        raise InputError(f"{self.method!r} is no part of this experiment (prefix, prompt, lora)", where="method")

    def tuning(self, row: int = 200) -> dict[str, object]:
        """The same as fields of TuneConfig, for a run with checkpoints and answers: a step is one row of `row` tokens
        beside the columns, which holds about `examples` pairs."""
        fields: dict[str, object] = {"method": self.method, "learning_rate": self.learning_rate, "steps": self.steps}
        columns = 0 if self.method == "lora" else PrefixConfig().length
        if columns:
            fields |= {"init": self.init, "reparam": self.reparam}
        return {**fields, "seed": self.seed, "batch": 1, "length": row + columns}

    def training(self) -> TrainConfig:
        """The pilot's: linear decay after a tenth of warm-up, clip 1, no weight decay."""
        return TrainConfig(steps=self.steps, learning_rate=self.learning_rate, warmup=0.1, seed=self.seed)


def grid(steps: int = 60, seed: int = 0, examples: int = 4) -> list[Cell]:
    """Part 1: the 24 prefix cells and three to compare them with; those that tell most stand first."""
    first = [
        Cell("prefix", 2e-4, "peft"),
        Cell("prefix", 5e-3, "text"),
        Cell("prefix", 1e-3, "text", WIDTH),
        Cell("lora", 1e-3),
        Cell("prompt", 3e-2, "text"),
        Cell("prefix", 3e-2, "peft"),
        Cell("lora", 3e-4),
    ]
    rest = [
        Cell("prefix", rate, init, width)
        for width in (None, WIDTH)
        for init in ("peft", "text", "normal")
        for rate in RATES
    ]
    cells = dict.fromkeys([*first, *rest])
    return [Cell(c.method, c.learning_rate, c.init, c.reparam, steps, seed, examples) for c in cells]


def long_runs(steps: int = 300, seeds: int = 3, examples: int = 4) -> list[Cell]:
    """Part 2: the paper's start, ours, LoRA and prompt, longer and with several seeds."""
    kinds = [
        Cell("prefix", 2e-4, "peft"),
        Cell("prefix", 5e-3, "text"),
        Cell("prefix", 1e-3, "text", WIDTH),
        Cell("lora", 1e-3),
        Cell("prompt", 3e-2, "text"),
    ]
    return [
        Cell(c.method, c.learning_rate, c.init, c.reparam, steps, seed, examples)
        for seed in range(seeds)
        for c in kinds
    ]


class SideBySide:
    """Batch i: the next `count` examples of a shuffled epoch as documents of one row, without padding."""

    def __init__(self, rows: Batches):
        self.rows = rows  # one example a row, `count` rows a batch, shuffled by its seed

    def __getitem__(self, i: int) -> Batch:
        epoch, place = divmod(i, len(self.rows))
        count = self.rows.batch
        order = ordered(len(self.rows.rows), self.rows.seed, epoch)[place * count : (place + 1) * count]
        return self.rows.laid_out([[document for row in order.tolist() for document in self.rows.rows[row]]])


@dataclass(frozen=True)
class Data:
    """The pairs, split by question."""

    train: Pairs
    dev: Pairs
    tokenizer: Tokenizer

    @staticmethod
    def split(pairs: Pairs, tokenizer: Tokenizer, held_out: int = HELD_OUT) -> Data:
        train_pairs, dev = split_by_question(pairs, held_out)
        return Data(train_pairs, dev, tokenizer)

    def batches(self, cell: Cell, learned: int, length: int) -> SideBySide:
        rows = rows_of_one(
            encode_pairs(self.train, self.tokenizer), self.tokenizer, length=length, batch=cell.examples,
            learned=learned, seed=cell.seed, shuffle=True,
        )  # fmt: skip
        return SideBySide(rows)

    @torch.no_grad()
    def dev_loss(self, model: Decoder) -> tuple[float, float]:
        """Nats per token on the held-out pairs: over all tokens, and over the response's."""
        rows = {"length": min(512, model.config.context), "batch": 1, "learned": model.learned, "shuffle": False}
        held = encode_pairs(self.dev, self.tokenizer)
        model.eval()
        sums, counts = [0.0, 0.0], [0, 0]
        parts = [list(pack(held, self.tokenizer, loss=loss, **rows)) for loss in ("all", "response")]  # type: ignore[arg-type]
        for whole, response in zip(*parts):
            hidden = model.hidden(whole.ids, whole.documents)  # [1, T, C]
            for k, labels in enumerate((whole.labels, response.labels)):
                sums[k] += cross_entropy(hidden, model.lm_head.weight, labels).item()
                counts[k] += count_targets(labels)
        return sums[0] / counts[0], sums[1] / counts[1]


def run_cell(model: Decoder, data: Data, cell: Cell, starts: dict[object, float] | None = None) -> dict[str, object]:
    """Train one cell on a plain model, which is plain again afterwards, and return its row.

    `starts` remembers the loss at step 0, which cells of one start and seed share.
    """
    report = add_adapter(model, cell.adapter(), data.tokenizer, seed=cell.seed)
    starts = {} if starts is None else starts
    try:
        start = (cell.method, cell.init, cell.reparam, cell.seed)
        if start not in starts:
            starts[start] = data.dev_loss(model)[0]
        movement, columns = Movement.start(model), learned_columns(model)
        batches = data.batches(cell, model.learned, model.config.context)
        began, losses, tokens = time.perf_counter(), [], 0
        for step in train(model, batches, cell.training()):
            losses.append(step.loss)
            tokens += step.tokens
        seconds = time.perf_counter() - began
        loss, response = data.dev_loss(model)
        return {
            **asdict(cell),
            "trainable": report.trainable,
            "trainable_percent": report.percent,
            "stored": stored(model, cell),
            "dev_loss_start": starts[start],
            "dev_loss": loss,
            "dev_loss_response": response,
            "train_loss_last": sum(losses[-10:]) / len(losses[-10:]),
            "adapter_movement": movement.measure(model, cell.training()).as_json(),
            "columns_moved": None if columns is None else (columns_of(model) - columns).abs().max().item(),
            "train_seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
        }
    finally:
        remove_adapter(model)


def learned_columns(model: Decoder) -> torch.Tensor | None:
    """The columns of a prefix or prompt, whatever makes them; None for LoRA."""
    return columns_of(model) if model.learned else None


def stored(model: Decoder, cell: Cell) -> int:
    """The numbers that the adapter is on disk: the network that makes a prefix or prompt is not among them."""
    c, length = model.config, model.learned
    if cell.method == "prefix":
        return length * c.layers * 2 * c.kv_heads * c.head_width
    return length * c.width if length else sum(p.numel() for p in model.parameters() if p.requires_grad)


def run(model: Decoder, data: Data, cells: Sequence[Cell], folder: Path) -> Iterator[dict[str, object]]:
    """Run what is not there yet, a file `cells/NAME.json` each, and yield every cell's row in order."""
    starts: dict[object, float] = {}
    for cell in cells:
        file = folder / "cells" / f"{cell.name}.json"
        if file.exists():
            row = read_object(file)
            if {name: row.get(name) for name in asdict(cell)} != asdict(cell):
                raise InputError("is another cell's row", file=file, hint="Choose another folder")
        else:
            row = run_cell(model, data, cell, starts)
            write_json(file, row)
        yield row


def base_row(model: Decoder, data: Data, folder: Path) -> dict[str, object]:
    """The untrained model, for comparison; measured once."""
    if not (folder / BASE).exists():
        loss, response = data.dev_loss(model)
        write_json(folder / BASE, {"method": "none", "dev_loss": loss, "dev_loss_response": response})
    return read_object(folder / BASE)


def collect(folder: Path, about: dict[str, object]) -> dict[str, Any]:
    """All rows that are there, as results.json holds them: {"about": ..., "cells": [...]}, best first."""
    rows = [json.loads(file.read_text()) for file in sorted((folder / "cells").glob("*.json"))]
    return {"about": about, "cells": sorted(rows, key=lambda row: row["dev_loss"])}


def as_markdown(results: dict[str, Any]) -> str:
    """The rows of results.json as tables: prefixes by start and rate, then everything else."""
    about, rows = results["about"], results["cells"]
    base, dead = about["base"]["dev_loss"], "dead adapter"
    grids = sorted({(row["init"], bool(row["reparam"])) for row in rows if row["method"] == "prefix"}, reverse=True)
    lines = [
        f"Held-out loss of {about['model']}: nats per token of {about['dev_pairs']} pairs; {base:.3f} untrained.",
        "In brackets: at step 0. D: the dead-adapter check says that the start could not be left.",
        "",
        "| prefix, start | " + " | ".join(f"{rate:g}" for rate in RATES) + " |",
        "|---" * (len(RATES) + 1) + "|",
    ]
    for init, network in grids:
        cells = []
        for rate in RATES:
            found = [
                f"{row['dev_loss']:.3f} ({row['dev_loss_start']:.2f})"
                + (" D" if any(w.startswith(dead) for w in row["adapter_movement"]["warnings"]) else "")
                for row in rows
                if (row["method"], row["init"], bool(row["reparam"]), row["learning_rate"])
                == ("prefix", init, network, rate)
            ]
            cells.append(", ".join(found) or "not run")
        lines.append(f"| {init}{' + MLP' if network else ''} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| all, best first | steps | seed | loss | response | stored | columns moved by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        what = " ".join(str(part) for part in (row["method"], row["init"], "+ MLP" if row["reparam"] else "") if part)
        moved = "" if row["columns_moved"] is None else f"{row['columns_moved']:.2g}"
        numbers = f"{row['dev_loss']:.3f} | {row['dev_loss_response']:.3f} | {row['stored']:,} | {moved}"
        lines.append(f"| {what} at {row['learning_rate']:g} | {row['steps']} | {row['seed']} | {numbers} |")
    return "\n".join([*lines, "", f"`{about['command']}`", ""])
