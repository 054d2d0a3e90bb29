"""Python code into a syntax tree that plain Python can walk: tree-sitter's tree, read once, without recursion.

The tree is *concrete*: every keyword and bracket is a node too. A node is `named` where the grammar gives it a name of
its own (`identifier`, `if_statement`), anonymous where it is the text itself (`if`, `(`). tree-sitter always returns a
tree: what it cannot place it wraps in `ERROR` nodes, and what it misses it inserts as `MISSING` ones.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

from tree_sitter import Language, Parser

# str() of a tree-sitter node recurses in C, and a deep tree takes the whole process down (seen at 30,000 levels).
DEEPEST_TEXT = 1000
SPANNED = frozenset({"comment", "string", "concatenated_string"})


@dataclass(slots=True, eq=False)
class Node:
    """One node of a syntax tree."""

    kind: str
    named: bool
    field: str | None  # what this node is to its parent: "left", "body", ...
    children: list["Node"] = dataclasses.field(default_factory=list)
    leaf: int = -1  # the index of its token among the tree's tokens; -1 where it has none
    token: str = ""  # the text of a leaf
    span: tuple[int, int] | None = None  # of strings and comments: their bytes in the text
    text: str | None = None  # tree-sitter's own S-expression, where only that tells (see syntax.py)


@dataclass(slots=True, eq=False)
class Tree:
    """A syntax tree: its nodes in preorder, the root first."""

    nodes: list[Node]
    leaves: list[Node]  # those with a token, in the order of the text
    comments: list[tuple[int, int]]  # their bytes in the text
    depth: int  # levels, the root is the first
    broken: bool  # tree-sitter found an error
    expression: str | None  # of a broken tree: tree-sitter's S-expression; None where it is too deep to ask for


@cache
def parser() -> Parser:
    """The parser for Python, made once."""
    import tree_sitter_python

    return Parser(Language(tree_sitter_python.language()))


def grammar_versions() -> str:
    """The versions that a tree depends on, as a signature gives them."""
    return f"tree-sitter:{version('tree-sitter')}|tree-sitter-python:{version('tree-sitter-python')}"


def parse(code: str) -> Tree:
    """Parse `code`, whatever it holds: a tree comes back for any text.

    A leaf is a token: a node without children, or a whole string (an f-string's inside is part of it); comments have
    none. Two tokens of no width can stand at the same place (what is MISSING); all of them bear the last one's number.
    """
    data = code.encode("utf-8", "replace")  # a lone surrogate, which UTF-8 cannot hold, becomes a question mark
    raw = parser().parse(data)
    cursor, kinds, broken = raw.walk(), _kinds(), raw.root_node.has_error
    nodes: list[Node] = []
    leaves: list[Node] = []
    comments: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    path: list[Node] = []
    string: Node | None = None  # the string that the cursor is in
    depth = 0
    while True:
        here = cursor.node
        assert here is not None
        kind, named = kinds[here.kind_id] if here.kind_id < len(kinds) else (here.type, here.is_named)
        node = Node(kind, named or (broken and here.is_missing), cursor.field_name)
        nodes.append(node)
        if path:
            path[-1].children.append(node)
        if kind in SPANNED:
            node.span = (here.start_byte, here.end_byte)
            if kind == "comment":
                comments.append(node.span)
        inner = cursor.goto_first_child()
        if string is None and kind != "comment" and (kind == "string" or not inner):
            node.leaf = len(leaves)
            leaves.append(node)
            spans.append((here.start_byte, here.end_byte))
            if inner:
                string = node
        if inner:
            path.append(node)
            depth = max(depth, len(path))
            if not named:
                node.text = str(here)  # "not in" and "is not": two words below an anonymous node
            continue
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                _read_tokens(data, leaves, spans)
                expression = str(raw.root_node) if broken and depth < DEEPEST_TEXT else None
                return Tree(nodes, leaves, comments, depth + 1, broken, expression)
            if path.pop() is string:
                string = None


def _read_tokens(data: bytes, leaves: list[Node], spans: list[tuple[int, int]]) -> None:
    """Give each leaf its text, cut by byte offsets and without line ends, and the last number of its place."""
    last = {span: number for number, span in enumerate(spans)}
    for leaf, (start, end) in zip(leaves, spans):
        leaf.token = data[start:end].decode("utf-8", "replace").replace("\n", "")
        leaf.leaf = last[start, end]


@cache
def _kinds() -> list[tuple[str, bool]]:
    """The name of each kind of node by its number, and whether it is named."""
    language = parser().language
    assert language is not None
    return [
        (language.node_kind_for_id(number) or "", language.node_kind_is_named(number))
        for number in range(language.node_kind_count)
    ]
