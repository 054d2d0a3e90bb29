"""The order of a study's systems, from differences that are known."""

from dataclasses import replace

import pytest

from minipeft.metrics.bootstrap import bootstrap_bleu
from minipeft.study.ranking import rank, subtract_seeds
from tests.study.test_effects import GROUPS, group


def test_the_systems_are_ranked_with_paired_differences():
    baselines = [GROUPS[0], group("echo the question", 2, "")]
    found = rank([*baselines, *GROUPS[1:]])
    assert [place.name for place in found] == [
        "full", "LoRA", "prefix-tuning", "nearest training pair", "prompt-tuning", "zero-shot"
    ]  # fmt: skip
    full, lora, prefix, nearest, prompt, last = found
    by_method = {one.method: one for one in GROUPS}
    assert lora.above == bootstrap_bleu(by_method["lora"].scores.runs, by_method["prefix"].scores.runs)
    assert full.above.value == pytest.approx(full.bleu - lora.bleu)
    assert (lora.is_apart, full.is_apart, nearest.is_apart) == (True, False, False)  # 39 of 40, 1 apart, 1 apart
    assert prefix.is_apart
    assert prompt.above.value == pytest.approx(prompt.bleu - last.bleu)
    assert last.above is None
    assert not last.is_apart


def test_without_a_tuned_group_nothing_is_ranked():
    assert rank(GROUPS[:2]) == []


def test_of_several_seeds_the_interval_covers_the_seeds():
    """Two systems whose seeds differ by as much as the systems do are not apart."""
    whole, few, some = GROUPS[2].scores, group("a", 5).scores, group("a", 20).scores
    one = replace(GROUPS[2], scores=replace(whole, runs=(*whole.runs, *few.runs)))
    other = replace(GROUPS[4], scores=replace(some, runs=(*some.runs, *few.runs)))
    seeded, alone = subtract_seeds(one, other), bootstrap_bleu(one.scores.runs, other.scores.runs)
    assert seeded.value == pytest.approx(alone.value)
    assert seeded.low < 0 < alone.low
