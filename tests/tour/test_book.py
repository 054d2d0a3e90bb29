"""The tour as a whole, built once: self-contained, complete, and refused where text and numbers do not fit."""

import dataclasses
import html
import re
import sys
from pathlib import Path

import pytest

from minipeft.cli import main
from minipeft.errors import InputError
from minipeft.tour import book
from minipeft.tour.bench import Bench
from minipeft.tour.measures import MEASURES
from minipeft.tour.sources import find_source
from minipeft.tour.stops import FOLDER, read_stop, read_stops

pytest.importorskip("markdown_it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour")
    assert main(["tour", "--quick", "--out", str(folder), "--notebooks", str(folder / "notebooks")]) == 0
    return folder


@pytest.fixture(scope="module")
def built(folder):
    return (folder / "tour.html").read_text(), (folder / "tour.md").read_text()


def test_each_stop_has_a_function_and_a_section(built):
    page, text = built
    stops = read_stops()
    assert [stop.name for stop in stops] == list(MEASURES)
    assert re.findall(r'<section id="([\w-]+)">', page) == list(MEASURES)
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == len(stops)
    assert re.findall(r'<a href="#([\w-]+)">', page) == list(MEASURES)


def test_the_page_needs_no_network(built):
    page, _ = built
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)=\"(?!#)", page)
    assert "url(http" not in page
    assert "@import" not in page


def test_the_source_in_the_page_is_the_source(built):
    page, text = built
    figures = re.findall(
        r'<figure class="source"><figcaption><code>([\w.]+)</code>.*?<pre tabindex="0">(.*?)</pre>', page, re.DOTALL
    )
    assert len(figures) > 20
    for name, code in figures:
        assert html.unescape(re.sub(r"</?i[^>]*>", "", code)) == find_source(name).text
        assert find_source(name).text in text


def test_nothing_is_left_to_fill_in(built):
    for whole in built:
        prose = re.sub(r"<pre.*?</pre>|```.*?```", "", whole, flags=re.DOTALL)
        assert "{{" not in prose
        assert "\ue000" not in prose
        assert "nan" not in re.findall(r'<span class="n">(.*?)</span>', prose)


def test_each_stop_is_a_notebook_with_the_books_text(built, folder):
    nbformat = pytest.importorskip("nbformat")
    _, text = built
    files = sorted((folder / "notebooks").iterdir())
    assert [file.stem for file in files] == [stop.file.stem for stop in read_stops()]
    for file in files:
        book = nbformat.read(file, 4)
        nbformat.validate(book)
        title, *prose = [cell.source for cell in book.cells if cell.cell_type == "markdown"]
        assert title.startswith("# ")
        assert prose
        assert all(part in text for part in prose)
        sources = re.findall(r'^find_source\("([\w.]+)"\)$', "\n".join(c.source for c in book.cells), re.MULTILINE)
        assert sources == [
            block.text for block in read_stop(FOLDER / f"{file.stem}.md").blocks if block.kind == "source"
        ]
        assert not any(cell.get("outputs") for cell in book.cells)


def test_without_nbformat_the_command_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "nbformat", None)
    assert main(["tour", "--out", str(tmp_path / "tour"), "--notebooks", str(tmp_path / "notebooks")]) == 2
    assert "needs nbformat. pip install minipeft[docs]" in capsys.readouterr().err
    assert not (tmp_path / "tour").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "note").write_text("")
    assert main(["tour", "--out", str(tmp_path / "tour"), "--notebooks", str(tmp_path / "note/books")]) == 2
    place = tmp_path / "note/books"
    assert capsys.readouterr().err == f"error: {place}: cannot write 65,536 bytes: Not a directory\n"
    assert not (tmp_path / "tour").exists()


def write(folder: Path, text: str):
    file = folder / "01-tokens.md"
    file.write_text("# Tokens\n" + text)
    return read_stop(file)


def test_text_and_values_must_fit(tmp_path):
    with pytest.raises(InputError, match=r"shows 'losses', which is not among \['characters', 'count'"):
        book.measure_stop(write(tmp_path, "{{losses}}"), Bench())
    with pytest.raises(InputError, match="does not show 'characters', which is computed"):
        book.measure_stop(write(tmp_path, "{{vocabulary}}"), Bench())
    unknown = dataclasses.replace(write(tmp_path, "text"), name="nowhere")
    with pytest.raises(InputError, match="no function in tour/measures computes the values of 'nowhere'"):
        book.measure_stop(unknown, Bench())


def test_without_the_library_the_command_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    assert main(["tour", "--out", str(tmp_path / "tour")]) == 2
    assert "needs markdown-it-py. pip install minipeft[docs]" in capsys.readouterr().err
    assert not (tmp_path / "tour").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "measure_stop", lambda *_: pytest.fail("a stop was computed"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file"):
        book.build_tour(book.TourConfig(out=str(tmp_path / "file")))
