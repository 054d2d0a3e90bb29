"""minipeft: parameter-efficient fine-tuning from scratch in plain PyTorch.

The names below are in the order of use: load a model, add an adapter, pack data, train, generate, score. Loading a
model and adding an adapter are imported at once, the modules of LATER when one of their names is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from minipeft.adapters import (
    AdapterReport,
    FullConfig,
    IA3Config,
    LNTuningConfig,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    VeRAConfig,
    add_adapter,
    merge_adapter,
    remove_adapter,
)
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.errors import InputError
from minipeft.models.checkpoint import load_model, save_model

if TYPE_CHECKING:
    from minipeft.adapters.bank import AdapterBank
    from minipeft.adapters.switching import AdapterSet, disabled
    from minipeft.data.examples import Pair, encode_pairs, load_pairs
    from minipeft.data.packing import Batch, pack
    from minipeft.data.tokens import load_tokenizer
    from minipeft.generation import GenerateConfig, generate
    from minipeft.metrics.bleu import bleu
    from minipeft.metrics.codebleu import codebleu
    from minipeft.training.loop import Step, TrainConfig, TrainState, evaluate, train

__all__ = [  # noqa: RUF022 (the order of the walk)
    "load_model", "save_model", "load_tokenizer",
    "add_adapter", "remove_adapter", "merge_adapter", "save_adapter", "load_adapter",
    "disabled", "AdapterSet", "AdapterReport",
    "FullConfig", "LoRAConfig", "IA3Config", "PrefixConfig", "PromptConfig", "VeRAConfig", "LNTuningConfig",
    "AdapterBank",
    "Pair", "load_pairs", "encode_pairs", "pack", "Batch",
    "train", "evaluate", "TrainConfig", "TrainState", "Step",
    "generate", "GenerateConfig",
    "bleu", "codebleu",
    "InputError",
]  # fmt: skip
__version__ = "0.1.0"

LATER = {  # module -> its public names, so that `import minipeft` takes little more than torch's own time
    "minipeft.adapters.bank": ("AdapterBank",),
    "minipeft.adapters.switching": ("AdapterSet", "disabled"),
    "minipeft.data.examples": ("Pair", "encode_pairs", "load_pairs"),
    "minipeft.data.packing": ("Batch", "pack"),
    "minipeft.data.tokens": ("load_tokenizer",),
    "minipeft.generation": ("GenerateConfig", "generate"),
    "minipeft.metrics.bleu": ("bleu",),
    "minipeft.metrics.codebleu": ("codebleu",),
    "minipeft.training.loop": ("Step", "TrainConfig", "TrainState", "evaluate", "train"),
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when it is first used."""
    for module, names in LATER.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module 'minipeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
