"""The hole of an exercise: a function of the library by its dotted name, as it is in the installed source, without its
body.

The file is parsed, not imported, so that a Triton kernel is found where Triton is not installed. The names that the
function uses are imported above it, from where the library has them.
"""

from __future__ import annotations

import ast
import importlib.util
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minipeft.errors import InputError
from minipeft.files import read_text

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
        InputError: no module holds it.
    """
    module, file = find_module(name)
    tree = ast.parse(text := read_text(file))
    path = name[len(module) + 1 :]
    found: ast.AST | None = tree
    for part in path.split("."):
        body = getattr(found, "body", [])
        found = next((node for node in body if getattr(node, "name", None) == part), None)
    if not isinstance(found, ast.FunctionDef):
        raise InputError(f"{module} has no function {path!r}", where=name)
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    lines = text.splitlines(keepends=True)[first - 1 : found.end_lineno]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return Definition(module, path, textwrap.dedent("".join(lines)), find_imports(tree, found, module, package))


def find_module(name: str) -> tuple[str, Path]:
    """The module that holds a dotted name, and its file; only the top package is imported.

    Raises:
        InputError: there is none.
    """
    parts = name.split(".")
    spec = importlib.util.find_spec(parts[0])
    if spec is None or spec.origin is None:
        raise InputError(f"no package is named {parts[0]!r}", where=name)
    for end in range(len(parts) - 1, 0, -1):
        place = Path(spec.origin).parent.joinpath(*parts[1:end])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return ".".join(parts[:end]), file
    raise InputError("no module holds it", where=name)


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
