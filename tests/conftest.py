"""Shared fixtures: the folder of data and fixtures, a real model, one thread so that sums are repeatable."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch
from tqdm import tqdm

torch.set_num_threads(1)
# tqdm's own lock is shared by forked processes: a child that a test kills while it holds it would stop all others.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with data/, fixtures/ and tools/: MINIPEFT_ASSETS, else `shared` beside the repository."""
    folder = Path(os.environ.get("MINIPEFT_ASSETS") or Path(__file__).resolve().parents[2] / "shared")
    if not (folder / "fixtures").is_dir():
        lacking(f"no fixtures in {folder}: set MINIPEFT_ASSETS to the folder that holds data/, fixtures/ and tools/")
    return folder


def lacking(what: str) -> NoReturn:
    """Skip a test whose input is missing; in CI, where no skip may go unnoticed, fail it."""
    pytest.fail(what) if os.environ.get("CI") else pytest.skip(what)


@pytest.fixture(scope="session")
def real_model(assets: Path) -> Path:
    """The folder of a real 135M Llama checkpoint (SmolLM2-135M-Instruct), made once by tools/real_model.py.

    It is kept in MINIPEFT_CACHE, else `.cache/` in the repository. Making it takes 10 s and the package registry.
    """
    kept = Path(os.environ.get("MINIPEFT_CACHE") or Path(__file__).resolve().parents[1] / ".cache")
    folder = kept / "smollm2-135m"
    if not (folder / "model.safetensors").exists():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as work:  # two test processes may be here at once
            command = [sys.executable, str(assets / "tools" / "real_model.py"), f"{work}/model"]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                lacking(f"tools/real_model.py failed: {made.stderr.strip()[-300:]}")
            if not folder.exists():
                Path(work, "model").rename(folder)
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `bad_checkpoint` once for each of tests/bad_inputs.py.

    The table is loaded by its path: were tests/ on sys.path, tests/kernels would be taken for the package `kernels`.
    """
    if "bad_checkpoint" in metafunc.fixturenames:
        cases = bad_inputs().CHECKPOINTS
        metafunc.parametrize("bad_checkpoint", cases, ids=[case.name for case in cases])


@cache
def bad_inputs() -> ModuleType:
    """The module tests/bad_inputs.py."""
    spec = importlib.util.spec_from_file_location("bad_inputs", Path(__file__).parent / "bad_inputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", name="bad_inputs")
def bad_inputs_fixture() -> ModuleType:
    """tests/bad_inputs.py, which writes valid and damaged files."""
    return bad_inputs()
