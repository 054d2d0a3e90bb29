"""Python code into a syntax tree that plain Python can walk: tree-sitter's tree, read once, without recursion.

The tree is *concrete*: every keyword and bracket is a node too. A node is `named` where the grammar gives it a name of
its own (`identifier`, `if_statement`), anonymous where it is the text itself (`if`, `(`). tree-sitter always returns a
tree: what it cannot place it wraps in `ERROR` nodes, and what it misses it inserts as `MISSING` ones.
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import tree_sitter
from tree_sitter import Language, Parser, Query, QueryCursor

# str() of a tree-sitter node recurses in C, and a deep tree takes the whole process down (seen at 30,000 levels).
DEEPEST_TEXT = 1000
ERROR = 0xFFFF  # tree-sitter's number for what it cannot place


NONE: list["Node"] = []  # the children of all nodes that have none


class Node:
    """One node of a syntax tree."""

    __slots__ = ("children", "field", "kind", "leaf", "named", "span", "text", "token")

    def __init__(self, kind: str, named: bool, field: str | None):
        self.kind = kind
        self.named = named  # or MISSING: what an S-expression shows
        self.field = field  # what this node is to its parent: "left", "body", ...
        self.children: list[Node] = NONE
        self.leaf = -1  # the number of its token among the tree's; -1 where it has none
        self.token = ""  # the text of a leaf
        self.span = (0, 0)  # of a node without children or a string: its bytes in the text
        self.text = ""  # its S-expression (syntax.py), or what stands for it


@dataclass(slots=True, eq=False)
class Tree:
    """A syntax tree: its nodes in preorder, the root first."""

    nodes: list[Node]
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
    root = parser().parse(data).root_node
    broken = root.has_error
    nodes, leaves, depth = _read_nodes(root, broken)
    last = {leaf.span: number for number, leaf in enumerate(leaves)}
    ascii_only = len(data) == len(code)
    for leaf in leaves:
        start, end = leaf.span
        token = code[start:end] if ascii_only else data[start:end].decode("utf-8", "replace")
        leaf.token = token.replace("\n", "") if "\n" in token else token
        leaf.leaf = last[leaf.span]
    return Tree(nodes, depth, broken, str(root) if broken and depth < DEEPEST_TEXT else None)


def find(query: str, data: bytes) -> dict[str, list[tree_sitter.Node]]:
    """The nodes of a text that a query captures, by the names that it gives them."""
    return QueryCursor(_query(query)).captures(parser().parse(data).root_node)


@cache
def _query(query: str) -> Query:
    language = parser().language
    assert language is not None
    return Query(language, query)


def _read_nodes(root: tree_sitter.Node, broken: bool) -> tuple[list[Node], list[Node], int]:
    """The nodes below a root in preorder, those of them that are leaves, and the number of levels."""
    cursor, kinds = root.walk(), _kinds()
    down, on, up = cursor.goto_first_child, cursor.goto_next_sibling, cursor.goto_parent
    nodes: list[Node] = []
    leaves: list[Node] = []
    path: list[Node] = []
    siblings: list[Node] = []
    string: Node | None = None  # the string that the cursor is in
    depth = 1
    while True:
        here = cursor.node
        assert here is not None
        kind, named = kinds[here.kind_id]
        node = Node(kind, named or (broken and here.is_missing), cursor.field_name)
        nodes.append(node)
        siblings.append(node)
        if down():
            if kind == "string" and string is None:
                string = node
                node.span = (here.start_byte, here.end_byte)
                leaves.append(node)
            if not named:
                node.text = str(here)  # "not in" and "is not": two words below an anonymous node
            node.children = siblings = []
            path.append(node)
            depth = max(depth, len(path) + 1)
            continue
        node.span = (here.start_byte, here.end_byte)
        if string is None and kind != "comment":
            leaves.append(node)
        while not on():
            if not up():
                return nodes, leaves, depth
            if path.pop() is string:
                string = None
            siblings = path[-1].children if path else siblings


@cache
def _kinds() -> dict[int, tuple[str, bool]]:
    """The name of each kind of node by its number, and whether it is named."""
    language = parser().language
    assert language is not None
    kinds = {
        number: (language.node_kind_for_id(number) or "", language.node_kind_is_named(number))
        for number in range(language.node_kind_count)
    }
    return kinds | {ERROR: ("ERROR", True)}
