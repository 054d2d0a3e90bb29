"""Find the source of a function, class or constant by its dotted name, without importing its module.

    find_source("minipeft.adapters.lora.LoRALinear.forward")    a method
    find_source("minipeft.documents.visible")                   a function
    find_source("minipeft.documents.VIRTUAL")                   a constant

The file is parsed, not imported: a Triton kernel is found where Triton is not installed, and a decorated function is
shown as it is written.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tree_sitter_python
from tree_sitter import Language, Node, Parser

from minipeft.errors import InputError
from minipeft.files import read_text

PACKAGES = {"minipeft": "minipeft", "minipeft_kernels": "kernels/minipeft_kernels"}  # package: folder in the repository
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
PYTHON = Language(tree_sitter_python.language())
KINDS = {  # type of a syntax node -> class in the page
    "comment": "comment", "string": "string", "integer": "number", "float": "number", "decorator": "decorator",
    "none": "number", "true": "number", "false": "number",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A definition's text, dedented, its file's path in the repository and its first line there, from 1."""

    name: str
    file: str
    line: int
    text: str

    def _repr_markdown_(self) -> str:
        return f"`{self.name}`, from {self.file}:\n\n```python\n{self.text}\n```"


def find_source(name: str) -> Source:
    """Find a definition of minipeft or minipeft_kernels by its dotted name.

    Raises:
        InputError: no such module, or the module defines no such name.
    """
    module, file = find_module(name)
    parts = name[len(module) + 1 :].split(".")
    text = read_text(file)
    body: list[ast.stmt] = ast.parse(text).body
    found: ast.stmt | None = None
    for part in parts:
        found = next((node for node in body if part in list_names(node)), None)
        if found is None:
            raise InputError(f"{module} defines no {'.'.join(parts)!r}", where=name)
        body = found.body if isinstance(found, DEFINITIONS) else []
    assert found is not None
    first = min([found.lineno, *(d.lineno for d in getattr(found, "decorator_list", []))])
    lines = text.splitlines()[first - 1 : found.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    package = module.split(".")[0]
    inside = file.relative_to(find_root(package)).as_posix()
    return Source(name, f"{PACKAGES[package]}/{inside}", first, "\n".join(line[indent:] for line in lines))


def list_names(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, DEFINITIONS):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def find_module(name: str) -> tuple[str, Path]:
    """Find the longest prefix of a dotted name that is a module, and the module's file.

    Raises:
        InputError: there is none within PACKAGES, or nothing is named within the module.
    """
    package, *parts = name.split(".")
    if package in PACKAGES:
        for end in range(len(parts) - 1, -1, -1):
            place = find_root(package).joinpath(*parts[:end])
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file() and end < len(parts):
                    return ".".join([package, *parts[:end]]), file
    raise InputError(f"no module of {' or '.join(PACKAGES)} holds {name!r}", where=name)


@cache
def find_root(package: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def mark_syntax(code: str) -> list[tuple[str, str]]:
    """Split Python code into (text, kind): comment, string, number, decorator, keyword, name of a definition, or ""."""
    data = code.encode()
    marks: list[tuple[int, int, str]] = []

    def visit(node: Node) -> None:
        kind = KINDS.get(node.type, "")
        if not kind and not node.is_named and node.type.isalpha():
            kind = "keyword"
        if node.type == "identifier" and node.parent is not None and node.parent.type.endswith("_definition"):
            kind = "defined" if node.parent.child_by_field_name("name") == node else ""
        if kind:
            marks.append((node.start_byte, node.end_byte, kind))
        else:
            for child in node.children:
                visit(child)

    visit(Parser(PYTHON).parse(data).root_node)
    parts, at = [], 0
    for start, end, kind in marks:
        parts += [(data[at:start].decode(), ""), (data[start:end].decode(), kind)]
        at = end
    return [part for part in (*parts, (data[at:].decode(), "")) if part[0]]
