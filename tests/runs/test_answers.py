"""Answer files: strict reading, resuming under the same settings only, and settings without effect."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from minipeft.errors import InputError
from minipeft.generation import GenerateConfig
from minipeft.runs.answers import AnswersConfig, answer_data, begin, load_tuned, read_answers
from minipeft.runs.config import ModelConfig
from tests.small import write_pairs, write_small_model


def write(file, *rows):
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_answers_come_back(tmp_path):
    rows = [
        {"prediction": "a", "reference": "b", "ended": "eos"},
        {"prediction": "", "reference": ["c", "d"], "ended": "limit"},
    ]
    assert read_answers(write(tmp_path / "a.jsonl", rows[0], "\n", rows[1])) == (
        ["a", ""],
        ["b", ["c", "d"]],
        [False, True],
        [None, None],
    )
    assert read_answers(write(tmp_path / "b.jsonl", {"prediction": "a", "reference": "b"}))[2] is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no answers"),
        (["[1]\n"], "line 1: must be an object, is a list"),
        ([{"reference": "b"}], "line 1: field 'prediction' is missing"),
        (
            [{"prediction": "a", "reference": "b"}, {"prediction": None, "reference": "b"}],
            "line 2: field 'prediction' must be text, is null",
        ),
        ([{"prediction": "a", "reference": []}], "line 1: field 'reference' must be text, is a list"),
        ([{"prediction": "a", "reference": ["b", 3]}], "line 1: field 'reference' must be text, is a list"),
        (
            [{"prediction": "a", "reference": "b", "question_id": [1]}],
            "line 1: field 'question_id' must be text or an integer, is a list",
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path, rows, said):
    file = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(InputError) as error:
        read_answers(file)
    assert str(error.value) == f"{file}: {said}"


def test_a_part_is_resumed_and_a_torn_line_dropped(tmp_path):
    part, settings = tmp_path / "a.jsonl.part", {"seed": 0}
    assert begin(part, settings) == {}
    whole = part.read_text()
    part.write_text(whole + json.dumps({"index": 3, "prediction": "x"}) + "\n" + '{"index": 4, "predi')
    assert begin(part, settings) == {3: {"prediction": "x"}}
    assert part.read_text() == whole + json.dumps({"index": 3, "prediction": "x"}) + "\n"
    with pytest.raises(InputError, match="was started with other settings"):
        begin(part, {"seed": 1})


def test_unicode_line_separators_do_not_split_a_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prediction": "a\u2028b", "reference": "c\x85"}\r\n', encoding="utf-8")
    assert read_answers(file).predictions == ["a\u2028b"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": "demo"}, "out: must be given with data"),
        ({"data": "demo", "out": Path("a"), "raw": True}, "raw: has no effect with data"),
        ({"data": "demo", "out": Path("a"), "limit": 0}, "limit: 0 must be an integer >= 1"),
        ({"split": "train"}, "split: has no effect without data"),
        ({"limit": 3}, "limit: has no effect without data"),
        ({"out": Path("a.jsonl")}, "out: has no effect without data"),
        ({"adapter": "runs/lora"}, "adapter: 'runs/lora' must be a Path"),
    ],
)
def test_settings_without_effect_are_refused(given, said):
    with pytest.raises(InputError) as error:
        AnswersConfig(ModelConfig("demo"), **given)
    assert str(error.value).startswith(said)


@pytest.fixture
def asked(tmp_path):
    """A model, its tokenizer, and how it answers a file of four pairs."""
    folder = write_small_model(tmp_path / "model", layers=1)
    write_pairs(tmp_path / "pairs.jsonl", 4)
    config = AnswersConfig(
        ModelConfig(str(folder)),
        GenerateConfig(4, batch=1),
        data=str(tmp_path / "pairs.jsonl"),
        out=tmp_path / "answers.jsonl",
    )
    return *load_tuned(config), config


def test_a_full_disk_names_the_file_and_the_answers_so_far_are_kept(asked, tmp_path):
    """RLIMIT_FSIZE refuses the write in the middle of an answer's line; the same command then resumes."""
    model, tokenizer, config = asked
    answer_data(model, tokenizer, replace(config, out=tmp_path / "whole.jsonl"))
    part = tmp_path / "answers.jsonl.part"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
        with pytest.raises(InputError) as error:
            answer_data(model, tokenizer, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    hint = "The answers so far are kept: solve this, then give the same command again"
    assert str(error.value) == f"{part}: cannot write: File too large. {hint}"
    assert not config.out.exists()
    assert part.stat().st_size == 700, "the last line is torn"
    assert part.read_text().count("\n") >= 2, "a head, and an answer"
    assert answer_data(model, tokenizer, config) == 4
    assert config.out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()
