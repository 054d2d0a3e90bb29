"""The rates preset: its search, its runs at the chosen learning rates, and what its report says."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from minipeft.cli import main
from minipeft.errors import InputError
from minipeft.metrics.bootstrap import bootstrap_bleu
from minipeft.study import rates_experiment
from minipeft.study.drafts import Base, make_cells
from minipeft.study.presets import PRESETS, StudyConfig
from minipeft.study.rates_experiment import MOST_RATES, climb, find_rung, get_rate, list_contenders
from minipeft.study.rates_report import Difference, Search, find_differences, list_tables
from minipeft.study.rows import Data, Results, Row
from minipeft.study.statistics import T_QUANTILES, compute_t_interval, find_detectable
from tests.small import write_small_model


def test_the_rungs_are_one_and_three_times_powers_of_ten():
    rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]
    assert [get_rate(find_rung(rate)) for rate in rates] == rates
    assert [find_rung(b) - find_rung(a) for a, b in itertools.pairwise(rates)] == [1] * 8
    assert get_rate(find_rung(5e-5)) == 3e-5  # LoRA's and full tuning's recipes need not be on it


@pytest.mark.parametrize(("first", "valley"), [(-6, -6), (-6, -3), (-6, -9), (0, -1)])
def test_a_search_ends_between_two_worse_rates(first, valley):
    """The loss is a parabola of log(rate) with its least at `valley`."""
    ended = {}
    for _ in range(10):
        rungs, best = climb(first, ended)
        if best is not None:
            break
        assert set(rungs) > set(ended)
        ended |= {rung: (rung - valley) ** 2 for rung in rungs}
    assert best == valley
    assert {valley - 1, valley, valley + 1} <= set(rungs) == set(ended)


def test_a_search_without_an_end_stops_and_failures_are_not_chosen():
    ended = {rung: -float(rung) for rung in range(20)}
    rungs, best = climb(1, ended)
    assert (len(rungs), best) == (MOST_RATES, max(rungs))
    assert Search("m", "LoRA", {get_rate(rung): ended[rung] for rung in rungs}).is_open
    assert climb(1, {0: 1.0, 1: math.nan, 2: None, -1: 2.0}) == ([-1, 0, 1, 2], 0)
    assert climb(1, dict.fromkeys(range(-9, 9))) == ([0, 1, 2], None)


def test_the_runs_stand_at_the_chosen_rates_and_only_they_answer():
    config, bases = StudyConfig("rates", method=("lora", "prefix")), {"demo": Base("demo", 4_339_200, "gpt2", 190, 512)}
    expected = make_cells(config, bases, 100)
    first = make_cells(config, bases, 100, {})
    names = [one.name for one in list_contenders(("lora", "prefix"))]
    assert names == ["lora", "loraplus", "prefix"]
    assert [cell.generate is None for cell in first] == [False] + [True] * 9  # the untrained model answers
    assert len(expected) == 10 + 3 * PRESETS["rates"].seeds
    assert PRESETS["rates"].seeds >= 5
    rates = {cell.variant: cell.run.train.learning_rate for cell in first[1:]}
    assert {variant.partition("@")[0] for variant in rates} == {"", "loraplus"}  # a method's own have no name
    assert all(float(variant.partition("@")[2]) == rate for variant, rate in rates.items())
    plus = next(cell for cell in first if cell.variant.startswith("loraplus"))
    assert plus.run.train.lr_multipliers == {"lora_B": 16.0}
    middle = {"lora": 3e-3, "prefix": 3e-3}
    losses = {(c.method, c.variant): float(c.run.train.learning_rate != middle[c.method]) for c in first[1:]}
    then = make_cells(config, bases, 100, {"demo": losses})
    runs = [cell for cell in then[1:] if cell.generate is not None]
    lora = [cell for cell in runs if (cell.method, cell.variant) == ("lora", "")]
    assert {cell.run.train.learning_rate for cell in lora} == {3e-3}
    assert [cell.seed for cell in lora] == list(range(5))
    assert {cell.name for cell in runs} <= {cell.name for cell in expected}  # what the progress bar counts
    assert all(cell.run.adapter.reparam == 512 for cell in then if cell.method == "prefix")


def test_what_the_preset_sets_is_refused():
    for name, value in (("learning_rate", 1.0), ("lr_multiplier", {"lora_B": 2.0})):
        with pytest.raises(InputError, match=f"{name}: is what --preset rates compares"):
            StudyConfig("rates", settings={name: value})
    with pytest.raises(InputError, match="cell: the runs of --preset rates depend on its search"):
        StudyConfig("rates", cell="1/2")


def test_students_t_by_integration():
    """The density of Student's t, integrated from -t to t, is 0.95."""
    for degrees, t in enumerate(T_QUANTILES, 1):
        x = np.linspace(-t, t, 200_001)
        c = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        density = c * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        assert density[1:].sum() * (x[1] - x[0]) == pytest.approx(0.95, abs=1e-4)  # t has three digits
    mean, low, high = compute_t_interval([1.0, 2.0, 4.0])
    assert (mean, high - mean) == (pytest.approx(7 / 3), pytest.approx(4.303 * np.std([1, 2, 4], ddof=1) / 3**0.5))
    assert low == pytest.approx(2 * mean - high)
    assert compute_t_interval([1.0]) is None


