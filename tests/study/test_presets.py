"""The cells that each preset expands to."""

import json

import pytest

from minipeft.adapters import list_method_names
from minipeft.errors import InputError
from minipeft.study.cells import Cell
from minipeft.study.data import load_study_data
from minipeft.study.drafts import Base, label_models, make_cells
from minipeft.study.presets import PRESETS, StudyConfig
from minipeft.study.runner import read_base


@pytest.mark.parametrize(("preset", "number"), [("demo", 5), ("paper", 40), ("prefix", 46)])
def test_each_cell_is_a_run_that_can_be_started(preset, number):
    config = StudyConfig(preset=preset)
    cells = make_cells(config, {model: Base("demo") for model in PRESETS[preset].models}, 100)
    assert len({cell.name for cell in cells}) == len(cells) == number
    for cell in cells:
        assert Cell.from_json(json.loads(json.dumps(cell.as_json()))) == cell  # which refuses bad settings
        assert "/" not in cell.name


def test_what_the_caller_chose_comes_last():
    config = StudyConfig(seeds=2, method=("prefix", "full"), settings={"steps": 7, "dtype": "bf16"})
    cells = make_cells(config, {"demo": Base("demo")}, 100)
    assert [(cell.method, cell.seed) for cell in cells[2:]] == [("prefix", 0), ("prefix", 1), ("full", 0), ("full", 1)]
    masks = {cell.run.packing.loss_mask for cell in cells}
    assert masks == {"response"}  # also the untrained: its loss is of the same tokens
    assert all(cell.steps == 7 for cell in cells[2:])
    dtypes = {cell.method: cell.run.model.dtype for cell in cells}
    assert dtypes == {"zero-shot": "bf16", "prefix": "bf16", "full": "fp32"}


def test_a_setting_reaches_the_methods_that_have_it():
    chosen = {"rank": 4, "virtual_tokens": 7, "weight_decay": 0.1, "length": 64}
    config = StudyConfig(method=("lora", "dora", "prefix"), settings=chosen)
    base, *cells = make_cells(config, {"demo": Base("demo")}, 100)
    lora, dora, prefix = (cell.run for cell in cells)
    assert (lora.adapter.rank, dora.adapter.rank, prefix.adapter.length) == (4, 4, 7)
    assert (lora.adapter.dora, dora.adapter.dora) == (False, True)
    assert {run.train.weight_decay for run in (lora, dora, prefix)} == {0.1}
    assert {run.packing.length for run in (base.run, lora, dora, prefix)} == {64}
    assert base.run.train.weight_decay == 0  # it is not trained: its cell does not depend on how others are
    assert make_cells(config, {"demo": None}, 100)[1].run is None  # a model that cannot be read


def test_every_method_with_a_record_can_be_compared():
    config = StudyConfig(method=tuple(list_method_names()), settings={"steps": 2})
    cells = make_cells(config, {"m": Base("demo", 10**6, "llama")}, 10)
    assert [cell.method for cell in cells] == ["zero-shot", *list_method_names()]
    assert cells[2].run.train.learning_rate == 1e-3  # LoRA's recipe for a small base


def test_labels(tmp_path):
    for name in ("a/m", "b/m", "c"):
        (tmp_path / name).mkdir(parents=True)
    a, b, c = (str(tmp_path / name) for name in ("a/m", "b/m", "c"))
    assert label_models([a, c, "gpt2", "demo"]) == {"m": a, "c": c, "gpt2": "gpt2", "demo": "demo"}
    assert label_models([a, b]) == {a: a, b: b}


def test_what_a_config_refuses():
    for wrong, text in (
        ({"preset": "x"}, "preset: 'x' is not known"),
        ({"method": ("y",)}, "method: 'y' is not known"),
        ({"limit": 0}, "limit: 0 must be an integer >= 1"),
        ({"settings": {"seed": 1}}, "seed: is set by the study itself"),
        ({"settings": {"banana": 1}}, "banana: has no effect with full, lora, prefix, prompt"),
        ({"method": ("prefix",), "settings": {"rank": 1}}, "rank: has no effect with prefix"),
    ):
        with pytest.raises(InputError, match=text):
            StudyConfig(**wrong)


def test_the_epochs_do_not_depend_on_the_rows_of_a_step():
    base = {"demo": Base("demo", 4_339_200, "gpt2", 190, 512)}
    steps = lambda **chosen: make_cells(StudyConfig(method=("lora",), settings=chosen), base, 100)[1].steps
    assert (steps(), steps(batch=2), steps(accumulate=5), steps(batch=2, accumulate=5)) == (380, 190, 76, 38)


def test_shorter_rows_are_more_rows():
    train, _ = load_study_data("demo")
    whole, short = (read_base("demo", train, 0, length).rows for length in (None, 128))
    assert short > 4 * whole - 10


def test_batch_invariance_is_for_training_and_answers():
    for chosen in ({}, {"batch_invariant": True}):
        zero, tuned = make_cells(StudyConfig(method=("lora",), settings=chosen), {"demo": Base("demo")}, 100)
        assert zero.generate.batch_invariant is tuned.generate.batch_invariant is bool(chosen)
        assert tuned.run.train.batch_invariant is bool(chosen)
