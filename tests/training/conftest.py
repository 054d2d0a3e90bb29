"""Fixtures of the trainings on several processes: a model, pairs of unequal lengths, and the run of one process."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from minipeft.runs import finetune as tuning
from tests.ranks import train
from tests.small import write_small_model


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """No progress bars, no measuring of this machine's speed, one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tqdm", partial(tqdm, disable=True))
        patch.setattr(tuning, "show_steps", lambda *_: tqdm(disable=True))
        patch.setattr(tuning, "estimate", lambda *_: "so many steps at a learning rate of so much")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(quiet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_small_model(folder / "model", layers=1)
    write_small_model(folder / "llama", "llama")
    rows = [{"intent": f"add {n}", "snippet": f"x += {'1' * (n % 7) or 0}"} for n in range(14)]  # of unequal lengths
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run of one process, of 4 steps."""
    train(place, place / "whole")
    return place / "whole"
