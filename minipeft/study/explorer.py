"""The packed-attention explorer: a row as it was packed, and for each token the columns that it sees.

`documents.visible` computes the masks of all settings when the page is made; the page's script only looks them up. A
mask's line is a list of runs [start, end, start, end, ...] of seen columns: a token sees few of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from minipeft.data.packing import Batch
from minipeft.data.tokens import Tokenizer
from minipeft.documents import PADDING, VIRTUAL, positions_in, visible
from minipeft.models import Decoder
from minipeft.models.loss import count_targets
from minipeft.study.charts import escape

COLOURS = 3  # of documents, repeated
SWITCHES = {  # name -> (label, the settings with their labels); the first setting is shown at first
    "packing": ("Packing", {"rule": "documents isolated", "naive": "naive: all that came before"}),
    "prefix": ("Prefix", {"none": "none", "prefix": "virtual tokens in front"}),
    "window": ("Sliding window", {"none": "none", "window": "the last tokens only"}),
}
FIRST = {name: next(iter(settings)) for name, (_, settings) in SWITCHES.items()}
Setting = tuple[str, ...]  # one of each switch


@dataclass(frozen=True)
class PackedRow:
    """The text and document of each column, and the virtual tokens and sliding window of the model.

    `windowed`: the window hides virtual tokens too.
    """

    texts: Sequence[str]
    owners: Sequence[int]
    virtual_tokens: int = 0
    window: int | None = None
    windowed: bool = False

    @property
    def switches(self) -> list[str]:
        """The switches that have an effect: packing needs several documents, a prefix needs virtual tokens."""
        several = len({owner for owner in self.owners if owner != PADDING}) > 1
        fits = {"packing": several, "prefix": self.virtual_tokens > 0, "window": self.window is not None}
        return [name for name in SWITCHES if fits[name]]


def compute_masks(row: PackedRow) -> dict[Setting, torch.Tensor]:
    """Compute who sees whom in each setting. -> [T, P + T] each; without a prefix the first P columns are unseen"""
    found, choices = {}, [SWITCHES[name][1] if name in row.switches else (FIRST[name],) for name in SWITCHES]
    for setting in itertools.product(*choices):
        packing, prefix, window = setting
        owners = list(row.owners) if packing == "rule" else [PADDING if o == PADDING else 0 for o in row.owners]
        front = [VIRTUAL] * row.virtual_tokens if prefix == "prefix" else []
        documents = torch.tensor([front + owners])  # [1, S]
        limit = row.window if window == "window" else None
        seen = visible(documents, positions_in(documents), len(owners), limit, row.windowed)[0, 0]  # [T, S]
        missing = row.virtual_tokens - len(front)
        found[setting] = torch.nn.functional.pad(seen, (missing, 0))  # [T, P + T]
    return found


def count_leaks(row: PackedRow, seen: torch.Tensor) -> int:
    """Count the pairs of a token and a token of another document that it sees. seen [T, P + T]"""
    owners = torch.tensor(row.owners)
    other = (owners[:, None] != owners[None, :]) & (owners[:, None] != PADDING) & (owners[None, :] != PADDING)
    return int((other & seen[:, row.virtual_tokens :]).sum())


def draw_explorer(row: PackedRow, losses: Mapping[tuple[str, str], float]) -> tuple[str, str]:
    """Draw the row with its switches; returns HTML, and the same in words.

    `losses`: nats per supervised token, by packing and prefix.
    """
    masks = compute_masks(row)
    data = {
        "runs": {"/".join(setting): list_runs(seen) for setting, seen in masks.items()},
        "first": FIRST,
        "owners": list(row.owners),
        "virtual": row.virtual_tokens,
        "leaks": {"/".join(setting): count_leaks(row, seen) for setting, seen in masks.items()},
    }
    switches = "".join(draw_switch(name, *SWITCHES[name]) for name in row.switches)
    front = "".join(f'<b class="dv" data-c="{c}">V</b>' for c in range(row.virtual_tokens))
    cells = "".join(
        f'<b class="{name_owner(owner)}" data-c="{place + row.virtual_tokens}" role="option" '
        f'tabindex="{0 if place == 0 else -1}">{escape(show_blanks(text))}</b>'
        for place, (text, owner) in enumerate(zip(row.texts, row.owners))
    )
    lines = "".join(
        f'<li data-loss="{packing}/{prefix}">{SWITCHES["packing"][1][packing]}, '
        f'{"with a prefix" if prefix == "prefix" else "no prefix"}: <span class="n">{loss:.4f}</span> nats</li>'
        for (packing, prefix), loss in losses.items()
    )
    words = "Explorer of a packed row: choose a token, and the tokens that it sees are filled. "
    words += "; ".join(f"{packing}, {prefix}: {loss:.4f} nats" for (packing, prefix), loss in losses.items())
    html = (
        f'<div class="explorer" data-explorer="{escape(json.dumps(data, separators=(",", ":")))}">'
        f'<form hidden>{switches}</form><div class="cells" role="listbox" aria-label="Tokens of the row">{front}{cells}'
        '</div><p class="said" aria-live="polite">Point at a token, or move with the arrow keys.</p>'
        f'<ul class="losses">{lines}</ul></div>'
    )
    return html, words


def draw_switch(name: str, label: str, settings: Mapping[str, str]) -> str:
    """Draw a switch as radio buttons."""
    buttons = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" if place == 0 else ""}> {text}</label>'
        for place, (value, text) in enumerate(settings.items())
    )
    return f"<fieldset><legend>{label}</legend>{buttons}</fieldset>"


def list_runs(seen: torch.Tensor) -> list[list[int]]:
    """List the runs of seen columns of each token, as start, end, start, end, ... [T, S]"""
    edges = torch.nn.functional.pad(seen.int(), (1, 1)).diff(dim=1) != 0  # [T, S + 1]
    return [line.nonzero()[:, 0].tolist() for line in edges]


def show_tokens(batch: Batch, row: int, tokenizer: Tokenizer) -> list[str]:
    """The text of each token of a row; "." for padding."""
    pairs = zip(batch.ids[row].tolist(), batch.documents[row].tolist())
    return ["." if owner == PADDING else tokenizer.decode([token], skip_special=False) for token, owner in pairs]


def average_loss(model: Decoder, batches: Iterable[Batch], isolated: bool) -> float:
    """Nats per supervised token over all batches, with or without the documents of each row."""
    total, targets = 0.0, 0
    for batch in batches:
        total += model.loss(batch.ids, batch.labels, batch.documents if isolated else None).item()
        targets += count_targets(batch.labels)
    return total / targets


def name_owner(owner: int) -> str:
    """The class of a column's owner in explorer.css."""
    return {PADDING: "dp", VIRTUAL: "dv"}.get(owner, f"d{owner % COLOURS}")


def show_blanks(text: str) -> str:
    """Make blanks and line ends visible."""
    return text.replace(" ", "·").replace("\n", "↵")
