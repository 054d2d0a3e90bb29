"""Learned columns as the output of a small network while they train (Li & Liang 2021, section 4.3), folded away after.

    columns = start + U h + c          h = tanh(W e + b)          e [P, E], h [P, width], one h for all layers

AdamW moves each number of a plain table by about the learning rate a step. Here all columns of all layers hang on the
same h, so that a step moves them together, and far: in a pilot (135M Llama, CoNaLa, 60 steps) a prefix at 1e-3 moved
by up to 1.95 and reached 1.67 nats; the plain table at 5e-3 moved by 0.15 and reached 1.87. U and c start at zero, so
that the columns start as `start`. Nothing of this is needed to use the adapter: the columns are what is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minipeft.adapters.lora import keep_float32


class Trunk(nn.Module):
    """h = tanh(W e + b): the part of the network that all layers share."""

    def __init__(self, columns: int, inputs: int, width: int, device: torch.device):
        super().__init__()
        self.seeds = nn.Parameter(torch.empty(columns, inputs, device=device))  # e [P, E]
        self.weight = nn.Parameter(torch.empty(width, inputs, device=device))  # W
        self.bias = nn.Parameter(torch.empty(width, device=device))  # b

    def initialize(self, generator: torch.Generator) -> None:
        """e as torch's nn.Embedding starts, W and b as its nn.Linear."""
        draw(self.seeds, generator, normal=True)
        draw_linear(self.weight, self.bias, generator)

    def forward(self) -> Tensor:
        return torch.tanh(self.seeds @ self.weight.T + self.bias)  # [P, width]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Trunk:
        """Stay float32 through casts of the model."""
        keep_float32(self, ("seeds", "weight", "bias"), lambda: super(Trunk, self)._apply(fn, recurse))
        return self

    def extra_repr(self) -> str:
        return "columns={}, inputs={}, width={}".format(*self.seeds.shape, self.weight.shape[0])


class Reparam(nn.Module):
    """U h + c: what the network adds to one site's columns of N numbers. Starts at 0."""

    def __init__(self, trunk: Trunk, outputs: int):
        super().__init__()
        self.trunk = trunk
        device, width = trunk.weight.device, trunk.weight.shape[0]
        self.weight = nn.Parameter(torch.zeros(outputs, width, device=device))  # U [N, width]
        self.bias = nn.Parameter(torch.zeros(outputs, device=device))  # c [N]

    def initialize(self, generator: torch.Generator) -> None:
        """As torch's nn.Linear starts, where there is no start to keep to (HF PEFT's prefix_projection)."""
        draw_linear(self.weight, self.bias, generator)

    def forward(self) -> Tensor:
        return self.trunk() @ self.weight.T + self.bias  # [P, N]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reparam:
        """Stay float32 through casts of the model."""
        keep_float32(self, ("weight", "bias"), lambda: super(Reparam, self)._apply(fn, recurse))
        return self

    def extra_repr(self) -> str:
        return "width={}, outputs={}".format(*reversed(self.weight.shape))


def make_trunk(columns: int, inputs: int, width: int, device: torch.device, generator: torch.Generator) -> Trunk:
    """A trunk with its random start; on the meta device, without."""
    trunk = Trunk(columns, inputs, width, device)
    if device.type != "meta":
        trunk.initialize(generator)
    return trunk


def draw_linear(weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
    """Weight and bias uniform in +-1 / sqrt(inputs), as torch's nn.Linear."""
    bound = weight.shape[1] ** -0.5
    for tensor in (weight, bias):
        draw(tensor, generator, normal=False, bound=bound)


@torch.no_grad()
def draw(tensor: Tensor, generator: torch.Generator, *, normal: bool, bound: float = 1.0) -> None:
    """Fill with N(0, 1), or uniformly in +-bound; drawn on the CPU, so that every device starts alike."""
    shape = tuple(tensor.shape)
    numbers = torch.randn(shape, generator=generator) if normal else 2 * torch.rand(shape, generator=generator) - 1
    tensor.copy_(numbers if normal else bound * numbers)
