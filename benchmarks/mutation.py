"""The faults of mutation testing: one change of a syntax tree (DeMillo, Lipton and Sayward 1978).

A comparison with its limit moved, + for -, a constant plus or minus one, a `not` or a statement dropped, `and` for
`or`, two arguments swapped. Type annotations, the texts of errors and what is never run (`__str__`) are left alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
LEFT_ALONE = ("InputError", "option")  # calls whose arguments are texts, limits and defaults
UNREAD = ("annotation", "returns", "decorator_list", "ops", "ctx")  # fields that hold nothing to change


@dataclass(frozen=True)
class Change:
    """One fault: where, what, and the whole source with it."""

    line: int
    before: str
    after: str
    source: str


def list_changes(text: str) -> Iterator[Change]:
    """Every fault of a source."""
    tree = ast.parse(text)
    for parent, name, place, node in nodes_in(tree):
        for changed in changes(node):
            put(parent, name, place, changed)
            source = ast.unparse(ast.fix_missing_locations(tree))
            put(parent, name, place, node)
            yield Change(node.lineno, ast.unparse(node), ast.unparse(changed), source)


def put(parent: ast.AST, name: str, place: int | None, node: ast.AST) -> None:
    """Set a child of a node."""
    if place is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[place] = node


def nodes_in(parent: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.expr | ast.stmt]]:
    """Each expression and statement that may be changed, with its parent, field and place."""
    for name, value in ast.iter_fields(parent):
        if name in UNREAD:
            continue
        for place, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.expr | ast.stmt | ast.comprehension | ast.keyword) or is_left_alone(node):
                continue
            if isinstance(node, ast.expr | ast.stmt):
                yield parent, name, place, node
            yield from nodes_in(node)


def is_left_alone(node: ast.AST) -> bool:
    """Whether a node holds texts, types, defaults or what is printed."""
    text = isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom)
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in LEFT_ALONE
    return text or docstring or called or (isinstance(node, ast.FunctionDef) and node.name == "__str__")


def changes(node: ast.expr | ast.stmt) -> Iterator[ast.expr | ast.stmt]:
    """The faults of one node."""
    match node:
        case ast.Compare(left, [first, *ops], right) if type(first) in COMPARE:
            yield ast.Compare(left, [COMPARE[type(first)](), *ops], right)
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.Not(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Call(func, [first, second, *rest], keywords) if ast.unparse(func) not in ("max", "min"):
            yield ast.Call(func, [second, first, *rest], keywords)
        case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.Continue():
            yield ast.Pass()
