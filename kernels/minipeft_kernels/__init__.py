"""The fused LoRA linear: one function, four paths, one meaning. Importing it imports torch and nothing else."""

from .choice import BACKENDS, Call, UnavailableBackend, choose_backend
from .dropout import Dropout, keep_mask, make_dropout
from .lora_linear import lora_linear, lora_linears, lora_rows
from .reference import Part
from .rows import RowGroups

__all__ = [
    "BACKENDS",
    "Call",
    "Dropout",
    "Part",
    "RowGroups",
    "UnavailableBackend",
    "choose_backend",
    "keep_mask",
    "lora_linear",
    "lora_linears",
    "lora_rows",
    "make_dropout",
]
