"""The hole of an exercise: a function of the library by its dotted name, as it is in the installed source, without its
body.

The file is parsed, not imported, so that a Triton kernel is found where Triton is not installed. The names that the
function uses are imported above it, from where the library has them.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache

from minipeft.errors import InputError
from minipeft.files import read_text
from minipeft.tour.sources import find_module, find_source

EMPTY = "raise NotImplementedError"


@dataclass(frozen=True)
class Definition:
    """A function of the library: its module, its name in it (CLASS.METHOD for a method), and its dedented source."""

    module: str
    path: str
    text: str
    imports: tuple[str, ...]  # statements that bind the names that it uses

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


@cache
def find_definition(name: str) -> Definition:
    """Find a function or method by its dotted name.

    Raises:
        InputError: no module defines it, or it is no function.
    """
    text = find_source(name).text + "\n"
    module, file = find_module(name)
    path = name[len(module) + 1 :]
    function = ast.parse(text).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise InputError(f"{path!r} of {module} is no function", where=name)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    imports = find_imports(ast.parse(read_text(file)), function, module, package)
    return Definition(module, path, text, imports)


def find_imports(tree: ast.Module, function: ast.FunctionDef, module: str, package: str) -> tuple[str, ...]:
    """Statements that bind the names of the module that a function uses, and all modules that its module imports:
    an answer may use torch where the solution has only methods."""
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} - {function.name}
    plain: list[str] = []
    found: dict[str, tuple[str, ast.alias]] = {}  # by the bound name: the module, and the name in it
    for node in tree.body:
        if isinstance(node, ast.Import):
            plain += [ast.unparse(ast.Import([alias])) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            found |= {alias.asname or alias.name: (resolve(node, package), alias) for alias in node.names}
        else:
            found |= {name: (module, ast.alias(name)) for name in list_bound(node)}
    needed: dict[str, list[ast.alias]] = {}
    for name in sorted(used & found.keys()):
        needed.setdefault(found[name][0], []).append(found[name][1])
    froms = [ast.unparse(ast.ImportFrom(origin, aliases, 0)) for origin, aliases in needed.items()]
    ours = [line for line in froms if line.startswith("from minipeft")]
    return tuple(sorted(plain) + sorted(set(froms) - set(ours)) + sorted(ours))


def resolve(node: ast.ImportFrom, package: str) -> str:
    """The absolute name of the module of a from-import."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def list_bound(node: ast.stmt) -> list[str]:
    """The names that a definition or an assignment binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def cut_body(text: str) -> str:
    """A function's source with its docstring, and `raise NotImplementedError` for its body."""
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    kept = (first.end_lineno if has_docstring else first.lineno - 1) or 0
    head = "".join(text.splitlines(keepends=True)[:kept]).rstrip("\n")
    return f"{head}\n{' ' * first.col_offset}{EMPTY}\n"


def make_module(definition: Definition, text: str, docstring: str) -> str:
    """The source of an exercise's file: the docstring, the imports, and a function's text."""
    future = "from __future__ import annotations"
    blocks = [docstring, future, "\n".join(definition.imports)]
    return "\n\n".join(block for block in blocks if block) + f"\n\n\n{text}"
