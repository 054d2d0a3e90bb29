"""A check of the Triton kernels' syntax tree: a loaded tile is widened before any arithmetic on it.

Triton's interpreter silently computes bfloat16 on the raw bits. So the result of `tl.load` is *raw* until `.to(...)` or
`widen` makes it float32, and a raw value may only be moved: assigned, indexed, transposed, or passed to another
function of the kernels, which is then checked with that argument raw.

Not checked: whether `.to(...)` names a wider type; values in lists; loads by anything but `tl.load`. The tests in the
interpreter, against float64, cover the rest.
"""

import ast
from pathlib import Path

import minipeft_kernels
import pytest

FILES = [Path(minipeft_kernels.__file__).with_name(f"triton_{name}.py") for name in ("blocks", "kernels", "decode")]
SOURCE = "\n".join(path.read_text() for path in FILES)
WIDEN = ("widen", "to")  # functions that make a raw value float32
MOVES = ("trans", "reshape", "view", "broadcast_to", "expand_dims", "permute", "join", "interleave", "cat")
STORES = ("store",)  # storing a raw value is allowed


class Reader(ast.NodeVisitor):
    """Check one function with some arguments raw; collect violations and the calls that pass raw values on."""

    def __init__(self, functions: dict[str, ast.FunctionDef], results: dict[str, bool]) -> None:
        self.functions, self.results = functions, results  # results: whether a function returns a raw value
        self.raw: set[str] = set()
        self.faults: set[str] = set()
        self.hands_on: set[tuple[str, str]] = set()  # (function, argument)
        self.returns = False

    def is_raw(self, node: ast.expr | None) -> bool:
        """Return whether an expression is raw, collecting the violations inside it."""
        if node is None or isinstance(node, ast.Constant):
            return False
        if isinstance(node, ast.Name):
            return node.id in self.raw
        if isinstance(node, ast.IfExp):
            self.is_raw(node.test)
            return any([self.is_raw(node.body), self.is_raw(node.orelse)])
        if isinstance(node, ast.Subscript):
            return self.is_raw(node.value)
        if isinstance(node, ast.Tuple):
            return any([self.is_raw(item) for item in node.elts])
        if isinstance(node, ast.Call):
            return self.call(node)
        if any([self.is_raw(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]):
            if isinstance(node, ast.Attribute):
                return node.attr not in ("shape", "dtype", "type")
            self.faults.add(f"line {node.lineno}: {ast.unparse(node)}")
        return False

    def call(self, node: ast.Call) -> bool:
        """Return whether a call is raw: a load or a move of a raw value is; arithmetic on one is a violation."""
        method = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "tl"
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        given = ([node.func.value] if method else []) + node.args + [keyword.value for keyword in node.keywords]  # type: ignore[attr-defined]
        raw = [self.is_raw(argument) for argument in given]
        if name == "load" or name in WIDEN:
            return name == "load"
        if name in self.functions:
            names = [argument.arg for argument in self.functions[name].args.args]
            names = names[: len(node.args)] + [keyword.arg or "" for keyword in node.keywords]
            self.hands_on |= {(name, argument) for argument, is_raw in zip(names, raw) if is_raw}
            return self.results.get(name, False)
        if any(raw) and name not in MOVES + STORES:
            self.faults.add(f"line {node.lineno}: {ast.unparse(node)}")
        return any(raw) and name in MOVES

    def visit_Assign(self, node: ast.Assign) -> None:
        raw = self.is_raw(node.value)
        for target in node.targets:
            for name in (n.id for n in ast.walk(target) if isinstance(n, ast.Name)):
                (self.raw.add if raw else self.raw.discard)(name)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if any([self.is_raw(node.target), self.is_raw(node.value)]):
            self.faults.add(f"line {node.lineno}: {ast.unparse(node)}")

    def visit_If(self, node: ast.If) -> None:
        """Check both branches: a value that is raw after either is raw."""
        self.is_raw(node.test)
        before, after = set(self.raw), set()
        for branch in (node.body, node.orelse):
            self.raw = set(before)
            for statement in branch:
                self.visit(statement)
            after |= self.raw
        self.raw = after

    def visit_For(self, node: ast.For) -> None:
        """Check the body twice: a value that is raw at its end is raw at its start."""
        self.is_raw(node.iter)
        for _ in range(2):
            before = set(self.raw)
            for statement in node.body:
                self.visit(statement)
            self.raw |= before

    def visit_Return(self, node: ast.Return) -> None:
        self.returns |= self.is_raw(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        self.is_raw(node.value)

    def generic_visit(self, node: ast.AST) -> None:
        assert not isinstance(node, ast.stmt) or isinstance(node, ast.Pass), (
            f"this check does not know {ast.unparse(node)}"
        )


def find_violations(source: str) -> list[str]:
    """Return the arithmetic on raw values in the source of the kernels, as function: line: expression."""
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    raw_arguments: dict[str, set[str]] = {name: set() for name in functions}
    results: dict[str, bool] = {}
    while True:
        before = str((raw_arguments, results))
        found = []
        for name, function in functions.items():
            if name == "widen":
                continue  # raw on a GPU, float32 in the interpreter
            reader = Reader(functions, results)
            reader.raw = set(raw_arguments[name])
            for statement in function.body:
                reader.visit(statement)
            results[name] = reader.returns
            found += sorted(f"{name}: {fault}" for fault in reader.faults)
            for callee, argument in sorted(reader.hands_on):
                raw_arguments[callee].add(argument)
        if str((raw_arguments, results)) == before:
            return found


def add_kernel(body: str) -> str:
    """Return the source of the kernels and one more kernel."""
    return SOURCE + f"\n\n@triton.jit\ndef planted(x, y, at, UPCAST):\n    {body}\n"


def test_no_kernel_computes_with_a_raw_tile() -> None:
    assert find_violations(SOURCE) == []


@pytest.mark.parametrize(
    "body",
    [
        "tl.store(y + at, tl.load(x + at) * 2.0)",  # direct
        "a = tl.load(x + at)\n    b = a\n    tl.store(y + at, b + 1.0)",  # under another name
        "a = tl.load(x + at)\n    if UPCAST:\n        a = widen(a, UPCAST)\n    tl.store(y + at, -a)",  # one branch
        "a = 0.0\n    for i in range(4):\n        a += tl.load(x + at)",
        "a = 0.0\n    for i in range(4):\n        b = a + 1.0\n        a = tl.load(x + at)",  # in the next iteration
        "tl.store(y, tl.sum(tl.trans(tl.load(x + at)), axis=0))",
        "tl.store(y, tl.dot(tl.load(x + at), widen(tl.load(y + at), UPCAST)))",
        "tl.store(y, tl.where(at > 3, tl.load(x + at), 0.0) > 0.5)",
        "tl.store(y, mix(tl.load(x + at), at))",  # inside a function that does not widen its argument
        "a = tl.load(x + at)[:, None]\n    tl.store(y, (a if UPCAST else at) < at)",
    ],
)
def test_a_planted_violation_is_found(body: str) -> None:
    found = find_violations(add_kernel(body))
    assert found
    assert all(fault.startswith(("planted: ", "mix: ")) for fault in found)


@pytest.mark.parametrize(
    "body",
    [
        "tl.store(y + at, tl.load(x + at).to(tl.float32) * 2.0)",
        "a = tl.load(x + at)\n    a = widen(a, UPCAST)\n    tl.store(y + at, a * 2.0)",
        "tl.store(y, multiply_add(tl.trans(tl.load(x + at)), tl.load(y + at), 0.0, UPCAST) + 1.0)",
        "tl.store(y + at, tl.load(x + at))",  # a copy
    ],
)
def test_valid_code_passes(body: str) -> None:
    assert find_violations(add_kernel(body)) == []


def test_dropping_one_widening_from_the_kernels_is_found() -> None:
    """Every `.to(tl.float32)` of a load and every `widen` is needed."""
    source = SOURCE
    assert find_violations(source.replace("tile = widen(tile, UPCAST)", "tile = tile")) != []
    assert find_violations(source.replace("tl.dot(widen(a, UPCAST), widen(b, UPCAST)", "tl.dot(a, b")) != []
    loads = [at for at in range(len(source)) if source.startswith("other=0.0).to(tl.float32)", at)]
    assert len(loads) >= 7
    for at in loads:
        end = at + len("other=0.0)")
        assert find_violations(source[:end] + source[end + len(".to(tl.float32)") :]) != []
