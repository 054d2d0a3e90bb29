"""The fused LoRA linear: one function, four paths, one meaning. Importing it imports torch and nothing else."""

from .choice import PATHS, Call, UnavailablePath, choose_path
from .dropout import Dropout, keep_mask, make_dropout
from .lora_linear import lora_linear, lora_linears, lora_rows
from .reference import Part
from .rows import RowGroups

__all__ = [
    "PATHS",
    "Call",
    "Dropout",
    "Part",
    "RowGroups",
    "UnavailablePath",
    "choose_path",
    "keep_mask",
    "lora_linear",
    "lora_linears",
    "lora_rows",
    "make_dropout",
]
