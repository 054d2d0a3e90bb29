"""Fixtures of the study tests: a small real model, a few pairs, and cells that run in this process."""

import json
import shutil
from pathlib import Path

import pytest

from tests.study.inside import patch


@pytest.fixture(scope="session")
def model(assets) -> Path:
    """A Llama of 260,000 parameters."""
    return assets / "fixtures" / "stories260K"


@pytest.fixture(scope="session")
def broken(model, tmp_path_factory) -> Path:
    """The same with its weights cut short: its small files can be read."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(model, folder)
    folder.chmod(0o755)
    file = folder / "model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-100])
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """20 pairs of 20 questions; a study keeps 4 of them as questions."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"intent": f"add {n} to `x`", "snippet": f"x = x + {n}", "question_id": n} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def inside(monkeypatch) -> list[str]:
    """Run cells in this process, with a short probe; yields the names of those that ran."""
    return patch(monkeypatch.setattr)
