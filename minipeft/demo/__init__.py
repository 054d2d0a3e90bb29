"""The embedded default: a small model and a data set of our own, so that everything runs without a network.

model = minipeft.load_model(demo_model_path())
train, test = demo_pairs("train"), demo_pairs("test")
"""

import json
from dataclasses import replace
from pathlib import Path

from minipeft.data.pairs import Pairs, load_pairs
from minipeft.errors import InputError

HERE = Path(__file__).parent
SPLITS = ("train", "test")


def demo_model_path() -> Path:
    """The folder of the demo model, in Hugging Face's layout."""
    return HERE / "model"


def demo_pairs_path() -> Path:
    """The file of the demo pairs, both splits: JSON lines with CoNaLa's fields and `split`."""
    return HERE / "pairs.jsonl"


def demo_pairs(split: str) -> Pairs:
    """The demo pairs of one split, "train" or "test".

    Raises:
        InputError: there is no such split.
    """
    if split not in SPLITS:
        raise InputError(f"the demo has no split {split!r}, only 'train' and 'test'", where="split")
    whole = load_pairs(demo_pairs_path())
    lines = demo_pairs_path().read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(line)["split"] == split for line in lines]
    return replace(whole, items=tuple(pair for pair in whole if chosen[pair.line - 1]))
