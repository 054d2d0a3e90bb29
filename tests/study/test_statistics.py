"""Mean and spread over seeds, and the flags of a cell."""

from dataclasses import replace

import numpy as np
import pytest

from minipeft.metrics.scores import Scores
from minipeft.study.rows import Row
from minipeft.study.statistics import compute_mean_and_sd, flag


def test_mean_and_sd():
    assert compute_mean_and_sd([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert compute_mean_and_sd([3.0]) == (3.0, None)


def test_flags():
    values = {
        "bleu": 0.3,
        "empty": 0,
        "repeated": 0,
        "leaked": 0,
        "hit_limit": None,
        "distinct": 90,
        "codebleu": 0.3,
        "codebleu_compat": 0.3,
    }
    row = lambda **changes: Row("c", "m", "lora", scores=Scores(100, values | changes, (0, 1), (), ()))
    assert flag(row(), ("nearest", 0.2)) == ()
    said = lambda **changes: " ".join(flag(row(**changes), ("nearest", 0.2)))
    assert "6 of 100 answers are empty" in said(empty=6)
    assert "repeat themselves" in said(repeated=6)
    assert said(hit_limit=20) == ""
    assert "cut off" in said(hit_limit=26)
    assert "every answer is the same" in said(distinct=1)
    assert "gives 0.250, not 0.000" in said(codebleu=0.0, codebleu_compat=0.25)
    assert "no better than 'nearest'" in said(bleu=0.2)
    moved = replace(row(), adapter_movement={"warnings": ["dead adapter: it is still its start"]})
    assert "it is still its start" in " ".join(flag(moved, ("nearest", 0.2)))
