"""CodeBLEU's third part: which subtrees of the reference stand in the prediction (Ren et al. 2020, section 3.2).

Two subtrees are equal where their S-expressions are: named nodes with their fields, no names, numbers or operators.

    a + b   and   x - 1.5   ->   (binary_operator left: (identifier) right: (...))

The S-expression of a tree holds those of its subtrees, so writing all of them takes time in n x depth. A key is equal
where the S-expression is, but of bounded length: below it, a child's key that is long stands as its digest.
"""

import re
from collections import Counter
from hashlib import blake2b

from minipeft.metrics.grammar import Node, Tree

LONGEST_KEY = 64

# One node in tree-sitter's S-expression: its field, then what it is, or the parenthesis that ends it.
ITEM = re.compile(
    r"""(?:(\w+):\ )?\((UNEXPECTED\ (?:'\\?.'|\w+)|MISSING\ (?:".*?"(?=\))|\w+)|\w+)|\)""", re.DOTALL | re.X
)


def count_subtrees(tree: Tree) -> Counter[str]:
    """Count the subtrees by key: the root, and each node that has children (anonymous ones count: `()`, `pass`)."""
    if tree.expression is not None:
        _read_keys(tree, tree.expression)
    else:
        _build_keys(tree)
    counts = Counter(node.text for node in tree.nodes if node.children)
    if not tree.nodes[0].children:
        counts[tree.nodes[0].text] += 1
    return counts


def match_subtrees(reference: Counter[str], prediction: Counter[str]) -> int:
    """How many of the reference's subtrees occur in the prediction at all: recall without clipping."""
    return sum(reference[key] for key in reference.keys() & prediction.keys())


def shorten(key: str) -> str:
    """The key itself, or its digest where it is long: equal for equal keys, different for different ones."""
    return key if len(key) <= LONGEST_KEY else "#" + blake2b(key.encode(), digest_size=16).hexdigest()


def _build_keys(tree: Tree) -> None:
    """Put each node's key in its `text`, from the leaves up; an anonymous node's named children go to its parent."""
    parts: dict[Node, list[str]] = {}
    for node in reversed(tree.nodes):  # children before parents
        if not node.children:
            node.text = f"({node.kind})"
            continue
        below: list[str] = []
        for child in node.children:
            if child.named:
                below.append(f" {child.field}: {child.text}" if child.field else f" {child.text}")
            elif child.children:
                below.extend(parts.pop(child))
        if node.named:
            node.text = shorten(f"({node.kind}{''.join(below)})")
        elif node.children:
            parts[node] = below


def _read_keys(tree: Tree, expression: str) -> None:
    """Put each node's key in its `text`, from the S-expression that tree-sitter wrote for the root.

    Only this text tells what a broken tree misses: it shows MISSING nodes that are hidden from the tree itself.
    """
    keys: list[str] = []  # in preorder, hidden nodes left out
    path: list[tuple[int, list[str]]] = []  # for each open node: the place of its key, the pieces of it
    for item in ITEM.finditer(expression):
        name, what = item.groups()
        if what is not None:
            path.append((len(keys), [f" {name}: " if name else " ", "(", what]))
            if not what.startswith("MISSING _"):
                keys.append("")
            else:
                path[-1] = (-1, path[-1][1])
            continue
        place, (before, *pieces) = path.pop()
        key = shorten("".join([*pieces, ")"]))
        if place >= 0:
            keys[place] = key
        if path:
            path[-1][1].append(before + key)
    named = [node for node in tree.nodes if node.named]
    if len(named) == len(keys):
        for node, key in zip(named, keys):
            node.text = key
    else:
        _build_keys(tree)
