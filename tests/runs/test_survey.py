"""What `minipeft data` says of a data set, on a terminal and not, and as JSON."""

import json
from pathlib import Path

import pytest

from minipeft import cli
from minipeft.data.packing import PackConfig
from minipeft.runs.config import DataConfig, ModelConfig
from minipeft.runs.survey import SurveyConfig, survey
from tests.small import write_small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survey")
    write_small_model(folder / "model", layers=1)
    rows = [{"intent": "größe\x1b[2J", "snippet": "x" * n} for n in (1, 2, 60, 2)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def look(folder: Path, **packing: object):
    data = DataConfig(str(folder / "pairs.jsonl"), held_out=2)
    return survey(SurveyConfig(ModelConfig(str(folder / "model")), data, PackConfig(**packing), show=2))


def test_the_counts(folder: Path) -> None:
    """By hand: a byte is a token, the paper's template has 32 of them, the intent 11, EOS one."""
    head = 32 + 11 + 1
    found = look(folder, length=64)
    assert found.lengths == {"0 %": head + 1, "25 %": head + 1, "50 %": head + 2, "75 %": head + 2, "95 %": head + 2,
                             "99 %": head + 2, "100 %": head + 60}  # fmt: skip
    assert (found.rows, found.repeated, found.held_out) == (4, 1, 2)
    assert (found.packed.documents_cut, found.packed.tokens_cut) == (1, head + 60 - 64)
    assert found.shared in (0, 1)
    assert found.packed.targets == 4 * (head - 1) + 1 + 2 + 2 + 64 - head
    assert look(folder, length=64, loss_mask="response").packed.targets == (1 + 1) + 2 * (2 + 1) + 64 - (head - 1)


def test_what_is_trained_on_is_shown(folder: Path) -> None:
    """In brackets or in green; what a terminal would obey is escaped."""
    found = look(folder, loss_mask="response", length=96)
    text = found.as_text(colour=False)
    assert "### Instruction:\ngröße\\x1b[2J\n### Response:\n[x<|endoftext|>]\n" in text
    assert "[xx<|endoftext|>]\n" in text
    assert "\x1b" not in text
    green = found.as_text(colour=True)
    assert "### Response:\n\x1b[32mx<|endoftext|>\x1b[0m\n" in green
    assert green.count("\x1b") == 4
    assert found.as_text(colour=False).splitlines()[-1].endswith("of the 2 rows held out are also trained on")


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", str(folder / "pairs.jsonl"), "--model", str(folder / "model"), "--length", "64"]
    assert cli.main([*words, "--held-out", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["length"], found["packed"]["documents_cut"]) == (4, 64, 1)
    assert cli.main(words) == 0
    said = "note: training would refuse --held-out 100: "
    assert capsys.readouterr().out.splitlines()[-1].startswith(said)
    assert cli.main([*words, "--template", "{nope}"]) == 2
    assert "pairs.jsonl:1: field 'nope': is missing" in capsys.readouterr().err
