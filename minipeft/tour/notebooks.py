"""Write each stop of the tour as a Jupyter notebook.

    text, ```math                    Markdown, with the numbers of the build
    {{source minipeft.a.b}}          find_source("minipeft.a.b"), which shows the definition
    {{table}}                        values["table"]

The code that computes the numbers is the body of the stop's function in measures/, so that a reader can change and run
it. It stands before the first value that is shown, else at the end.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.files import write_whole
from minipeft.tour.measures import MEASURES, Measure
from minipeft.tour.sources import find_source, list_names
from minipeft.tour.stops import Measured, fill
from minipeft.tour.values import Drawing, Output, Table, Value, show

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
INTRODUCTION = (
    "Written by `minipeft tour --notebooks`. The numbers in the text are those of the build; the code below computes "
    "them again. Change it, and compare."
)


def require_nbformat() -> Any:
    """Import nbformat.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("nbformat")
    except ModuleNotFoundError as error:
        raise InputError("needs nbformat", where="notebooks", hint="pip install minipeft[docs]") from error


def write_notebook(folder: Path, measured: Measured, quick: bool) -> Path:
    """Write a stop as FOLDER/NN-name.ipynb; returns the path.

    Raises:
        InputError: it cannot be written, or nbformat is not installed.
    """
    library, stop = require_nbformat(), measured.stop
    make = {"markdown": library.v4.new_markdown_cell, "code": library.v4.new_code_cell}
    cells = [make[kind](text, id=f"{stop.name}-{n}") for n, (kind, text) in enumerate(list_cells(measured, quick))]
    book = library.v4.new_notebook(cells=cells, metadata=KERNEL)
    library.validate(book)
    file = folder / f"{stop.file.stem}.ipynb"
    write_whole(file, lambda stream: stream.write((library.writes(book) + "\n").encode()))
    return file


def list_cells(measured: Measured, quick: bool) -> Iterator[tuple[str, str]]:
    """The cells of a stop, as kind and text."""
    stop, values = measured.stop, measured.values
    names, code = write_code(MEASURES[stop.name])
    yield "markdown", f"# {stop.number}. {stop.title}\n\n{INTRODUCTION}"
    yield "code", f"{names}\n\nbench = Bench(quick={quick})  # the demo model, its tokenizer and its data"
    computed = False
    for block in stop.blocks:
        if block.kind == "text":
            yield "markdown", fill(block.text, values)
        elif block.kind == "math":
            yield "markdown", f"```text\n{block.text}\n```"
        elif block.kind == "source":
            yield "code", f'find_source("{block.text}")'
        else:
            if not computed:
                yield "code", code
                computed = True
            yield "code", f'values["{block.text}"]'
    if not computed:
        yield "code", code


def write_code(measure: Measure) -> tuple[str, str]:
    """A stop's function as two cells: the imports of the names that it uses, and its body with `values = ` for
    `return`. A decorator becomes a `with`."""
    text = find_source(f"{measure.__module__}.{measure.__name__}").text
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    first, last = function.body[1], function.body[-1]  # after the docstring
    assert isinstance(last, ast.Return)
    lines = text.splitlines()
    end = lines[last.lineno - 1]
    lines[last.lineno - 1] = f"{end[: last.col_offset]}values = {end[last.col_offset + len('return ') :]}"
    body = "\n".join(lines[first.lineno - 1 :])
    around = "".join(f"with {ast.unparse(one)}:\n" for one in function.decorator_list)
    code = f"{around}{body}" if around else textwrap.dedent(body)
    names = {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
    return list_imports(measure.__module__, names), f"torch.manual_seed(0)\n{code}\nlist_numbers(values)"


def list_imports(module: str, names: set[str]) -> str:
    """The imports of these names as lines: those that the module imports, and from the module its own."""
    asked: dict[str, set[str]] = {
        "import torch": set(),
        "from minipeft.tour.bench import ": {"Bench"},
        "from minipeft.tour.notebooks import ": {"list_numbers"},
        "from minipeft.tour.sources import ": {"find_source"},
    }

    def add(source: str | None, found: set[str]) -> None:
        if found & names:
            asked.setdefault(f"from {source} import ", set()).update(found & names)

    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.Import):
            bound = {(one.asname or one.name).split(".")[0] for one in node.names}
            asked |= {ast.unparse(node): set()} if bound & names else {}
        elif isinstance(node, ast.ImportFrom):
            add(node.module, {one.name for one in node.names})
        else:
            add(module, set(list_names(node)))
    lines = [line + ", ".join(sorted(found)) for line, found in asked.items()]
    return "\n".join(sorted(lines, key=lambda line: ("minipeft" in line, line.startswith("from"), line)))


def list_numbers(values: Mapping[str, Value]) -> Table:
    """The values that the text names, as a table."""
    plain = {name: value for name, value in values.items() if not isinstance(value, Table | Drawing | Output)}
    return Table(("name", "value"), [(f"`{name}`", show(value)) for name, value in plain.items()])
