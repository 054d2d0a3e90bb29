"""Scores: an empty answer scores 0, and a text always has the same score."""

import json
import os
import subprocess
import sys

import pytest

from minipeft import codebleu

FUNCTION = "def f(a, b):\n    c = a + b\n    return c"


def judge(reference: str, prediction: str, hash_seed: str = "0") -> tuple[dict[str, float], str]:
    """The package's scores of a pair, and its stderr; in a separate process without patches."""
    script = (
        "import json, sys; from codebleu import calc_codebleu\n"
        "print(json.dumps(calc_codebleu(sys.argv[1:2], sys.argv[2:], lang='python')))"
    )
    ran = run(script, reference, prediction, hash_seed)
    return json.loads(ran.stdout), ran.stderr


def run(script: str, reference: str, prediction: str, hash_seed: str) -> subprocess.CompletedProcess[str]:
    """Run a script on a pair, under a seed of Python's string hashes."""
    given = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", script, reference, prediction]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=True)


def test_nothing_scores_nothing(exhibit):
    """k4black/codebleu#59: without any data flow in common, as for an empty answer, CodeBLEU's fourth part counts as
    1."""
    assert codebleu([""], [FUNCTION]).score == 0
    assert codebleu([""], [FUNCTION]).compat == 0.25  # what the package gives, by its name
    with exhibit.theirs("codebleu") as peer:
        peer.right = judge(FUNCTION, "")[0]["codebleu"] == 0


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
        scores, said = judge("pass", "pass")
        peer.said.append(said)
        peer.right = scores["dataflow_match_score"] != 0


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
    script = "import sys; from minipeft import codebleu; print(codebleu(sys.argv[1:2], sys.argv[2:]))"
    assert len({run(script, FLOWS, CHANGED, seed).stdout for seed in ("0", "2")}) == 1
    with exhibit.theirs("codebleu") as peer:
        peer.right = judge(FLOWS, CHANGED, "0") == judge(FLOWS, CHANGED, "2")
