"""The blocks of docs/study.md show what the page says of them; the models of the paper come from a hub of our own."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from minipeft import cli
from minipeft.runs import estimates, planning
from minipeft.study.paper import EXPLAINED, REPORTED
from minipeft.study.presets import PRESETS, RECIPES
from tests.paper import list_configs, serve_repositories

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/study.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT.split("## What the paper's numbers are")[1], re.DOTALL)


def run_block(kind: str, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a block prints; a line that is a minipeft command runs in this process."""
    capsys.readouterr()
    if kind == "python":
        exec(compile(text, "docs/study.md", "exec"), {})
    for line in text.splitlines() if kind == "bash" else ():
        if line.startswith("minipeft "):
            assert cli.main(shlex.split(line)[1:]) == 0
        else:
            subprocess.run(["bash", "-euc", line], check=True)
    said = capsys.readouterr()
    return " ".join((said.out + said.err).split())


def test_each_anomaly_is_shown_by_its_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimates, "probe_flops", lambda *_: 1e9)
    monkeypatch.setattr(planning, "count_step_bytes", lambda model, ids: 0)  # slow, and not what is shown
    with serve_repositories(monkeypatch, tmp_path, list_configs(tmp_path)):
        empty, noise, medium, memory, bfloat = (run_block(kind, text, capsys) for kind, text in BLOCKS)
    assert "CodeBLEU 0.0000 strict, 0.2500 as the codebleu package counts it" in empty
    assert "dead adapter" in noise
    assert "openai-community/gpt2-medium, lora: 2.99 % are trained, if a byte of codes counts as a parameter" in medium
    assert " 1.74 " in medium
    pairs = re.findall(r"(\d+\.\d+) (\d+\.\d+)", memory)
    assert len(pairs) == 4
    assert all(abs(float(printed) - float(fitted)) <= 0.02 for printed, fitted in pairs)
    assert bfloat == "tensor(True) tensor(True)"


def test_the_tables_name_every_preset_and_recipe() -> None:
    named = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert named == [*PRESETS, *RECIPES]
    printed = sum("percent" in numbers for methods in REPORTED.values() for numbers in methods.values())
    explained = sum("percent" in REPORTED[name].get(method, {}) for name, method in EXPLAINED)
    assert f"{printed - explained} of the {printed} agree to the printed digits" in TEXT
