"""The style and script of the tour, for its page and for a drawing that a notebook shows in a frame."""

from __future__ import annotations

import html
from pathlib import Path

from minipeft.files import read_text
from minipeft.study import charts

HERE, STUDY = Path(__file__).parent, Path(charts.__file__).parent
FIT = "this.style.height=this.contentDocument.documentElement.scrollHeight+'px'"


def read_style() -> str:
    """The style sheet: the study's and the explorer's, then the tour's."""
    return read_text(STUDY / "page.css") + read_text(STUDY / "explorer.css") + read_text(HERE / "page.css")


def read_script() -> str:
    """The script: the list of stops, and the explorer."""
    return read_text(HERE / "page.js") + read_explorer()


def read_explorer() -> str:
    """The script of the explorer."""
    return read_text(STUDY / "explorer.js")


def frame(drawing: str) -> str:
    """Render a drawing in a frame of its own: the notebook's style does not reach it, nor its style the notebook."""
    page = (
        f"<!doctype html><meta charset='utf-8'><style>{read_style()}body{{display:block;padding:4px}}</style>"
        f"<body>{charts.PATTERNS}<main><figure class='drawing'>{drawing}</figure></main>"
        f"<script>{read_explorer()}</script>"
    )
    return f'<iframe srcdoc="{html.escape(page)}" style="border:0;width:100%;height:300px" onload="{FIT}"></iframe>'
