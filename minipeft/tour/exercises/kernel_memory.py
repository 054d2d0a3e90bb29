"""The memory that a kernel may touch while its check runs: Triton's interpreter itself refuses no address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from minipeft.tour.exercises.judging import require


@contextmanager
def confined(reads: dict[str, Tensor], writes: dict[str, Tensor]) -> Iterator[None]:
    """Context manager: a kernel that reads outside of these tensors, or writes outside of `writes`, fails in words."""
    from triton.runtime.interpreter import InterpreterBuilder  # an optional dependency

    inputs, outputs = ", ".join(reads), ", ".join(writes)
    read, write = list_addresses({**reads, **writes}), list_addresses(writes)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def load_inside(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        held = covers(read, pointers, mask)
        require(held, f"the kernel reads outside of {inputs}: is the mask of a load missing or too wide?")
        return load(self, pointers, mask, *rest)

    def store_inside(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        held = covers(write, pointers, mask)
        require(held, f"the kernel writes outside of {outputs}: is the mask of a store missing or too wide?")
        return store(self, pointers, value, mask, *rest)

    with mock.patch.multiple(InterpreterBuilder, create_masked_load=load_inside, create_masked_store=store_inside):
        yield


def list_addresses(tensors: dict[str, Tensor]) -> np.ndarray:
    """The address of each entry of the tensors, sorted; a view holds its own entries only."""
    found = []
    for tensor in tensors.values():
        places = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
        own = places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten()
        found.append(tensor.untyped_storage().data_ptr() + own.numpy().astype(np.uint64) * tensor.element_size())
    return np.sort(np.concatenate(found))


def covers(addresses: np.ndarray, pointers: Any, mask: Any) -> bool:
    """Whether all pointers whose mask is true are among the sorted addresses."""
    wanted = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)]
    at = np.searchsorted(addresses, wanted).clip(max=len(addresses) - 1)
    return bool((addresses[at] == wanted).all())
