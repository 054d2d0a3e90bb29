"""Shared by prefix-tuning and prompt tuning: text init of virtual tokens, and their positions in the context.

Both put P virtual tokens before every row. With text init a prefix starts at the keys and values that the model
computes for a task description, a prompt at its embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minipeft.adapters.method import Encoder
from minipeft.documents import VIRTUAL
from minipeft.errors import InputError, check_methods
from minipeft.models import Decoder

TASK_LINE = "Generate Python code given a natural language instruction."


def encode_text(text: str, tokenizer: Encoder | None, method: str) -> list[int]:
    """Encode `text`, with a BOS if the tokenizer adds one.

    Raises:
        InputError: there is no tokenizer.
    """
    if tokenizer is None:
        hint = "add_adapter(model, config, tokenizer)"
        raise InputError("initialization from text needs the tokenizer", where=f"{method} init", hint=hint)
    check_methods(tokenizer, ("encode",), "Tokenizer", "tokenizer")
    return tokenizer.encode(text)


def encode_to_length(text: str, length: int, tokenizer: Encoder | None, method: str) -> list[int]:
    """Encode `text`, repeated or cut to `length` ids; a BOS that the tokenizer adds comes first, once.

    Raises:
        InputError: there is no tokenizer, or no token in the text.
    """
    ids = encode_text(text, tokenizer, method)
    again = ids[1:] if ids and ids[0] == getattr(tokenizer, "bos", None) else ids
    if not again:
        raise InputError(f"{text!r} has no tokens", where="text")
    while len(ids) < length:
        ids = ids + again
    return ids[:length]


def run_text(model: Decoder, ids: list[int], windowed: bool = False) -> tuple[Tensor, Tensor]:
    """Compute the keys and values of each layer for a text of VIRTUAL tokens, and read them from the decode cache.

    `windowed` is the prefix's: whether a sliding window applies within the text. The model must hold no adapter.
    -> two of [L, K, P, D], after rotary
    """
    row = torch.tensor([ids], device=model.embedding.weight.device)  # [1, P]
    cache = model.new_cache(1, len(ids))
    with evaluation(model, windowed), torch.no_grad():
        model.hidden(row, documents=torch.full_like(row, VIRTUAL), cache=cache)
    return cache.keys[:, 0], cache.values[:, 0]


@contextmanager
def evaluation(model: Decoder, windowed: bool) -> Iterator[None]:
    """Context manager: eval mode and this `windowed`; both are restored, also after an error."""
    before = model.windowed
    training = [module for module in model.modules() if module.training]
    model.eval()
    model.windowed = windowed
    try:
        yield
    finally:
        model.windowed = before
        for module in training:
            module.training = True


def check_virtual_tokens(length: int, context: int) -> None:
    """Check that virtual tokens leave room for text in the model's context.

    Raises:
        InputError: with the largest number that fits.
    """
    if length + 2 > context:  # one token to see and one to predict
        hint = f"take at most {context - 2} virtual tokens"
        raise InputError(f"{length} virtual tokens leave no room in a context of {context}", where="length", hint=hint)


def empty_slot(module: nn.Module, slot: str) -> None:
    """Set a slot back to None; without `delattr`, print(model) would still show it."""
    if isinstance(getattr(module, slot), nn.Module):
        delattr(module, slot)
        setattr(module, slot, None)
