"""The packed-attention explorer: a row as it was packed, and for each token the columns that it sees.

The masks of all settings are computed by `documents.visible` when the page is built, packed to bits, and only looked up
by the page's script: what the page shows is what the models compute.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minipeft.documents import PADDING, VIRTUAL, positions_in, visible
from minipeft.study.charts import escape
from minipeft.tour.drawings import name_owner, show_blanks
from minipeft.tour.values import Drawing

SWITCHES = {  # name -> (label, the settings with their labels); the first setting is shown at first
    "packing": ("Packing", {"rule": "documents isolated", "naive": "naive: all that came before"}),
    "prefix": ("Prefix", {"none": "none", "prefix": "virtual tokens in front"}),
    "window": ("Sliding window", {"none": "none", "window": "the last tokens only"}),
}
Setting = tuple[str, ...]  # one of each switch


@dataclass(frozen=True)
class Row:
    """A packed row: the text and document of each column; the virtual tokens and the window that can be switched on."""

    texts: Sequence[str]
    owners: Sequence[int]
    virtual_tokens: int
    window: int


def compute_masks(row: Row) -> dict[Setting, torch.Tensor]:
    """Compute who sees whom in each setting. -> [T, P + T] each; without a prefix the first P columns are unseen"""
    found = {}
    for setting in itertools.product(*(settings for _, settings in SWITCHES.values())):
        packing, prefix, window = setting
        owners = list(row.owners) if packing == "rule" else [PADDING if o == PADDING else 0 for o in row.owners]
        front = [VIRTUAL] * row.virtual_tokens if prefix == "prefix" else []
        documents = torch.tensor([front + owners])  # [1, S]
        limit = row.window if window == "window" else None
        seen = visible(documents, positions_in(documents), len(owners), limit, False)[0, 0]  # [T, S]
        missing = row.virtual_tokens - len(front)
        found[setting] = torch.nn.functional.pad(seen, (missing, 0))  # [T, P + T]
    return found


def count_leaks(row: Row, seen: torch.Tensor) -> int:
    """Count the pairs of a token and a token of another document that it sees. seen [T, P + T]"""
    owners = torch.tensor(row.owners)
    other = (owners[:, None] != owners[None, :]) & (owners[:, None] != PADDING) & (owners[None, :] != PADDING)
    return int((other & seen[:, row.virtual_tokens :]).sum())


def draw_explorer(row: Row, losses: Mapping[tuple[str, str], float]) -> Drawing:
    """Draw the row with its switches. `losses`: nats per supervised token, by packing and prefix."""
    masks = compute_masks(row)
    bits = {"/".join(setting): pack_bits(seen) for setting, seen in masks.items()}
    data = {
        "masks": bits,
        "owners": list(row.owners),
        "virtual": row.virtual_tokens,
        "leaks": {"/".join(setting): count_leaks(row, seen) for setting, seen in masks.items()},
    }
    switches = "".join(draw_switch(name, *switch) for name, switch in SWITCHES.items())
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
    return Drawing(
        f'<div class="explorer" data-explorer="{escape(json.dumps(data))}"><form hidden>{switches}</form>'
        f'<div class="cells" role="listbox" aria-label="Tokens of the row">{front}{cells}</div>'
        '<p class="said" aria-live="polite">Point at a token, or move with the arrow keys.</p>'
        f'<ul class="losses">{lines}</ul></div>',
        words,
    )


def draw_switch(name: str, label: str, settings: Mapping[str, str]) -> str:
    """Draw a switch as radio buttons."""
    buttons = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" if place == 0 else ""}> {text}</label>'
        for place, (value, text) in enumerate(settings.items())
    )
    return f"<fieldset><legend>{label}</legend>{buttons}</fieldset>"


def pack_bits(seen: torch.Tensor) -> str:
    """Pack a mask to bits, row by row, in base64. [T, S]"""
    return base64.b64encode(np.packbits(seen.numpy().reshape(-1)).tobytes()).decode()
