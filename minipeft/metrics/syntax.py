"""CodeBLEU's third part: the subtrees of the reference that occur in the prediction (Ren et al. 2020, section 3.2).

Two subtrees match if their S-expressions are equal: named nodes with their fields, no names, numbers or operators.

    a + b   and   x - 1.5   ->   (binary_operator left: (identifier) right: (...))

The S-expression of a tree contains those of its subtrees, so writing all of them takes n x depth time. Keys are equal
exactly if the S-expressions are, but have bounded length: a long key of a child is replaced by its digest.
"""

import re
from collections import Counter
from hashlib import blake2b

from minipeft.metrics.grammar import Tree

LONGEST_KEY = 64

# One node in tree-sitter's S-expression: its field and kind, or the parenthesis that ends it.
ITEM = re.compile(
    r"""(?:(\w+):\ )?\((UNEXPECTED\ (?:'\\?.'|\w+)|MISSING\ (?:".*?"(?=\))|\w+)|\w+)|\)""", re.DOTALL | re.X
)


def count_subtrees(tree: Tree) -> Counter[str]:
    """Count the subtrees by key: the root, and each node that has children (anonymous ones count: `()`, `pass`)."""
    keys = _build_keys(tree) if tree.expression is None else _read_keys(tree, tree.expression)
    return Counter(keys[node] for node, end in enumerate(tree.ends) if end > node + 1 or node == 0)


def match_subtrees(reference: Counter[str], prediction: Counter[str]) -> int:
    """The number of the reference's subtrees that occur in the prediction: recall without clipping."""
    return sum(reference[key] for key in reference.keys() & prediction.keys())


def shorten(key: str) -> str:
    """Replace a long key by its digest; equal keys stay equal, different ones different."""
    return key if len(key) <= LONGEST_KEY else "#" + blake2b(key.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _build_keys(tree: Tree) -> list[str]:
    """The key of each node, from the leaves up; named nodes below an anonymous node belong to its parent."""
    keys = [""] * len(tree.kinds)
    ends, named, fields = tree.ends, tree.named, tree.fields
    waiting: list[tuple[int, str]] = []  # the nodes without a parent yet, each with its text in that; the next on top
    for node in range(len(keys) - 1, -1, -1):  # children before parents
        if not named[node]:
            keys[node] = tree.texts.get(node, "")
            continue
        key, end = "(" + tree.kinds[node], ends[node]
        while waiting and waiting[-1][0] < end:
            key += waiting.pop()[1]
        key += ")"
        keys[node] = key = key if len(key) <= LONGEST_KEY else shorten(key)
        field = fields[node]
        waiting.append((node, f" {field}: {key}" if field else f" {key}"))
    return keys


def _read_keys(tree: Tree, expression: str) -> list[str]:
    """The key of each node, from the S-expression that tree-sitter wrote for the root.

    A broken tree needs it: only the S-expression shows all MISSING nodes.
    """
    keys = [""] * len(tree.kinds)
    named = (node for node, shown in enumerate(tree.named) if shown)  # as they come in the text
    path: list[tuple[int, str, list[str]]] = []  # for each open node: itself, its field, and the pieces of its key
    for item in ITEM.finditer(expression):
        field, what = item.groups()
        if what is not None:
            node = -1 if what.startswith("MISSING _") else next(named)
            path.append((node, f" {field}: " if field else " ", ["(", what]))
            continue
        node, before, pieces = path.pop()
        key = shorten("".join([*pieces, ")"]))
        if node >= 0:
            keys[node] = key
        if path:
            path[-1][2].append(before + key)
    assert next(named, None) is None
    for node, text in tree.texts.items():
        keys[node] = text
    return keys
