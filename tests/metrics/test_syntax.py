"""Subtrees: our keys are equal exactly if tree-sitter's S-expressions are."""

import random
from collections import Counter

from minipeft.metrics.grammar import get_parser, parse
from minipeft.metrics.syntax import LONGEST_KEY, count_subtrees, match_subtrees


def expressions(text: str) -> Counter[str]:
    """The S-expression of the root and of each node with children, by tree-sitter itself."""
    root = get_parser().parse(text.encode()).root_node
    found, waiting = Counter([str(root)]), list(root.children)
    while waiting:
        node = waiting.pop()
        if node.children:
            found[str(node)] += 1
            waiting.extend(node.children)
    return found


def test_keys_are_equal_where_expressions_are(snippets, mutate):
    chance = random.Random(8)
    texts = [*snippets, *(mutate(chance.choice(snippets), chance) for _ in range(300))]
    broken = 0
    for text, other in zip(texts, texts[7:] + texts[:7]):
        trees = parse(text), parse(other)
        assert trees[0] is not None
        assert trees[1] is not None
        broken += trees[0].broken
        keys, others = count_subtrees(trees[0]), count_subtrees(trees[1])
        theirs, their_others = expressions(text), expressions(other)
        assert sorted(keys.values()) == sorted(theirs.values())
        assert match_subtrees(keys, others) == sum(theirs[one] for one in theirs.keys() & their_others.keys())
    assert 100 < broken < len(texts) - 100


def test_keys_stay_short_however_deep_the_tree():
    tree = parse("+".join("a" * 4000))
    assert tree is not None
    keys = count_subtrees(tree)
    assert keys.total() == 3999 + 2
    assert max(map(len, keys)) <= LONGEST_KEY


def test_a_broken_tree_too_deep_for_its_text_still_has_keys():
    text = "(" * 3000 + "a $" + ")" * 3000
    tree = parse(text)
    assert tree is not None
    assert tree.broken
    assert count_subtrees(tree).total() > 1
