"""Scores: nothing is worth nothing, and one text has one score."""

import os
import subprocess
import sys

import codebleu as package
import pytest

from minipeft import codebleu

FUNCTION = "def f(a, b):\n    c = a + b\n    return c"
SEVERAL = "def f(a, b, c):\n    x = a + b + c + d + e\n    return x if a else y"


def judge(references: list[str], predictions: list[str], **given: object) -> dict[str, float]:
    """The package's score."""
    return package.calc_codebleu(references, predictions, lang="python", **given)


def test_nothing_scores_nothing(exhibit):
    """k4black/codebleu#59: without any data flow in common, as for an empty answer, CodeBLEU's fourth part counts as
    1."""
    assert codebleu([""], [FUNCTION]).score == 0
    assert codebleu([""], [FUNCTION]).compat == 0.25  # what the package gives, by its name
    with exhibit.theirs("codebleu") as peer:
        peer.right = judge([FUNCTION], [""])["codebleu"] == 0


def test_references_without_data_flow(exhibit):
    """k4black/codebleu#20, microsoft/CodeXGLUE#46: where the references have no data flow, its part is a division by
    zero, or 0 with a warning."""
    result = codebleu(["pass"], ["pass"])
    assert result.dataflow is None
    assert sum(result.weights[:3]) == pytest.approx(1)
    assert result.weights[3] == 0
    same = codebleu(["print(1)"] * 3, ["print(1)"] * 3)
    assert same.syntax == 1
    with exhibit.theirs("codebleu", warning="no reference data-flows") as peer:
        peer.right = judge(["pass"], ["pass"])["dataflow_match_score"] != 0


SCRIPT = """
import sys
from {module} import {name} as score
print(repr({call}))
"""


def scores_by_hash_seed(module: str, name: str, call: str) -> set[str]:
    """What a call prints under different seeds of Python's string hashes."""
    script = SCRIPT.format(module=module, name=name, call=call)
    found = set()
    for seed in ("0", "2"):
        command = [sys.executable, "-c", script, FLOWS, CHANGED]
        ran = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found.add(ran.stdout)
    return found


FLOWS = """def f(a, b, c, d, e):
    while a:
        a = b + c + d + e
        b = a + c
        c = d + e + a
    return a"""
CHANGED = """def f(a, b, c, d, e):
    while a:
        a = c + b + e + d
        b = c + a
        c = e + a + d
    return a"""


def test_one_text_has_one_score(exhibit):
    """k4black/codebleu#35: the data-flow score of one pair differs from run to run, with the hashes of the variables'
    names."""
    assert len(scores_by_hash_seed("minipeft", "codebleu", "score(sys.argv[1:2], sys.argv[2:]).compat")) == 1
    with exhibit.theirs("codebleu") as peer:
        call = "score(sys.argv[1:2], sys.argv[2:], lang='python')"
        peer.right = len(scores_by_hash_seed("codebleu", "calc_codebleu", call)) == 1
