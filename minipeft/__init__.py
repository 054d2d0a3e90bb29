"""minipeft: parameter-efficient fine-tuning from scratch in plain PyTorch.

The names below are in the order of use: load a model, add an adapter, pack data, train, generate, score.
"""

import importlib
from typing import TYPE_CHECKING, Any

from minipeft.adapters import (
    AdapterReport,
    FullConfig,
    IA3Config,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    VeRAConfig,
    add_adapter,
    merge_adapter,
    remove_adapter,
)
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.data.examples import Pair, encode_pairs, load_pairs
from minipeft.data.packing import Batch, pack
from minipeft.data.tokens import load_tokenizer
from minipeft.errors import InputError
from minipeft.generation import GenerateConfig, generate
from minipeft.models.checkpoint import load_model, save_model
from minipeft.training.loop import Step, TrainConfig, TrainState, evaluate, train

if TYPE_CHECKING:
    from minipeft.adapters.bank import AdapterBank
    from minipeft.adapters.switching import AdapterSet, disabled
    from minipeft.metrics.bleu import bleu
    from minipeft.metrics.codebleu import codebleu

__all__ = [  # noqa: RUF022 (the order of the walk)
    "load_model", "save_model", "load_tokenizer",
    "add_adapter", "remove_adapter", "merge_adapter", "save_adapter", "load_adapter",
    "disabled", "AdapterSet", "AdapterReport",
    "FullConfig", "LoRAConfig", "IA3Config", "PrefixConfig", "PromptConfig", "VeRAConfig", "AdapterBank",
    "Pair", "load_pairs", "encode_pairs", "pack", "Batch",
    "train", "evaluate", "TrainConfig", "TrainState", "Step",
    "generate", "GenerateConfig",
    "bleu", "codebleu",
    "InputError",
]  # fmt: skip
__version__ = "0.1.0"

# Imported at first use: they take a tenth of the time that `import minipeft` adds to torch's.
LATER = {
    "AdapterBank": "minipeft.adapters.bank",
    "AdapterSet": "minipeft.adapters.switching",
    "disabled": "minipeft.adapters.switching",
    "bleu": "minipeft.metrics.bleu",
    "codebleu": "minipeft.metrics.codebleu",
}


def __getattr__(name: str) -> Any:
    """A public name whose module is imported at first use."""
    if name not in LATER:
        raise AttributeError(f"module 'minipeft' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(LATER[name]), name)
    return value
