"""The reparameterization MLP, which computes virtual tokens during training (Li & Liang 2021, section 4.3).

    vectors = init + U h + c          h = tanh(W e + b)          e [P, E], h [P, width], one h for all layers

AdamW moves each entry of a plain table by about the learning rate per step. Here the vectors of all layers depend on
the same h, so that a step moves them together and further: in a pilot (135M Llama, CoNaLa, 60 steps) a prefix at 1e-3
moved by up to 1.95 and reached 1.67 nats; the plain table at 5e-3 moved by 0.15 and reached 1.87. U and c start at
zero, so that the vectors start at `init`. The adapter's file stores the vectors, so that inference does not need the
MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minipeft.adapters.trainable import TrainableModule, check_trained_memory


class SharedHidden(TrainableModule):
    """h = tanh(W e + b): the hidden layer of the MLP, one for all layers of the model."""

    def __init__(self, length: int, inputs: int, width: int, device: torch.device):
        super().__init__()
        self.seeds = nn.Parameter(torch.empty(length, inputs, device=device))  # e [P, E]
        self.weight = nn.Parameter(torch.empty(width, inputs, device=device))  # W
        self.bias = nn.Parameter(torch.empty(width, device=device))  # b

    def initialize(self, generator: torch.Generator) -> None:
        """e as torch's nn.Embedding, W and b as its nn.Linear."""
        draw(self.seeds, generator, normal=True)
        draw_linear(self.weight, self.bias, generator)

    def forward(self) -> Tensor:
        return torch.tanh(self.seeds @ self.weight.T + self.bias)  # [P, width]

    def extra_repr(self) -> str:
        return "virtual_tokens={}, inputs={}, width={}".format(*self.seeds.shape, self.weight.shape[0])


class Reparam(TrainableModule):
    """U h + c: the MLP's output for one site's vectors of N entries, added to their init. Starts at 0."""

    def __init__(self, hidden: SharedHidden, outputs: int):
        super().__init__()
        self.trunk = hidden  # its name in the files of training state
        device, width = hidden.weight.device, hidden.weight.shape[0]
        self.weight = nn.Parameter(torch.zeros(outputs, width, device=device))  # U [N, width]
        self.bias = nn.Parameter(torch.zeros(outputs, device=device))  # c [N]

    def initialize(self, generator: torch.Generator) -> None:
        """As torch's nn.Linear, for vectors that have no init of their own (HF PEFT's prefix_projection)."""
        draw_linear(self.weight, self.bias, generator)

    def forward(self) -> Tensor:
        return self.trunk() @ self.weight.T + self.bias  # [P, N]

    def extra_repr(self) -> str:
        return "width={}, outputs={}".format(*reversed(self.weight.shape))


def make_hidden(
    length: int, inputs: int, width: int, outputs: int, device: torch.device, generator: torch.Generator
) -> SharedHidden:
    """A hidden layer with its random init; on the meta device, without. `outputs`: entries of all sites together.

    Raises:
        InputError: the MLP would not fit in this machine's memory.
    """
    check_trained_memory(length * inputs + width * (inputs + outputs), device, "reparam")
    hidden = SharedHidden(length, inputs, width, device)
    if device.type != "meta":
        hidden.initialize(generator)
    return hidden


def draw_linear(weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
    """Weight and bias uniform in +-1 / sqrt(inputs), as torch's nn.Linear."""
    bound = weight.shape[1] ** -0.5
    for tensor in (weight, bias):
        draw(tensor, generator, normal=False, bound=bound)


@torch.no_grad()
def draw(tensor: Tensor, generator: torch.Generator, *, normal: bool, bound: float = 1.0) -> None:
    """Fill with N(0, 1), or uniformly in +-bound; drawn on the CPU, so that every device starts alike."""
    shape = tuple(tensor.shape)
    values = torch.randn(shape, generator=generator) if normal else 2 * torch.rand(shape, generator=generator) - 1
    tensor.copy_(values if normal else bound * values)
