"""Data flow: by the table of rules, under any names, and linear in the depth of loops."""

import re
import time

import pytest

from minipeft.metrics.dataflow import count_flows
from minipeft.metrics.grammar import parse


def flows(text: str) -> list[str]:
    tree = parse(text)
    assert tree is not None
    return sorted(count_flows(tree)[0].elements())


@pytest.mark.parametrize(
    ("code", "items"),
    [
        ("x = y", ["0 comesFrom ", "1 computedFrom 0"]),
        ("x = y\nz = x", ["0 comesFrom ", "1 computedFrom 0", "1 comesFrom 1", "2 computedFrom 1"]),
        ("x, y = f(a)", ["0 comesFrom ", "1 computedFrom 0", "2 comesFrom ", "3 computedFrom 2"]),
        ("a = b = c", ["2 computedFrom 0 1", "0 computedFrom 1", "1 comesFrom "]),
        ("x: int", []),
        ("print('a')", []),
        ("for i in x:\n    pass\nelse:\n    y = i", ["0 comesFrom 0", "1 computedFrom 0"]),
        ("for i in x:\n    y = i", ["0 comesFrom 0", "1 computedFrom 0", "1 comesFrom 1", "2 computedFrom 1"]),
        (
            "if a:\n    x = b\nelse:\n    x = c\nx",
            ["0 comesFrom ", "1 computedFrom 0", "2 comesFrom ", "1 computedFrom 2", "1 comesFrom 1"],
        ),
        ("a.b = 'text'", []),  # three pieces on either side: the package finds no token for a quote, and gives up
    ],
)
def test_rules(code, items):
    assert flows(code) == sorted(items)


def test_names_do_not_count(snippets):
    for text in snippets:
        renamed = re.sub(r"\b([a-z])\b(?![\"'])", r"\1_renamed", text)
        tree = parse(renamed)
        assert tree is not None
        if not tree.broken and "'" not in text and '"' not in text:
            assert flows(text) == flows(renamed), text


def nest(depth: int) -> str:
    lines = ["  " * level + f"for x{level} in y{level}, z:" for level in range(depth)]
    return "\n".join(
        [*lines, "  " * depth + "z = x0 + z", *("  " * level + f"y{level} = z" for level in range(depth, 0, -1))]
    )


def test_a_nest_of_loops_takes_time_in_its_depth():
    def seconds(depth: int) -> float:
        tree = parse(nest(depth))
        assert tree is not None
        start = time.process_time()
        assert count_flows(tree)[0].total() >= 2 * depth
        return time.process_time() - start

    seconds(10)
    few, many = (min(seconds(depth) for _ in range(3)) for depth in (20, 80))  # the best of three: others run here too
    assert many < 100 * max(few, 5e-3)  # 4 times the loops: a doubling a level would be 2 ** 60


def test_a_nest_of_loops_flows_as_in_the_package(package):
    for depth in range(1, 9):
        text = nest(depth)
        from codebleu.dataflow_match import get_data_flow, normalize_dataflow
        from codebleu.parser import DFG_python

        from minipeft.metrics.grammar import get_parser

        theirs = normalize_dataflow(get_data_flow(text, [get_parser(), DFG_python]))
        names = [f"{own[4:]} {relation} {' '.join(name[4:] for name in names)}" for own, relation, names in theirs]
        assert flows(text) == sorted(names)
