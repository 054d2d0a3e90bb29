"""What won and at what cost, from differences that are known."""

from dataclasses import replace

import numpy as np
import pytest

from minipeft.metrics.bleu import count_pairs, score_counts
from minipeft.metrics.bootstrap import bootstrap_bleu
from minipeft.metrics.scores import score_texts
from minipeft.study.effects import add_effects, decide
from minipeft.study.rows import Group, Training

REFERENCES = [f"x{n} = sorted(y{n}, key=f{n}, reverse=True)" for n in range(40)]
WRONG = "pass"


def group(method: str, right: int, model: str = "m", trainable: int = 0, seconds: float = 10.0, **changes) -> Group:
    """A group whose first `right` answers of 40 are the references."""
    texts = [*REFERENCES[:right], *([WRONG] * (40 - right))]
    training = Training(trainable=trainable, train_seconds=seconds, peak_memory_bytes=5e8) if model else Training()
    return replace(Group(model, method, training=training, scores=score_texts(texts, REFERENCES)), **changes)


GROUPS = [
    group("nearest training pair", 12, ""),
    group("zero-shot", 6),
    group("full", 40, trainable=1000, seconds=20.0),
    group("lora", 39, trainable=50),
    group("prefix", 30, trainable=20),
    group("prompt", 11, trainable=10),
    group("ia3", 0, scores=None),
    Group("m", "vera", error="no space"),
]


def test_the_differences_are_paired_bootstraps():
    found = {one.method: one for one in add_effects(GROUPS)}
    full, lora = found["full"], found["lora"]
    assert full.reference == "nearest training pair"  # better than the model untrained
    assert full.effect == bootstrap_bleu(full.scores.runs, GROUPS[0].scores.runs)
    assert full.behind is None
    assert lora.behind == bootstrap_bleu(lora.scores.runs, full.scores.runs)
    assert lora.behind.value == pytest.approx(lora.bleu - full.bleu)
    assert found["zero-shot"].effect.high < 0
    assert found["zero-shot"].behind is None
    assert found["nearest training pair"].effect is None
    assert found["ia3"].effect is None
    assert found["vera"].effect is None


def test_the_reference_is_the_models_own_where_it_is_better():
    groups = [group("nearest training pair", 5, ""), group("zero-shot", 20, "a"), group("zero-shot", 1, "b")]
    groups += [group("lora", 30, "a", 5), group("lora", 30, "b", 5)]
    found = add_effects(groups)
    assert [one.reference for one in found[3:]] == ["zero-shot", "nearest training pair"]


def test_the_verdict():
    best, level, lost, sure = decide(add_effects(GROUPS))
    assert best.startswith("Best: full, BLEU 100.0 [100.0, 100.0]")
    assert "above 'nearest training pair', for 1,000 trained parameters, 20 s, 0.50 GB." in best
    assert level.startswith("LoRA is not distinguishable from it (")
    assert level.endswith("and trains 5 % of its parameters in 0.50 times its time.")
    assert lost == "Not better than 'nearest training pair': prompt-tuning."
    assert "one seed" in sure
    assert "mean of 3 seeds" in decide(add_effects([*GROUPS[:2], replace(GROUPS[2], seeds=(0, 1, 2))]))[-1]


def test_the_verdict_where_one_is_clearly_ahead_and_where_none_is():
    ahead = decide(add_effects([*GROUPS[:3], GROUPS[4]]))
    assert ahead[1].startswith("Second is prefix-tuning, ")
    none = decide(add_effects([*GROUPS[:2], GROUPS[5]]))
    assert none[0].startswith("No method is better than 'nearest training pair'; the best is prompt-tuning")
    assert decide(add_effects(GROUPS[:2])) == []


def test_the_interval_covers_the_true_difference():
    """Of two systems that are right with probability 0.6 and 0.5, over 60 draws of 60 questions."""
    rng, covered = np.random.default_rng(0), 0
    right, wrong = (count_pairs([text], [[REFERENCES[0]]])[0] for text in (REFERENCES[0], WRONG))
    draw = lambda share, number: np.where(rng.random((number, 1)) < share, right, wrong)
    true = [score_counts(draw(share, 100_000).sum(axis=0, keepdims=True))[0][0] for share in (0.6, 0.5)]
    for _ in range(60):
        interval = bootstrap_bleu([draw(0.6, 60)], [draw(0.5, 60)], resamples=500)
        covered += interval.low <= true[0] - true[1] <= interval.high
    assert 50 <= covered < 60
