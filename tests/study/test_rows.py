"""Rows come back from a cell's result.json, and seeds become means."""

import json
from dataclasses import replace

import pytest

from minipeft.errors import InputError
from minipeft.metrics.bootstrap import bootstrap_bleu
from minipeft.metrics.scores import SCORES, Scores, score_texts
from minipeft.study.rows import Group, Row, Training

REFERENCES = [f"x = sorted(y{n}, key=f)" for n in range(6)]
SCORED = score_texts(REFERENCES[:3] + ["x"] * 3, REFERENCES, questions=[0, 0, 1, 1, 2, 2])
ROW = Row(
    "m--lora--seed1", "m", "lora", 1, Training(steps=3, learning_rate=1e-3, dev_loss=2.0), 1.5, 0, {"steps": 3}, SCORED
)


def test_a_row_comes_back():
    data = json.loads(json.dumps(ROW.as_json(counts=True)))
    back = Row.from_json(data)
    assert back == ROW
    assert (back.scores.runs[0] == SCORED.runs[0]).all()
    assert "bleu_counts" not in ROW.as_json()
    silent = replace(ROW, scores=None)
    assert Row.from_json(json.loads(json.dumps(silent.as_json(counts=True)))) == silent
    assert "bleu" not in silent.as_json()


def test_what_is_no_row():
    data = ROW.as_json(counts=True)
    for change, text in (
        ({"seed": "x"}, "seed: 'x' must be an integer"),
        ({"dev_loss": "low"}, "dev_loss: 'low' must be"),
        ({"bleu": "high"}, "bleu: 'high' must be"),
        ({"bleu_counts": [[1, 2]]}, "bleu_counts: must hold runs of 10 counts a question"),
        ({"bleu_counts": "none"}, "bleu_counts: must hold runs"),
        ({"bleu_interval": [0.1]}, "bleu_interval: "),
        ({"signatures": None}, "signatures: "),
        ({"pairs": None}, "pairs: None must be"),
    ):
        with pytest.raises(InputError, match=text):
            Row.from_json({**data, **change})
    for name in ("cell", "steps", "loss", "bleu_counts", "chrf", "bleu_interval", "pairs"):
        with pytest.raises(InputError, match=f"field '{name}' is missing"):
            Row.from_json({key: value for key, value in data.items() if key != name})


def test_seeds_become_means():
    other = score_texts(["x"] * 3 + REFERENCES[3:], REFERENCES, questions=[0, 0, 1, 1, 2, 2])
    both = Scores.mean([SCORED, other])
    assert both["bleu"] == pytest.approx((SCORED["bleu"] + other["bleu"]) / 2)
    assert both["hit_limit"] is None
    interval = bootstrap_bleu([*SCORED.runs, *other.runs])
    assert both.bleu_interval == (interval.low, interval.high)
    assert Scores.mean([SCORED]) is SCORED
    training = Training.mean([Training(steps=3, dev_loss=1.0), Training(steps=3, dev_loss=2.0, train_seconds=4.0)])
    assert training == Training(steps=3, dev_loss=1.5, train_seconds=4.0)


def test_json_has_every_score_and_nothing_of_a_cell_that_failed():
    group = Group("m", "lora", (0, 1), ("a", "b"), ROW.training, SCORED, bleu_sd=0.1)
    assert {score.name for score in SCORES} <= group.as_json().keys() & ROW.as_json().keys()
    failed = Row("c", "m", "lora", error="no").as_json()
    assert failed["error"] == "no"
    assert not {score.name for score in SCORES} & failed.keys()
