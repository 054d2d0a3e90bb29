"""The fused LoRA linear: one equation, five backends. Importing this package imports torch and NumPy, no Triton."""

from .choice import BACKENDS, Call, UnavailableBackend, choose_backend
from .dropout import Dropout, keep_mask, make_dropout
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
    "lora_linear_reference",
    "lora_linears",
    "lora_linears_reference",
    "lora_rows",
    "make_dropout",
    "make_lora_linear",
    "make_lora_linears",
]
