"""What many tests share: the folder of data and fixtures, and a thread count that makes sums repeatable."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with data/, fixtures/ and tools/: MINIPEFT_ASSETS, else `shared` beside the repository."""
    folder = Path(os.environ.get("MINIPEFT_ASSETS") or Path(__file__).resolve().parents[2] / "shared")
    if not (folder / "fixtures").is_dir():
        missing = f"no fixtures in {folder}: set MINIPEFT_ASSETS to the folder that holds data/, fixtures/ and tools/"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return folder
