"""The embedded demo: a small model and a data set, so that everything runs offline.

model = minipeft.load_model("demo")                    demo_model_path()
train = minipeft.load_pairs("demo", split="train")     demo_pairs_path()
"""

from pathlib import Path

HERE = Path(__file__).parent


def demo_model_path() -> Path:
    """The folder of the demo model, in Hugging Face's layout; its README.md is the card."""
    return HERE / "model"


def demo_pairs_path() -> Path:
    """The file of the demo pairs, both splits: JSON lines with CoNaLa's fields and `split`."""
    return HERE / "pairs.jsonl"
