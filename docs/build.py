"""Build the documentation as HTML: each Markdown page, and the API reference, which pdoc makes from the docstrings.

    pip install '.[docs]' && python docs/build.py --out site

A page keeps its place (docs/data.md becomes docs/data.html, README.md index.html), and the files that pages link to are
copied. A link that leads to no file, or to no heading or name in it, ends the build with status 1.
"""

import argparse
import dataclasses
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pdoc.doc
import pdoc.render
from markdown_it import MarkdownIt
from markdown_it.token import Token

import minipeft

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "kernels/README.md", "results/*/*.md")
REFERENCE = (  # the public names, and the modules of the types in their signatures
    "minipeft",
    "minipeft.adapters.inits",
    "minipeft.adapters.verdict",
    "minipeft.data.chat",
    "minipeft.data.encoded",
    "minipeft.data.forms",
    "minipeft.data.packing",
    "minipeft.data.tokens",
    "minipeft.metrics.bleu",
    "minipeft.metrics.codebleu",
    "minipeft.models.decoder",
    "minipeft.training.processes",
    "minipeft_kernels",
)
STYLE = """:root{color-scheme:light dark;--ink:#1a1f26;--back:#fff;--line:#d5dae1;--card:#f6f8fa;--link:#1f5f9e}
@media(prefers-color-scheme:dark){:root{--ink:#e5e9ee;--back:#13161a;--line:#363d47;--card:#1b2026;--link:#7cb1ea}}
body{margin:0 auto;max-width:900px;padding:16px 20px 64px;background:var(--back);color:var(--ink);
font:16px/1.55 system-ui,sans-serif;overflow-wrap:break-word}nav{font-size:14px}a{color:var(--link)}img{max-width:100%}
pre,code{font:14px/1.45 ui-monospace,Menlo,monospace;background:var(--card)}code{padding:1px 3px;border-radius:4px}
pre{padding:12px 14px;border-radius:6px;overflow-x:auto}pre code{padding:0}h2{margin-top:36px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:14px}
th,td{padding:5px 10px;border:1px solid var(--line);vertical-align:top;min-width:3em}th{background:var(--card)}"""


def list_pages(root: Path) -> list[Path]:
    """The Markdown pages, relative to `root`."""
    return [file.relative_to(root) for pattern in PAGES for file in sorted(root.glob(pattern))]


def build_pages(root: Path, site: Path) -> None:
    """Render each page, and copy the files that it links to."""
    pages = list_pages(root)
    for page in pages:
        tokens = parse((root / page).read_text(encoding="utf-8"))
        for token, name in list_links(tokens):
            target = urlsplit(str(token.attrs[name]))
            if target.scheme or not target.path:
                continue
            file = Path(os.path.normpath(page.parent / unquote(target.path)))
            if file in pages:
                path = os.path.relpath(place(file), page.parent)
                token.attrs[name] = target._replace(path=path).geturl()
            elif (root / file).is_file() and file.parts[0] != "..":
                write(site / file, (root / file).read_bytes())
        write(site / place(page), draw_page(page, tokens).encode())


def place(page: Path) -> Path:
    """Where a page lies in the site."""
    return Path("index.html") if page == Path("README.md") else page.with_suffix(".html")


def parse(text: str) -> list[Token]:
    """Parse Markdown; each heading gets the id that GitHub gives it."""
    tokens, seen = MARKDOWN.parse(text), dict[str, int]()
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            title = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            seen[anchor] = seen.get(anchor, -1) + 1
            opening.attrs["id"] = f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor
    return tokens


def list_links(tokens: list[Token]) -> Iterator[tuple[Token, str]]:
    """Each link and image, with the name of its address."""
    for token in tokens:
        for child in token.children or ():
            name = {"link_open": "href", "image": "src"}.get(child.type)
            if name is not None:
                yield child, name


def draw_page(page: Path, tokens: list[Token]) -> str:
    title = next((b.content for a, b in pairwise(tokens) if a.type == "heading_open"), page.stem)
    up = "../" * len(page.parent.parts)
    body = MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<nav><a href="{up}index.html">minipeft</a> · <a href="{up}docs/index.html">documentation</a> · '
        f'<a href="{up}api/minipeft.html">API</a></nav>\n{body}</body></html>\n'
    )


def build_reference(site: Path) -> None:
    """Write the API reference; a field of a config is documented by the help of its option."""
    # pdoc looks for the annotations of a NamedTuple in the wrong module
    warnings.filterwarnings("ignore", "Error parsing type annotation", module="pdoc")
    pdoc.render.configure(docformat="google", template_directory=ROOT / "docs/pdoc")
    for name in minipeft.__all__:
        getattr(minipeft, name)  # pdoc takes what the module holds; some names are imported when they are first used
    modules = {name: pdoc.doc.Module.from_name(name) for name in REFERENCE}
    for module in modules.values():
        for cls in module.classes:
            if dataclasses.is_dataclass(cls.obj):
                for field in dataclasses.fields(cls.obj):
                    cls.members[field.name].docstring = describe(field)
    for name, module in modules.items():
        write(site / "api" / (name.replace(".", "/") + ".html"), pdoc.render.html_module(module, modules).encode())
    write(site / "api/index.html", pdoc.render.html_index(modules).encode())
    write(site / "api/search.js", pdoc.render.search_index(modules).encode())


def describe(field: dataclasses.Field) -> str:
    """The help of an option, with its choices."""
    choices = field.metadata.get("choices")
    return field.metadata.get("help", "") + (f": {', '.join(choices)}" if choices else "")


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


class Anchors(HTMLParser):
    """The ids and the addresses of an HTML page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.addresses = set[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            if name in ("href", "src") and value:
                self.addresses.add(value)


def find_dead_links(site: Path) -> list[str]:
    """Each relative address in the site's pages that leads to no file, or to no id in it."""
    site = Path(os.path.normpath(site))
    pages = {file: Anchors(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    dead = []
    for page, anchors in pages.items():
        for address in sorted(anchors.addresses):
            target = urlsplit(address)
            if target.scheme:
                continue
            file = Path(os.path.normpath(page.parent / unquote(target.path))) if target.path else page
            fragment = unquote(target.fragment)
            if not (file.is_file() and file.is_relative_to(site)) or (
                fragment and file in pages and fragment not in pages[file].ids
            ):
                dead.append(f"{page.relative_to(site)}: {address}")
    return dead


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("site"), help="folder to write to; an earlier build is replaced"
    )
    site = parser.parse_args(arguments).out
    if site.exists():
        if any(site.iterdir()) and not (site / "api/minipeft.html").exists():
            sys.exit(f"{site}: is not empty, and holds no earlier build")
        shutil.rmtree(site)
    build_pages(ROOT, site)
    build_reference(site)
    if dead := find_dead_links(site):
        sys.exit("\n".join(["dead links:", *dead]))
    print(site / "index.html")


MARKDOWN = MarkdownIt("commonmark").enable("table")

if __name__ == "__main__":
    main()
