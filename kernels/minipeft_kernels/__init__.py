"""The fused LoRA linear: one equation, five backends. Importing this package imports torch and NumPy, no Triton."""

from .choice import BACKENDS, Call, UnavailableBackend, choose_backend
from .dropout import Dropout, make_dropout, make_keep_mask
from .lora_linear import (
    lora_linear,
    lora_linear_reference,
    lora_linears,
    lora_linears_reference,
    lora_rows,
    make_lora_linear,
    make_lora_linears,
)
from .reference import Part
from .rows import RowGroups, group_rows

__all__ = [
    "BACKENDS",
    "Call",
    "Dropout",
    "Part",
    "RowGroups",
    "UnavailableBackend",
    "choose_backend",
    "group_rows",
    "lora_linear",
    "lora_linear_reference",
    "lora_linears",
    "lora_linears_reference",
    "lora_rows",
    "make_dropout",
    "make_keep_mask",
    "make_lora_linear",
    "make_lora_linears",
]
