"""Survey a data set before training: what `minipeft data` prints.

Examples with their supervised tokens, token counts, truncation, and held-out rows that are also trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from minipeft.data.encoded import Encoded
from minipeft.data.packing import LENGTH, PackConfig, PackReport, pack
from minipeft.data.rows import cut_each
from minipeft.data.streaming import EncodedData
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError, check_fields, escape, option
from minipeft.hub import fetch
from minipeft.models.checkpoint import read_config
from minipeft.runs.config import DataConfig, ModelConfig
from minipeft.runs.preparation import prepare

PERCENTILES = (0, 25, 50, 75, 95, 99, 100)
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"  # on a terminal; elsewhere brackets mark the supervised text


@dataclass(frozen=True)
class SurveyConfig:
    """Settings of a survey."""

    model: ModelConfig
    data: DataConfig
    packing: PackConfig = field(default_factory=PackConfig)
    show: int = option(3, "examples to show", least=0)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Survey:
    """The counts of a data set; `lengths` are percentiles of tokens, `examples` are runs of (text, supervised)."""

    file: str
    rows: int
    format: str
    lengths: dict[str, int]
    length: int
    packed: PackReport
    repeated: int
    held_out: int | None
    shared: int | None
    notes: tuple[str, ...]
    examples: tuple[list[tuple[str, bool]], ...]

    def as_json(self) -> dict[str, Any]:
        """The counts, without the examples."""
        return {name: value for name, value in asdict(self).items() if name != "examples"}

    def as_text(self, colour: bool) -> str:
        """Format the examples and the counts for a terminal."""
        first, last = (GREEN, PLAIN) if colour else ("[", "]")
        lines = []
        for number, runs in enumerate(self.examples, start=1):
            text = "".join(f"{first}{show(run)}{last}" if trained else show(run) for run, trained in runs)
            place = "in green" if colour else "in [brackets]"
            lines += [f"---- example {number}; supervised is the text {place}", text]
        spread = ", ".join(f"{name} {tokens:,}" for name, tokens in self.lengths.items())
        lines += ["----", f"{self.file}: {self.rows:,} rows of {show(self.format)}", f"tokens of an example: {spread}"]
        lines += [f"at --length {self.length}: {self.packed}"]
        lines.append(f"{self.repeated:,} rows repeat an earlier one")
        if self.held_out is not None:
            lines.append(f"{self.shared:,} of the {self.held_out:,} rows held out are also trained on")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def survey(config: SurveyConfig) -> Survey:
    """Read and encode a data set as training would.

    Raises:
        InputError: as training would.
    """
    prepared = prepare(config.model, config.data)
    data, tokenizer = prepared.data, prepared.tokenizer
    encoded = data.examples
    base = read_config(fetch(config.model.source, ["config.json"], revision=config.model.revision) / "config.json")
    length = config.packing.length or min(LENGTH, base.context)
    packed = pack(encoded, tokenizer, length=length, batch=config.packing.batch, loss_mask=config.packing.loss_mask)
    held_out, shared, notes = measure_split(data, config.data.held_out)
    found = np.percentile(encoded.lengths, PERCENTILES, method="lower").tolist()
    return Survey(
        file=data.file,
        rows=len(data),
        format=str(data.format),
        lengths={f"{percent} %": int(tokens) for percent, tokens in zip(PERCENTILES, found)},
        length=length,
        packed=packed.report,
        repeated=data.repeated,
        held_out=held_out,
        shared=shared,
        notes=(*data.notes, *notes),
        examples=tuple(find_runs(encoded, number, config.packing.loss_mask, length, tokenizer)
                       for number in range(min(config.show, len(encoded)))),
    )  # fmt: skip


def measure_split(data: EncodedData, wanted: int) -> tuple[int | None, int | None, Sequence[str]]:
    """Count held-out rows and those that are also trained on, and report what training would refuse."""
    if not wanted:
        return None, None, ()
    try:
        _, held_out, shared = data.hold_out(wanted)
    except InputError as error:
        return None, None, (f"training would refuse --held-out {wanted}: {error}",)
    return len(held_out), shared, ()


def find_runs(encoded: Encoded, number: int, mask: str, length: int, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Split an example's text into runs of supervised and other tokens; tokens that are cut off are left out."""
    documents = cut_each(encoded, mask == "response" or encoded.trained is not None, length)
    start = int(documents.starts[number])
    targets = documents.find_targets(start, start + int(documents.lengths[number])).tolist()
    ids = documents[number][0].tolist()
    edges = [0, *(n for n in range(1, len(ids)) if targets[n] != targets[n - 1]), len(ids)]
    return list(decode_runs(ids, targets, edges, tokenizer))


def decode_runs(
    ids: list[int], targets: list[bool], edges: list[int], tokenizer: Tokenizer
) -> Iterator[tuple[str, bool]]:
    """Decode the text between each two edges, as part of the whole text."""
    before = ""
    for begin, end in pairwise(edges):
        whole = tokenizer.decode(ids[:end], skip_special=False)
        own = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[begin:end], skip_special=False)
        yield own, targets[begin]
        before = whole


def show(text: str) -> str:
    """Escape the unprintable characters of a text, except line breaks."""
    return "\n".join(escape(line) for line in text.split("\n"))
