"""What the presets stand for."""

import pytest

from minipeft.errors import InputError
from minipeft.runs.config import TuneConfig
from minipeft.study.presets import MODELS, PRESETS, StudyConfig, cells_of, labels, printed


@pytest.mark.parametrize(("preset", "number"), [("demo", 5), ("paper", 40), ("prefix", 46)])
def test_each_cell_is_a_run_that_can_be_started(preset, number):
    config = StudyConfig(preset=preset)
    cells = cells_of(config, {model: model for model in PRESETS[preset].models}, 100)
    assert len({cell.name for cell in cells}) == len(cells) == number
    for cell in cells:
        TuneConfig(**cell.tune)  # refuses what is no field, and bad values
        assert "/" not in cell.name


def test_what_the_caller_chose_comes_last():
    cells = cells_of(StudyConfig(steps=7, seeds=2, method=("prefix", "full"), dtype="bf16"), {"demo": "demo"}, 100)
    assert [(cell.method, cell.seed) for cell in cells[2:]] == [("prefix", 0), ("prefix", 1), ("full", 0), ("full", 1)]
    assert {cell.tune["loss_mask"] for cell in cells} == {
        "response"
    }  # also the untrained: its loss is of the same tokens
    assert all(cell.tune["steps"] == 7 for cell in cells[2:])
    assert {cell.method: cell.tune["dtype"] for cell in cells} == {
        "zero-shot": "bf16",
        "prefix": "bf16",
        "full": "fp32",
    }


def test_the_papers_numbers_stand_beside_its_models():
    assert printed(MODELS["GPT-2"], "prefix") == {"bleu": 0.00035, "codebleu": 0.25, "percent": 0.30, "memory": 5.85}
    assert printed("demo", "prefix") == {}
    assert printed(MODELS["GPT-2"], "zero-shot") == {}


def test_labels(tmp_path):
    for name in ("a/m", "b/m", "c"):
        (tmp_path / name).mkdir(parents=True)
    a, b, c = (str(tmp_path / name) for name in ("a/m", "b/m", "c"))
    assert labels([a, c, "gpt2", "demo"]) == {"m": a, "c": c, "gpt2": "gpt2", "demo": "demo"}
    assert labels([a, b]) == {a: a, b: b}


def test_what_a_config_refuses():
    for wrong, text in (
        ({"preset": "x"}, "preset: 'x' is not known"),
        ({"method": ("y",)}, "method: 'y' is not known"),
        ({"limit": 0}, "limit: 0 must be >= 1"),
    ):
        with pytest.raises(InputError, match=text):
            StudyConfig(**wrong)
