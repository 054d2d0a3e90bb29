"""Untrusted texts from a model, a file or a path are escaped in the report, its Markdown, the terminal and errors."""

import os
import pty
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minipeft import cli
from minipeft.cli import streams
from minipeft.errors import InputError
from minipeft.metrics.scores import score_texts
from minipeft.study.browser import Answered
from minipeft.study.cells import Cell
from minipeft.study.charts import escape
from minipeft.study.curves import Curve
from minipeft.study.page import draw_page
from minipeft.study.progress import Bar
from minipeft.study.report import NOTES, as_terminal, draw_markdown, summarize
from minipeft.study.rows import Data, Group, Results, Row, Training
from tests.small import write_small_model

HOSTILE = {
    "script": "</script><script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "attribute": "\"' onmouseover=alert(1) x='",
    "style": "</style></title></svg></code></pre><svg onload=alert(1)>",
    "comment": "--><!-- <![CDATA[ ]]>",
    "terminal": "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\r\b",
    "bidi": "access_level = 'user\u202e \u2066# only admin\u2069 \u2066'",  # CVE-2021-42574
    "invisible": "a\u200bb\ufeffc\u2028d\u0085e",
    "table": "a | b\n\n# heading\n\n| c |\n|---|",
    "surrogate": "half \ud83d",
}
# What moves a terminal's cursor, changes its title or colours, or shows a text in another order than it has.
DANGEROUS = {*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), *"\u200b\u200e\u200f\u2028\u2029\ufeff",
             *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))} - {"\n", "\t"}  # fmt: skip


class Reader(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attributes]))


def study(text: str) -> tuple[Results, list[Curve], list[Answered]]:
    """A study whose untrusted texts are all this one."""
    answers, references = [text, "x = 1"], ["x = 1", text]
    scores = score_texts(answers, references)
    trained = Training(init="text", learning_rate=1e-3, steps=5, trainable=10, trainable_percent=1.0, dev_loss=2.0)
    groups = (
        Group("", "echo the question", scores=scores),
        Group(f"org/{text}", "lora", training=trained, scores=scores, flags=(text,), cells=("a",)),
        Group(text, "prompt", error=text, cells=("b",)),
    )
    row = Row("a", text, "lora", scores=scores)
    data = Data(f"folder/{text}", 2, 2, "", "")
    results = Results(f"minipeft study --data '{text}'", "demo", data, {"gpu": text}, (row,), groups)
    rows = [{"prediction": a, "reference": r, "intent": text, "ended": "eos"} for a, r in zip(answers, references)]
    return results, [Curve(text, [(1.0, 2.0)], [(1.0, 2.0)])], [Answered(text, rows)]


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_page_has_no_tag_that_a_harmless_one_lacks(kind: str) -> None:
    """Nor another attribute, nor one more script or image; the diff and grid lines follow the text and its scores."""
    found = []
    for text in ("harmless", HOSTILE[kind]):
        results, curves, cells = study(text)
        page = draw_page(results, summarize(results), NOTES, curves, cells)
        reader = Reader()
        reader.feed(page)
        found.append([(tag, *names) for tag, names in reader.tags])
        assert not DANGEROUS & set(page)
    harmless, hostile = found
    assert set(hostile) - {("ins",), ("del",)} <= set(harmless)
    for tag in ("script", "style", "img", "iframe", "a", "section", "table", "tr", "td", "details"):
        assert [names[0] for names in hostile].count(tag) == [names[0] for names in harmless].count(tag)


def shape_of(line: str) -> tuple[str, int]:
    """The start of a Markdown line and its cell separators; in a code block a bar is none."""
    return line[:2], 0 if line.startswith("    ") else line.replace("\\|", "").count("|")


@pytest.mark.parametrize("kind", HOSTILE)
def test_markdown_has_the_lines_of_a_harmless_one(kind: str) -> None:
    """No new heading, row or cell, and no tag: what renders report.md may let HTML through."""
    found = []
    for text in ("harmless", HOSTILE[kind]):
        drawn = draw_markdown(study(text)[0])
        outside_code = [line for line in drawn.splitlines() if not line.startswith("    ")]
        assert not [line for line in outside_code if "<" in line]
        assert not DANGEROUS & set(drawn)
        found.append([shape_of(line) for line in drawn.split("\n")])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_terminal_shows_escape_sequences_as_text(
    kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    streams.show(as_terminal(study(HOSTILE[kind])[0], tmp_path))
    streams.report(f"note: {HOSTILE[kind]}")
    streams.report(f"error: {InputError(HOSTILE[kind], file=HOSTILE[kind], where=HOSTILE[kind], hint=HOSTILE[kind])}")
    said = capsys.readouterr()
    assert said.out
    assert said.err
    assert not DANGEROUS & set(said.out + said.err)


def test_the_progress_bar_shows_a_model_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell(HOSTILE["terminal"], "lora")
    with Bar([cell], {}, tmp_path, 1, []) as bar:
        bar.begin(cell)
        assert not DANGEROUS & set(bar.bar.desc)
        assert "title" in bar.bar.desc


def test_an_answer_on_a_terminal_is_text_and_in_a_pipe_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """`minipeft generate` prints a model's text: a terminal must not interpret it, a program must get it unchanged."""
    answer = "a\x1b[31mb\n\tc\u202e"
    for (reader, writer), wanted in ((os.pipe(), f"{answer}\n"), (pty.openpty(), "a\\x1b[31mb\n\tc\\u202e\n")):
        with open(writer, "w", encoding="utf-8") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            streams.show(answer, as_is=True)
            monkeypatch.undo()
            stream.flush()
            printed = os.read(reader, 1000).decode()
        os.close(reader)
        assert printed.replace("\r\n", "\n").expandtabs(8) == wanted.expandtabs(8)


def test_a_path_with_escape_sequences_is_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`train` prints the folder that it wrote, `plan` the model that it read."""
    folder = write_small_model(tmp_path / "m\x1b[2J\u202eodel", layers=1)
    assert cli.main(["plan", str(folder), "--method", "lora", "--length", "64"]) == 0
    said = capsys.readouterr()
    assert "m\\x1b[2J\\u202eodel" in said.out
    assert not DANGEROUS & set(said.out + said.err)


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_harmless_is_shown_as_it_is(kind: str) -> None:
    """The readable part of a hostile text stays readable, and a harmless text is unchanged."""
    assert escape("größe → 1 \U0001f600 你好") == "größe → 1 \U0001f600 你好"
    letters = [sign for sign in HOSTILE[kind] if sign.isalnum()]
    assert [sign for sign in letters if sign in escape(HOSTILE[kind])] == letters


def test_the_study_helper_reaches_every_place() -> None:
    """Control: each text of `study` is in the page, so that the tests above cannot pass on an empty page."""
    results, curves, cells = study("MARK")
    page = draw_page(results, summarize(results), NOTES, curves, cells)
    assert page.count("MARK") >= 10
    assert draw_markdown(results).count("MARK") >= 5
    gone = draw_page(replace(results, command=""), summarize(results), NOTES, curves, cells)
    assert gone.count("MARK") == page.count("MARK") - 1
