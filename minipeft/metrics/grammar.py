"""Parse Python code with tree-sitter into a tree stored as lists, built in one pass without recursion.

The tree is *concrete*: every keyword and bracket is a node too. A node is `named` if the grammar names it
(`identifier`, `if_statement`), and anonymous if it is literal text (`if`, `(`). tree-sitter always returns a tree: text
that does not parse becomes `ERROR` nodes, and an absent token becomes a `MISSING` node.
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import tree_sitter
from tree_sitter import Language, Parser, Query, QueryCursor

# str() of a tree-sitter node recurses in C: a deep tree crashes the process (seen at 30,000 levels).
DEEPEST_TEXT = 1000
# tree-sitter searches for the best repair of a broken text: 25,000 characters of "x = ;" take it 10 seconds. It reports
# after every 100 steps; real code takes 1 report per 200 characters, a line of repeated words 1 per 30.
UNWATCHED = 1000  # characters; a shorter text cannot take long
LONGEST = 200_000  # characters of a text that is parsed at all
MOST_REPORTS = 4000  # plus one per 25 characters
ERROR = 0xFFFF  # tree-sitter's symbol for text that does not parse


@dataclass(slots=True, eq=False)
class Tree:
    """A syntax tree as columns: node i is entry i of each list, the root is 0, and i+1 .. ends[i]-1 are below node i.

        x = f(y)    0 module  1 expression_statement  2 assignment  3 identifier  4 =  5 call  6 identifier  ...

    This is preorder, the order of the text. Lists replace node objects, because a few hundred small objects per text
    keep Python's garbage collector busy (measured: up to two thirds of the time of `parse`).
    """

    kinds: list[str]
    named: list[bool]  # or MISSING: the nodes in an S-expression
    fields: list[str | None]  # a node's field in its parent: "left", "body", ...
    ends: list[int]
    places: list[int]  # of a leaf: the number of its token in the text; -1: no leaf
    tokens: list[str]  # of a leaf: the text of its token; "": no leaf
    texts: dict[int, str]  # of the anonymous nodes with children ("not in", "is not"): their S-expression
    clauses: set[int]  # the nodes with a `for ... in` clause right below
    broken: bool  # tree-sitter found an error
    depth: int = 1  # levels
    expression: str | None = None  # of a broken tree: its S-expression; None where it is too deep to ask for

    def children(self, node: int) -> list[int]:
        """The nodes right below a node."""
        below, place, end = [], node + 1, self.ends[node]
        while place < end:
            below.append(place)
            place = self.ends[place]
        return below


@cache
def get_parser() -> Parser:
    """The parser for Python, made once."""
    import tree_sitter_python

    return Parser(Language(tree_sitter_python.language()))


@cache
def list_grammar_versions() -> str:
    """The versions that a tree depends on, as a signature names them."""
    return f"tree-sitter:{version('tree-sitter')}|tree-sitter-python:{version('tree-sitter-python')}"


def parse(code: str) -> Tree | None:
    """Parse any text; returns None for one that is too long or takes too long.

    A leaf is a token: a node without children, or a whole string (with an f-string's expressions); comments have no
    token. Several MISSING tokens of no width can be at one place; all of them get the last one's number.
    """
    data = code.encode("utf-8", "replace")  # a lone surrogate, which UTF-8 cannot encode, becomes a question mark
    root = _parse(data)
    if root is None:
        return None
    tree, spans = _read_nodes(root)
    if tree.broken and tree.depth < DEEPEST_TEXT:
        tree.expression = str(root)
    last = {span: place for place, span in enumerate(spans)}
    ascii_only = len(data) == len(code)
    for node, place in enumerate(tree.places):
        if place >= 0:
            start, end = spans[place]
            token = code[start:end] if ascii_only else data[start:end].decode("utf-8", "replace")
            tree.tokens[node] = token.replace("\n", "") if "\n" in token else token
            tree.places[node] = last[start, end]
    return tree


def _parse(data: bytes) -> tree_sitter.Node | None:
    """The root of tree-sitter's tree; None where LONGEST or MOST_REPORTS is exceeded (the same on any machine)."""
    if len(data) <= UNWATCHED:
        return get_parser().parse(data).root_node
    if len(data) > LONGEST:
        return None
    left = MOST_REPORTS + len(data) // 25

    def is_enough(place: int, broken: bool) -> bool:
        nonlocal left
        left -= 1
        return left < 0

    try:
        tree = get_parser().parse(lambda place, point: data[place : place + 32_768], progress_callback=is_enough)
    except ValueError:  # "Parsing failed": it was stopped
        tree = None
    if tree is None or left < 0:
        get_parser().reset()  # or the next text would continue here
        return None
    return tree.root_node


def _read_nodes(root: tree_sitter.Node) -> tuple[Tree, list[tuple[int, int]]]:
    """The tree below a root without the texts of its tokens, and the byte range of each token."""
    tree = Tree([], [], [], [], [], [], {}, set(), root.has_error)
    kinds, named, fields = tree.kinds, tree.named, tree.fields
    ends, places, broken = tree.ends, tree.places, tree.broken
    cursor, names = root.walk(), _kinds()
    down, on, up = cursor.goto_first_child, cursor.goto_next_sibling, cursor.goto_parent
    spans: list[tuple[int, int]] = []
    path: list[int] = []
    depth, string = 0, -1  # the string that the cursor is in
    done = False
    while not done:
        here, node = cursor.node, len(kinds)
        assert here is not None
        kind, visible = names[here.kind_id]
        kinds.append(kind)
        named.append(visible or (broken and here.is_missing))
        fields.append(cursor.field_name)
        ends.append(node + 1)
        inner = down()
        if string < 0 and (kind == "string" if inner else kind != "comment"):
            places.append(len(spans))
            spans.append((here.start_byte, here.end_byte))
            if inner:
                string = node
        else:
            places.append(-1)
        if inner:
            if not visible:
                tree.texts[node] = str(here)
            if kind == "for_in_clause" and path:
                tree.clauses.add(path[-1])
            path.append(node)
            if len(path) > depth:
                depth = len(path)
            continue
        while not on():
            if not up():
                done = True
                break
            left = path.pop()
            ends[left] = len(kinds)
            if left == string:
                string = -1
    tree.tokens, tree.depth = [""] * len(kinds), depth + 1
    return tree, spans


def find(query: str, data: bytes) -> dict[str, list[tree_sitter.Node]]:
    """The nodes of a text that a query captures, by capture name."""
    root = _parse(data)
    return {} if root is None else QueryCursor(_query(query)).captures(root)


@cache
def _query(query: str) -> Query:
    language = get_parser().language
    assert language is not None
    return Query(language, query)


@cache
def _kinds() -> dict[int, tuple[str, bool]]:
    """The name of each kind of node by its number, and whether it is named."""
    language = get_parser().language
    assert language is not None
    kinds = {
        number: (language.node_kind_for_id(number) or "", language.node_kind_is_named(number))
        for number in range(language.node_kind_count)
    }
    return kinds | {ERROR: ("ERROR", True)}
