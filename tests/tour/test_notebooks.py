"""The tour's notebooks: complete code, and numbers that are those of the text, executed.

The code of some stops is executed here, in this process, and two notebooks in a kernel in tests/test_notebook.py;
MINIPEFT_TRIALS=1 executes all notebooks in kernels.
"""

import ast
import builtins
import os
import re

import pytest

from minipeft.errors import InputError
from minipeft.tour.bench import Bench
from minipeft.tour.book import measure_stop
from minipeft.tour.measures import MEASURES
from minipeft.tour.notebooks import list_cells, list_numbers, write_code, write_notebook
from minipeft.tour.stops import read_stops
from minipeft.tour.values import Drawing, Output, Table

nbformat = pytest.importorskip("nbformat")
STOPS = {stop.name: stop for stop in read_stops()}
CHEAP = ["tokens", "lora", "dropout", "saving", "bleu"]
ALL = float(os.environ.get("MINIPEFT_TRIALS", "0.3")) >= 1


@pytest.fixture(scope="module")
def bench():
    return Bench(quick=True)


@pytest.mark.parametrize("name", MEASURES)
def test_the_code_imports_every_name_that_it_uses(name):
    imports, code = write_code(MEASURES[name])
    known: dict = {}
    exec(imports, known)
    nodes = list(ast.walk(ast.parse(code)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    made |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    assert used - made - known.keys() - set(dir(builtins)) <= {"bench"}
    unused = known.keys() - used - {"__builtins__", "torch", "Bench", "find_source"}
    assert not unused


@pytest.mark.parametrize("name", CHEAP)
def test_the_code_computes_the_numbers_of_the_text(name, bench):
    measured = measure_stop(STOPS[name], bench)
    *cells, _ = list_cells(measured, quick=True)
    known: dict = {}
    for kind, text in cells:
        if kind == "code":
            exec(text, known)
    assert known["values"].keys() == measured.values.keys()
    numbers = dict(list_numbers(known["values"]).rows)
    assert numbers == dict(list_numbers(measured.values).rows)
    assert numbers
    for value, other in zip(known["values"].values(), measured.values.values()):
        if isinstance(value, Table | Drawing | Output):
            assert value == other


def test_the_code_comes_before_the_first_value_that_is_shown(bench):
    cells = list(list_cells(measure_stop(STOPS["lora"], bench), quick=True))
    kinds = [kind for kind, _ in cells]
    code = next(place for place, (_, text) in enumerate(cells) if text.endswith("list_numbers(values)"))
    shown = [place for place, (_, text) in enumerate(cells) if re.fullmatch(r'values\["\w+"\]', text)]
    assert kinds[:2] == ["markdown", "code"]
    assert shown[0] == code + 1


def test_a_drawing_is_a_page_in_a_frame(bench):
    drawing = measure_stop(STOPS["dropout"], bench).values["drawn"]
    page = drawing._repr_html_()
    assert page.startswith('<iframe srcdoc="')
    assert page.count('"') == 6  # the page inside has none: it stays within its attribute
    assert len(page) < 150_000


def test_a_notebook_that_cannot_be_written_is_refused(tmp_path, bench):
    measured = measure_stop(STOPS["saving"], bench)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        write_notebook(tmp_path / "file", measured, True)


@pytest.mark.skipif(not ALL, reason="MINIPEFT_TRIALS=1 executes every notebook")
@pytest.mark.parametrize("name", MEASURES)
def test_each_notebook_runs(name, tmp_path, bench):
    nbclient = pytest.importorskip("nbclient")
    measured = measure_stop(STOPS[name], bench)
    book = nbformat.read(write_notebook(tmp_path, measured, True), 4)
    nbclient.NotebookClient(book, timeout=600, startup_timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = ["".join(map(str, output.get("data", {}).values())) + output.get("text", "") for output in outputs]
    assert max(map(len, texts)) < 200_000
    assert list_numbers(measured.values)._repr_markdown_() in [o.get("data", {}).get("text/markdown") for o in outputs]
