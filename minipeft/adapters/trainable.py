"""Adapter modules: their parameters are float32 and stay float32 when the base is cast.

A learning rate of 1e-4 is below bfloat16's spacing at 1 (2^-8 = 4e-3): in that dtype most updates would round to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from minipeft.errors import check_memory

MOST_PARAMETERS = 2**58  # torch stores byte counts in 63 bits
PARAMETER_BYTES = 16  # bytes of a float32 parameter, its gradient, and AdamW's two moments


def check_trained_memory(parameters: int, device: torch.device, where: str) -> None:
    """Check that the machine's memory suffices to train this many parameters; on the meta device, torch's limit alone.

    Raises:
        InputError: it does not; torch would fail during allocation, or the system would kill the process.
    """
    if device.type == "cpu" or parameters >= MOST_PARAMETERS:
        check_memory(PARAMETER_BYTES * parameters, where)


class TrainableModule(nn.Module):
    """A module of an adapter: its own tensors stay float32 when the model is cast, and follow moves.

    A subclass that replaces a module of the base holds that module's Parameters under their names (`adopted`): these
    belong to the base, and are cast with it. One that replaces a linear (`adopts_linear`) holds `weight` and `bias`.
    """

    adopts_linear = False

    @property
    def adopted(self) -> tuple[str, ...]:
        """The names of the parameters that belong to the base."""
        return ("weight", "bias") if self.adopts_linear else ()

    def own_tensors(self) -> dict[str, Tensor]:
        """The adapter's own parameters and buffers by name, without those of submodules."""
        held = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in held.items() if tensor is not None and name not in self.adopted}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Called by to(), half() and cuda(): undo the cast of the adapter's own tensors, but not the move."""
        kept = {name: tensor.detach() for name, tensor in self.own_tensors().items()}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                moved.data = tensor.to(moved.device)
        self.bind()
        return self

    def bind(self) -> None:
        """Choose what depends on the device: called again after each move. Nothing, for most modules."""
