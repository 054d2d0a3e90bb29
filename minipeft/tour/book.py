"""Build the tour: read the stops, compute their numbers, and write one HTML page and one Markdown file.

The page is self-contained: style, script and drawings are inside, a content security policy blocks every request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipeft.errors import InputError, check_fields, check_path, option
from minipeft.files import write_whole
from minipeft.runs.folder import check_folder
from minipeft.study import charts
from minipeft.tour.bench import Bench
from minipeft.tour.measures import MEASURES
from minipeft.tour.notebooks import require_nbformat, write_notebook
from minipeft.tour.page import read_script, read_style
from minipeft.tour.sources import find_source, mark_syntax
from minipeft.tour.stops import DIRECTIVE, Measured, Stop, fill, read_stops, show_inline
from minipeft.tour.values import Drawing, Output, Plain, Table, Value, show

TITLE = "How parameter-efficient fine-tuning works"
HELD = re.compile("\ue000(\\d+)\ue001")  # the place of a value in rendered text: private characters of Unicode


@dataclass(frozen=True)
class TourConfig:
    """Where the tour goes, and how long its stops train."""

    out: str = option("tour", "folder of tour.html and tour.md")
    notebooks: str | None = option(None, "also write each stop as a Jupyter notebook to this folder")
    quick: bool = option(False, "train for fewer steps; every number is still computed")

    def __post_init__(self) -> None:
        check_fields(self)


def build_tour(config: TourConfig, say: Callable[[str], None] = print) -> list[Path]:
    """Compute all stops and write tour.html, tour.md and, if asked for, the notebooks; returns their paths.

    Raises:
        InputError: a folder cannot be written, markdown-it-py or nbformat is not installed, a stop's text and its
            values do not fit, or a sentence no longer holds (values.claim).
    """
    folder, books = check_path(config.out, "out"), config.notebooks and check_path(config.notebooks, "notebooks")
    render = load_markdown()
    if books:
        require_nbformat()
    for wanted in (books, folder) if books else (folder,):
        check_folder(wanted)  # before a minute of work
    start, bench, measured = time.monotonic(), Bench(config.quick), []
    for stop in read_stops():
        measured.append(measure_stop(stop, bench))
        say(f"{stop.number:2}  {stop.title}  ({time.monotonic() - start:.0f} s)")
    files = {"tour.html": draw_book(measured, render), "tour.md": write_markdown(measured)}
    for name, text in files.items():
        write_whole(folder / name, lambda stream, text=text: stream.write(text.encode()))  # type: ignore[misc]
    written = [folder / name for name in files]
    return written + [write_notebook(books, one, config.quick) for one in measured if books]


def load_markdown() -> Callable[[str], str]:
    """Return the function that renders Markdown as HTML.

    Raises:
        InputError: markdown-it-py is not installed.
    """
    try:
        library: Any = importlib.import_module("markdown_it")
    except ModuleNotFoundError as error:
        raise InputError("needs markdown-it-py", where="tour", hint="pip install minipeft[docs]") from error
    render: Callable[[str], str] = library.MarkdownIt("commonmark", {"html": False}).enable("table").render
    return render


def measure_stop(stop: Stop, bench: Bench) -> Measured:
    """Run the stop's function and compare the names that it returns with those that the text shows.

    Raises:
        InputError: the text shows a value that is not computed, or leaves one out.
    """
    if stop.name not in MEASURES:
        raise InputError(f"no function in tour/measures computes the values of {stop.name!r}", file=stop.file)
    torch.manual_seed(0)
    values = MEASURES[stop.name](bench)
    if missing := sorted(stop.used() - values.keys()):
        raise InputError(f"shows {missing[0]!r}, which is not among {sorted(values)}", file=stop.file)
    if unused := sorted(values.keys() - stop.used()):
        raise InputError(f"does not show {unused[0]!r}, which is computed", file=stop.file)
    return Measured(stop, values)


def draw_book(measured: Sequence[Measured], render: Callable[[str], str]) -> str:
    """Render the page."""
    style, script = read_style(), read_script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    entries = "".join(f'<li><a href="#{m.stop.name}">{html.escape(drop_code(m.stop.title))}</a></li>' for m in measured)
    sections = "".join(draw_stop(one, render) for one in measured)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{style}</style></head>\n<body>{charts.PATTERNS}"
        f'<header><h1>minipeft</h1><p class="verdict">{TITLE}</p>{render(introduce(len(measured)))}</header>'
        f'<nav aria-label="Stops"><details open><summary>Stops</summary><ol>{entries}</ol></details></nav>'
        f"<main>{sections}</main>\n<script>{script}</script></body></html>\n"
    )


def introduce(count: int) -> str:
    """The text above the first stop."""
    return (
        f"{count} stops, in the order in which a text becomes an answer. Each shows the very functions that run in "
        "this library, taken from its source when the page was built, and numbers that were computed then, on the demo "
        "model that comes with it: `minipeft tour` builds the page again. A number is underlined with dots if the "
        "build computed it, and the build fails on any other."
    )


def draw_stop(measured: Measured, render: Callable[[str], str]) -> str:
    """Render a stop."""
    stop, parts = measured.stop, []
    for block in stop.blocks:
        if block.kind == "text":
            parts.append(render_text(block.text, measured.values, render))
        elif block.kind == "math":
            parts.append(f'<pre class="math">{html.escape(block.text)}</pre>')
        elif block.kind == "source":
            parts.append(draw_source(block.text))
        else:
            parts.append(draw_value(measured.values[block.text], block.form))
    title = render(stop.title).strip().removeprefix("<p>").removesuffix("</p>")
    return f'<section id="{stop.name}"><h2><span>{stop.number}</span> {title}</h2>{"".join(parts)}</section>'


def render_text(text: str, values: Mapping[str, Value], render: Callable[[str], str]) -> str:
    """Render Markdown with values in it, each marked as computed."""
    shown: list[str] = []

    def hold(match: re.Match[str]) -> str:
        shown.append(show_inline(match[1], values))
        return f"\ue000{len(shown) - 1}\ue001"

    page = render(DIRECTIVE.sub(hold, text))
    return HELD.sub(lambda match: f'<span class="n">{html.escape(shown[int(match[1])])}</span>', page)


def draw_source(name: str) -> str:
    """Render a definition with its name and its place in the repository."""
    source = find_source(name)
    code = "".join(
        f'<i class="{kind}">{html.escape(text)}</i>' if kind else html.escape(text)
        for text, kind in mark_syntax(source.text)
    )
    place = f"{source.file}, line {source.line}"
    return (
        f'<figure class="source"><figcaption><code>{name}</code> <span class="soft">{place}</span></figcaption>'
        f'<pre tabindex="0">{code}</pre></figure>'
    )


def draw_value(value: Value, form: str) -> str:
    """Render a value that stands alone."""
    if isinstance(value, Drawing):
        return f'<figure class="drawing" aria-label="{html.escape(value.words)}">{value.html}</figure>'
    if isinstance(value, Output):
        return f'<pre class="output" tabindex="0">{html.escape(value.text)}</pre>'
    if isinstance(value, Table):
        head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in value.head)
        rows = "".join(f"<tr>{''.join(draw_cell(place, cell) for place, cell in enumerate(row))}</tr>"
                       for row in value.rows)  # fmt: skip
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f'<div class="scroll" tabindex="0">{table}</div>'
    return f'<p><span class="n">{html.escape(show(value, form))}</span></p>'


def draw_cell(place: int, cell: Plain) -> str:
    """Render a cell; the first of a row names it."""
    return f'<th scope="row">{html.escape(show(cell))}</th>' if place == 0 else f"<td>{html.escape(show(cell))}</td>"


def drop_code(title: str) -> str:
    return title.replace("`", "")


def write_markdown(measured: Sequence[Measured]) -> str:
    """Write the same book as Markdown; a drawing is replaced by its words."""
    parts = [f"# {TITLE}\n\n{introduce(len(measured))}"]
    for one in measured:
        parts.append(f"## {one.stop.number}. {one.stop.title}")
        for block in one.stop.blocks:
            if block.kind == "text":
                parts.append(fill(block.text, one.values))
            elif block.kind == "math":
                parts.append(f"```text\n{block.text}\n```")
            elif block.kind == "source":
                parts.append(find_source(block.text)._repr_markdown_())
            else:
                parts.append(write_value(one.values[block.text], block.form))
    return "\n\n".join(parts) + "\n"


def write_value(value: Value, form: str) -> str:
    """Write a value that stands alone as Markdown."""
    if isinstance(value, Drawing):
        return f"*Figure: {value.words}*"
    if isinstance(value, Output):
        return f"```text\n{value.text}\n```"
    if isinstance(value, Table):
        return value._repr_markdown_()
    return show(value, form)