def counts(rng: np.random.Generator, shift: float = 0.0, questions: int = 60) -> np.ndarray:
    """BLEU counts of a system whose share of matching n-grams is about 1/2 + shift. [Q, 10]"""
    length = np.full(questions, 10)
    total = np.stack([length - n for n in range(4)], axis=1)
    match = rng.binomial(total, 0.5 + shift)
    return np.concatenate([match, total, length[:, None], length[:, None]], axis=1)


def test_drawing_the_runs_widens_an_interval_by_their_spread():
    rng = np.random.default_rng(0)
    same = [counts(rng)] * 3
    plain, drawn = (bootstrap_bleu(same, resamples=500, draw_runs=draw) for draw in (False, True))
    assert drawn == plain  # runs that are alike: which are drawn changes nothing
    spread = [counts(rng, shift) for shift in (-0.1, 0.0, 0.1)]
    plain, drawn = (bootstrap_bleu(spread, resamples=500, draw_runs=draw) for draw in (False, True))
    assert drawn.value == plain.value
    assert drawn.high - drawn.low > 1.3 * (plain.high - plain.low)


def test_a_detectable_difference_is_found_in_four_of_five_studies():
    """Studies of a true difference as large as the first of them calls detectable, each with questions of its own."""
    rng = np.random.default_rng(1)
    true = bootstrap_bleu([counts(rng, 0.1, 20_000)], [counts(rng, 0.0, 20_000)], resamples=1).value
    least = find_detectable(bootstrap_bleu([counts(rng, 0.1)], [counts(rng)], resamples=1000))
    shift, number = 0.1 * least / true, 200
    found = sum(bootstrap_bleu([counts(rng, shift)], [counts(rng)], resamples=300).low > 0 for _ in range(number))
    assert 0.7 < found / number < 0.9


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.03, 0.05, "yes"), (-0.05, -0.03, "yes"), (-0.01, 0.015, "no"), (0.01, 0.03, "not decided")],
)
def test_verdicts(low, high, said):
    interval = dataclasses.replace(bootstrap_bleu([counts(np.random.default_rng(0))]), low=low, high=high)
    assert Difference("m", "DoRA", 1e-3, interval, None, None).verdict == said


def test_a_small_study_of_rates(inside, pairs, tmp_path, capsys, monkeypatch):
    """The search comes first, the runs after it; the same line again runs nothing."""
    monkeypatch.setattr(rates_experiment, "MOST_RATES", 4)
    out, model = tmp_path / "s", write_small_model(tmp_path / "small", layers=1)
    words = ["study", "--preset", "rates", "--model", str(model), "--data", str(pairs), "--out", str(out)]
    words += ["--threads", "1", "--method", "lora", "--seeds", "2", "--steps", "2", "--limit", "2"]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Such a study finds a difference of " in said
    results = json.loads((out / "results.json").read_text())
    rows = {row["cell"]: row for row in results["cells"]}
    names = {(g["method"], g["label"]): g for g in results["groups"] if g["trainable"]}
    assert list(names) == [("lora", ""), ("lora", "LoRA+")]  # the search is no row of the tables
    for (method, label), group in names.items():
        variant = {"LoRA+": "loraplus"}.get(label, "")
        tried = {row["learning_rate"]: row["dev_loss"] for row in rows.values()
                 if row["method"] == method and row["variant"].startswith(f"{variant}@")}  # fmt: skip
        assert group["learning_rate"] == min(tried, key=tried.get)
        assert group["seeds"] == [0, 1]
        assert 3 <= len(tried) <= 4
        best = sorted(tried).index(group["learning_rate"])
        assert 0 < best < len(tried) - 1 or len(tried) == 4
        first = rows[group["cells"][0]]
        assert first["dev_loss"] == tried[group["learning_rate"]]  # seed 0 again
    assert [one["name"] for one in results["searches"]] == ["LoRA", "LoRA+"]
    assert results["searches"][0]["best"] == names["lora", ""]["learning_rate"]
    (plus,) = results["differences"]
    apart = [rows[a]["dev_loss"] - rows[b]["dev_loss"]
             for a, b in zip(names["lora", "LoRA+"]["cells"], names["lora", ""]["cells"])]  # fmt: skip
    assert plus["loss"][0] == pytest.approx(sum(apart) / 2)
    assert plus["bleu"]["value"] == pytest.approx(names["lora", "LoRA+"]["bleu"] - names["lora", ""]["bleu"])
    kinds = ["@" in rows[name]["variant"] for name in inside]
    assert kinds.index(True) < len(kinds) - 1 - kinds[::-1].index(False)
    assert kinds[-1] is False
    for report in ("report.md", "report.html"):
        text = (out / report).read_text()
        assert "Differences to LoRA" in text
        assert "Learning rates" in text
        assert "LoRA+" in text
    ran = len(inside)
    assert main(words) == 0
    assert len(inside) == ran
    assert main([*words, "--seeds", "3"]) == 0
    assert len(inside) == ran + 2

    results = Results("", "demo", Data("", 1, 1, "", ""), {}, (Row("c", "m", "lora", variant="@0.001"),), ())
    assert list_tables(results) == find_differences(results) == []  # of another preset
