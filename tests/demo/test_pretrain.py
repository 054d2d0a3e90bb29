"""The script that made the demo model, on a tiny model and forty files: it learns, and goes on where it was killed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import minipeft
from minipeft.demo import corpus

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_demo.py"
TINY = "--files 40 --vocab 512 --width 32 --layers 1 --heads 2 --length 64 --rows 8 --save-every 15"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("pretrain_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(corpus, "HELD_OUT_ONE_IN", 5)  # some of the forty, in whatever Python's standard library
    module.start = lambda out, *more: (
        monkeypatch.setattr(sys, "argv", ["pretrain_demo.py", "--out", str(out), *TINY.split(), *more]) or module.main()
    )
    return module


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_it_learns_and_a_killed_run_ends_as_one_that_was_not(script, tmp_path, capsys, monkeypatch):
    script.start(tmp_path / "whole", "--steps", "45")
    log = printed(capsys)
    assert [row["step"] for row in log] == [15, 30, 45]
    assert log[-1]["held_out"] < log[0]["held_out"] - 0.1

    save = script.save
    monkeypatch.setattr(script, "save", lambda *arguments: save(*arguments) or sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        script.start(tmp_path / "parts", "--steps", "45")
    assert not (tmp_path / "parts" / "model" / "model.safetensors").exists()
    monkeypatch.setattr(script, "save", save)
    script.start(tmp_path / "parts", "--steps", "45")
    assert [row["step"] for row in printed(capsys)] == [15, 30, 45]

    whole, parts = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "parts"))
    assert set(whole) == set(parts)
    assert all(whole[name].equal(parts[name]) for name in whole)
    model = minipeft.load_model(tmp_path / "parts" / "model")
    tokenizer = minipeft.load_tokenizer(tmp_path / "parts" / "model")
    assert tokenizer.size == model.config.vocab_size == 512
    assert tokenizer.decode(tokenizer.encode("def f(x):\n    return x")) == "def f(x):\n    return x"
