"""Trees: the columns equal tree-sitter's nodes, tokens are cut by bytes, and parsing a hostile text is aborted."""

import random
import subprocess
import sys

from minipeft.metrics.grammar import LONGEST, UNWATCHED, find, get_parser, parse


def test_columns_are_tree_sitters_nodes(snippets, mutate):
    chance = random.Random(9)
    texts = [*snippets, *(mutate(chance.choice(snippets), chance) for _ in range(200))]
    texts.append("\n".join(text for text in snippets if text.isascii() and "\0" not in text)[: 20 * UNWATCHED])
    for text in texts:
        tree, data = parse(text), text.encode()
        assert tree is not None
        node, leaves = 0, 0
        waiting = [(get_parser().parse(data).root_node, None, 1, False)]
        deepest = 0
        while waiting:
            theirs, field, depth, in_string = waiting.pop()
            deepest = max(deepest, depth)
            assert (tree.kinds[node], tree.fields[node]) == (theirs.type, field)
            assert tree.named[node] == (theirs.is_named or theirs.is_missing)
            assert tree.ends[node] == node + theirs.descendant_count
            leaf = not in_string and theirs.type != "comment" and (theirs.type == "string" or not theirs.children)
            assert (tree.places[node] >= 0) == leaf
            if leaf:
                token = data[theirs.start_byte : theirs.end_byte].decode().replace("\n", "")
                assert tree.tokens[node] == token
                assert tree.places[node] == leaves or token == ""
                leaves += 1
            inside = in_string or theirs.type == "string"
            fields = [theirs.field_name_for_child(place) for place in range(theirs.child_count)]
            waiting += [(c, f, depth + 1, inside) for c, f in reversed(list(zip(theirs.children, fields)))]
            node += 1
        assert (node, deepest) == (len(tree.kinds), tree.depth)


def test_children_are_those_right_below():
    tree = parse("x = f(y)")
    assert tree is not None
    assert [tree.kinds[child] for child in tree.children(2)] == ["identifier", "=", "call"]
    assert tree.children(3) == []


def test_tokens_of_no_width_share_the_last_number():
    tree = parse("def f():\n  if x\n")
    assert tree is not None
    empty = [place for place, token in zip(tree.places, tree.tokens) if place >= 0 and not token]
    assert len(set(empty)) <= 1


def test_a_hostile_text_is_given_up_and_the_next_one_is_not():
    before = parse("x = 1").kinds
    assert parse("x = ;" * 20_000) is None
    assert parse("x = 1\n" * UNWATCHED) is not None  # long, but no work
    assert parse("x" * (LONGEST + 1)) is None
    assert find("(identifier) @name", b"x = ;" * 20_000) == {}
    assert parse("x = 1").kinds == before


def test_the_process_survives_what_tree_sitters_own_text_does_not():
    code = (
        "from minipeft.metrics.grammar import parse\n"
        "tree = parse('(' * 60000 + 'a $' + ')' * 60000)\n"
        "print(tree.broken, tree.depth > 50000, tree.expression)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "True", "None"], done.stderr
