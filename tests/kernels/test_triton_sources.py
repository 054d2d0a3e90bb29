"""The rule of device.py, read off its text: a loaded tile is widened before any arithmetic touches it.

Triton's interpreter computes nonsense on bfloat16 (it works on the raw bits), in silence. So what `tl.load` returns is
*raw* until `.to(...)` or `wide` has made it float32, and raw values may only be moved about: named, indexed,
transposed, handed to another function of the file, which is then held to the same rule with that argument raw.

What this does not see: whether `.to(...)` names a wider type; a value that goes through a list or a function kept in
another file; a load by anything but `tl.load`. The interpreter's own tests, against float64, are there for the rest.
"""

import ast
from pathlib import Path

import minipeft_kernels
import pytest

FILES = [Path(minipeft_kernels.__file__).with_name(f"triton_{name}.py") for name in ("blocks", "kernels", "decode")]
SOURCE = "\n".join(path.read_text() for path in FILES)
WIDEN = ("widen", "to")  # what makes a raw value fit for arithmetic
MOVES = ("trans", "reshape", "view", "broadcast_to", "expand_dims", "permute", "join", "interleave", "cat")
STORES = ("store",)  # writing a value is no arithmetic


class Reader(ast.NodeVisitor):
    """Read one function with some of its arguments raw; note each breach, and which calls hand raw values on."""

    def __init__(self, functions: dict[str, ast.FunctionDef], results: dict[str, bool]) -> None:
        self.functions, self.results = functions, results  # results: whether a function's value is raw
        self.raw: set[str] = set()
        self.faults: set[str] = set()
        self.hands_on: set[tuple[str, str]] = set()  # (function, argument)
        self.returns = False

    def is_raw(self, node: ast.expr | None) -> bool:
        """Say whether an expression's value is raw, noting the breaches inside it."""
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
        """Say whether a call's value is raw: a load's is, a move of a raw value is, arithmetic on one is a breach."""
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
        """Read both ways: what either leaves raw is raw."""
        self.is_raw(node.test)
        before, after = set(self.raw), set()
        for branch in (node.body, node.orelse):
            self.raw = set(before)
            for statement in branch:
                self.visit(statement)
            after |= self.raw
        self.raw = after

    def visit_For(self, node: ast.For) -> None:
        """Read the body twice: what is raw at its end is raw at its start."""
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
        assert not isinstance(node, ast.stmt) or isinstance(node, ast.Pass), f"teach this reader {ast.unparse(node)}"


def breaches(source: str) -> list[str]:
    """Return where a file of kernels does arithmetic on a raw value, as function: line: expression."""
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    raw_arguments: dict[str, set[str]] = {name: set() for name in functions}
    results: dict[str, bool] = {}
    while True:
        before = str((raw_arguments, results))
        found = []
        for name, function in functions.items():
            if name == "widen":
                continue  # the one place that decides: raw on a GPU, float32 in the interpreter
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


def kernel(body: str) -> str:
    """Return device.py's helpers and one more kernel."""
    return SOURCE + f"\n\n@triton.jit\ndef planted(x, y, at, UPCAST):\n    {body}\n"


def test_no_kernel_computes_with_what_it_has_not_widened() -> None:
    assert breaches(SOURCE) == []


@pytest.mark.parametrize(
    "body",
    [
        "tl.store(y + at, tl.load(x + at) * 2.0)",  # straight
        "a = tl.load(x + at)\n    b = a\n    tl.store(y + at, b + 1.0)",  # under another name
        "a = tl.load(x + at)\n    if UPCAST:\n        a = widen(a, UPCAST)\n    tl.store(y + at, -a)",  # one way only
        "a = 0.0\n    for i in range(4):\n        a += tl.load(x + at)",
        "a = 0.0\n    for i in range(4):\n        b = a + 1.0\n        a = tl.load(x + at)",  # in the next round
        "tl.store(y, tl.sum(tl.trans(tl.load(x + at)), axis=0))",
        "tl.store(y, tl.dot(tl.load(x + at), widen(tl.load(y + at), UPCAST)))",
        "tl.store(y, tl.where(at > 3, tl.load(x + at), 0.0) > 0.5)",
        "tl.store(y, mix(tl.load(x + at), at))",  # inside a function that does not widen its argument
        "a = tl.load(x + at)[:, None]\n    tl.store(y, (a if UPCAST else at) < at)",
    ],
)
def test_a_planted_breach_is_found(body: str) -> None:
    found = breaches(kernel(body))
    assert found
    assert all(fault.startswith(("planted: ", "mix: ")) for fault in found)


@pytest.mark.parametrize(
    "body",
    [
        "tl.store(y + at, tl.load(x + at).to(tl.float32) * 2.0)",
        "a = tl.load(x + at)\n    a = widen(a, UPCAST)\n    tl.store(y + at, a * 2.0)",
        "tl.store(y, multiply_add(tl.trans(tl.load(x + at)), tl.load(y + at), 0.0, UPCAST) + 1.0)",
        "tl.store(y + at, tl.load(x + at))",  # a copy is no arithmetic
    ],
)
def test_what_keeps_the_rule_passes(body: str) -> None:
    assert breaches(kernel(body)) == []


def test_dropping_one_widening_from_the_kernels_is_found() -> None:
    """Each `.to(tl.float32)` of a load in device.py, and each `wide` in its helpers, is there for this rule alone."""
    source = SOURCE
    assert breaches(source.replace("tile = widen(tile, UPCAST)", "tile = tile")) != []
    assert breaches(source.replace("tl.dot(widen(a, UPCAST), widen(b, UPCAST)", "tl.dot(a, b")) != []
    loads = [at for at in range(len(source)) if source.startswith("other=0.0).to(tl.float32)", at)]
    assert len(loads) >= 7
    for at in loads:
        end = at + len("other=0.0)")
        assert breaches(source[:end] + source[end + len(".to(tl.float32)") :]) != []
