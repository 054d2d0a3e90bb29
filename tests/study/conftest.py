"""Fixtures of the study tests: a small real model, a few pairs, and cells that run in this process."""

import json
import os
import shutil
from pathlib import Path

import pytest

from minipeft.files import write_json
from minipeft.runs import planning
from minipeft.study import cells, runner


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
    """Run cells in this process, which is faster, with a short probe; yields the names of those that ran."""
    monkeypatch.setattr(planning, "PROBE_SECONDS", 0.001)
    ran = []

    def here(cell, out, threads, bar, stop):
        ran.append(cell.name)
        write_json(out / "cells" / cell.name / "cell.json", cell.as_json())
        before = os.getcwd()
        try:
            status = cells.main([str(out), f"cells/{cell.name}"])
        finally:
            os.chdir(before)
        return None if status == 0 else f"exit status {status}"

    monkeypatch.setattr(runner, "run_cell", here)
    return ran
